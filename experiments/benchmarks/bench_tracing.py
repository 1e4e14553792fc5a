"""What `lift` adds to tracing: a 48-layer model, traced anew and from the cache.

Target: at most 1.3x the plain trace.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record

LAYERS, WIDTH, BATCH = 48, 64, 4


class Model(nn.Module):
    """Dense, layer norm and GELU, with a residual, `LAYERS` times."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS):
            x = x + nn.gelu(nn.Dense(WIDTH)(nn.LayerNorm()(x)))
        return x


def main() -> None:
    """Trace both ways and record the ratio."""
    model, x = Model(), jnp.ones((BATCH, WIDTH))
    params: Any = model.init(jax.random.key(0), x)
    packed = jc.compress(params, {"**/kernel": jc.quant.int4(group_size=32)})

    def plain() -> Any:
        return jax.make_jaxpr(lambda p, x: model.apply(p, x))(params, x).out_avals

    def lifted() -> Any:
        fresh = jc.lift(lambda p, x: model.apply(p, x))
        return jax.make_jaxpr(fresh)(packed, x).out_avals

    kept = jc.lift(model.apply)

    def cached() -> Any:
        return jax.make_jaxpr(lambda p, x: kept(p, x))(packed, x).out_avals

    programs = {
        "plain": lambda: plain,
        "lifted": lambda: lifted,
        "cached": lambda: cached,
    }
    times = compare(programs, to="plain", rounds=15)
    record(
        "tracing",
        __doc__,
        {"layers": LAYERS, "target_ratio": 1.3, "times": times},
    )


if __name__ == "__main__":
    main()
