"""A training step with 8-bit matmuls, forward and backward, beside the plain step.

Four Dense layers of 1024, batch 512, SGD with momentum. No target: a CPU has no 8-bit
matrix unit, and float8 is emulated there. Where there is one, this shows its use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record

LAYERS, WIDTH, BATCH, ROUNDS = 4, 1024, 512, 5


def model(params: Any, x: jax.Array) -> jax.Array:
    """Dense layers with ReLU between them."""
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def training(
    apply: Callable[[Any, jax.Array], Any], params: Any, tx: Any
) -> Callable[[], Callable[[], Any]]:
    """Makes training loops; a call takes one step on the squared output."""
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, x: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(lambda p: jnp.square(apply(p, x)).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def make() -> Callable[[], Any]:
        carry = jax.tree.map(jnp.copy, (params, tx.init(params)))

        def call() -> Any:
            nonlocal carry
            carry = step(carry, x)
            return carry

        return call

    return make


def main() -> None:
    """Time the steps in turns and record the ratios."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]
    tx = optax.sgd(1e-2, momentum=0.9)
    low = jc.precision
    int8 = jc.quant.Integer(bits=8)
    half = low.low_precision(model, forward=int8, backward=None)
    delayed = low.delayed_scaling(params)
    programs = {
        "plain": training(model, params, tx),
        "int8": training(low.matmul_int8(model), params, tx),
        "int8 forward only": training(half, params, tx),
        "bfloat16 policy": training(low.MIXED_BF16.apply(model), params, tx),
        "fp8": training(low.matmul_fp8(model), params, tx),
        "fp8 delayed": training(jc.lift(model), delayed, low.observe(tx)),
    }
    times = compare(programs, to="plain", rounds=ROUNDS)
    settings = {"layers": LAYERS, "width": WIDTH, "batch": BATCH}
    record("low_precision", __doc__, {**settings, "times": times})


if __name__ == "__main__":
    main()
