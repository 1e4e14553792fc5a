"""A GPTQ sweep over a scanned transformer: what depth adds to compilation.

The same net of 6 and of 24 layers, int4 in groups of 32: programs that XLA compiled,
seconds of that, and seconds in all. Target: 24 layers compile what 6 do.
"""

from __future__ import annotations

import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.benchmarks.timing import record

DEPTHS = (6, 24)
WIDTH, HEADS, BATCH, LENGTH, BATCHES = 128, 4, 8, 64, 4
COMPILATION = "/jax/core/compile/backend_compile_duration"


class Block(nn.Module):
    """Attention and two Dense layers, each added to what it normalized."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.RMSNorm()(x))
        y = nn.gelu(nn.Dense(4 * WIDTH, name="up")(nn.RMSNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(y), None


class Transformer(nn.Module):
    """Blocks whose weights are stacked.

    Attributes:
      depth: How many.
    """

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        return blocks(name="layers")(x, None)[0]


def swept(depth: int) -> dict[str, float]:
    """Programs and seconds of one sweep, nothing of an earlier one being kept."""
    jax.clear_caches()
    model = Transformer(depth)
    keys = jax.random.split(jax.random.key(depth), BATCHES + 1)
    batches = [jax.random.normal(k, (BATCH, LENGTH, WIDTH)) for k in keys[1:]]
    params: Any = jax.jit(model.init)(keys[0], batches[0])
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILATION:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    rules = {"**/kernel": jc.quant.int4(group_size=32)}
    layers: list[Any] = []
    packed = jc.quant.gptq(
        model.apply, params, batches, rules=rules, on_layer=layers.append
    )
    jax.block_until_ready(packed)
    total = time.perf_counter() - start
    jax.monitoring.clear_event_listeners()
    return {
        "weights": len(layers),
        "compilations": len(compiled),
        "compile_seconds": round(sum(compiled), 1),
        "seconds": round(total, 1),
    }


def main() -> None:
    """Sweep both and record what they took."""
    jnp.zeros(()).block_until_ready()
    settings = {"width": WIDTH, "rows": BATCHES * BATCH * LENGTH}
    depths = {f"{depth} layers": swept(depth) for depth in DEPTHS}
    record("sweep", __doc__, {**settings, **depths})


if __name__ == "__main__":
    main()
