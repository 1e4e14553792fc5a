"""A quantization-aware training step beside the plain one, and beside qwix's.

Four Dense layers of 1024, batch 512, AdamW, weights in int4 with groups of 64. Targets:
at most 1.10x the plain step, and no slower than qwix on the same model.
"""

# pyright: reportMissingImports=false
# The peer is installed by `make bench` alone.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record

LAYERS, WIDTH, BATCH, GROUP = 4, 1024, 512, 64


class Model(nn.Module):
    """Dense layers with ReLU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS - 1):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(WIDTH)(x)


def training(
    apply: Callable[[Any, jax.Array], Any], params: Any, seed: int = 0
) -> Callable[[], Callable[[], Any]]:
    """Makes training loops; a call takes one AdamW step on the squared output."""
    tx = optax.adamw(1e-3)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    sizes = np.random.default_rng(seed)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: jax.Array) -> Any:
        params, opt_state = carry
        grads = jax.grad(lambda p: jnp.square(apply(p, x)).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def make() -> Callable[[], Any]:
        aside = jnp.zeros(int(sizes.integers(2**10, 2**22)))  # Moves what follows.
        carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
        del aside

        def call() -> Any:
            nonlocal carry
            carry = step(carry, x)
            return carry

        return call

    return make


def main() -> None:
    """Time the three steps in turns and record the ratios."""
    model, x = Model(), jnp.ones((BATCH, WIDTH))
    params: Any = model.init(jax.random.key(0), x)

    rule = {"**/kernel": jc.quant.int4(group_size=GROUP)}
    scheme = jc.select(rule)
    params, state = scheme.init(params)
    wrapped = jc.wrap(model.apply, scheme)

    provider = qwix.QtProvider([qwix.QtRule(weight_qtype="int4", tile_size=GROUP)])
    theirs = qwix.quantize_model(model, provider)
    applies: dict[str, Callable[..., Any]] = {
        "plain": model.apply,
        "jaxcompress": lambda p, x: wrapped(p, state, x),
        "qwix": theirs.apply,
    }
    programs = {name: training(apply, params) for name, apply in applies.items()}
    times = compare(programs, to="plain", rounds=60, calls=3)
    record(
        "qat_step",
        __doc__,
        {
            "layers": LAYERS,
            "width": WIDTH,
            "batch": BATCH,
            "format": jc.quant.int4(group_size=GROUP).name,
            "target_ratio": 1.10,
            "times": times,
        },
    )


if __name__ == "__main__":
    main()
