"""A bfloat16 matmul by Pallas, to set the low-bit kernels' cycles against."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def dense_matmul(
    x: jax.Array, w: jax.Array, *, n: int = 1024, k: int = 1024
) -> jax.Array:
    """``x @ w`` in float32, for sizes that the blocks divide.

    Args:
      x: ``bfloat16[M, K]``.
      w: ``bfloat16[K, N]``.
      n: Outputs a block. Static.
      k: Inputs a block. Static.
    """
    (m, inputs), outputs = x.shape, w.shape[1]

    def kernel(x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        out_ref[...] += jnp.dot(
            x_ref[...], w_ref[...], preferred_element_type=jnp.float32
        )

    return pl.pallas_call(
        kernel,
        name="dense_matmul",
        out_shape=jax.ShapeDtypeStruct((m, outputs), jnp.float32),
        grid=(outputs // n, inputs // k),
        in_specs=[
            pl.BlockSpec((m, k), lambda j, l: (0, l)),
            pl.BlockSpec((k, n), lambda j, l: (l, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda j, l: (0, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
    )(x, w)
