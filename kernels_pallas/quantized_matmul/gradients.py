"""Cotangents of a matmul with a quantized weight, for every kernel and layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.layouts import Stored, Weight, unpack
from kernels_pallas.quantized_matmul import xla


def gradients(
    dy: jax.Array, x: jax.Array, weight: Weight, stored: Stored, *, chunk: int
) -> tuple[jax.Array, Weight]:
    """Cotangents of `x` and of the weight.

    Args:
      dy: ``float[M, N]``.
      x: ``float[M, K]``.
      weight: As `stored` says.
      stored: How it lies. Static.
      chunk: Weights to dequantize at a time. Static.

    Returns:
      ``[M, K]`` of the dtype of `x`; scale and zero point in their layout and dtypes,
      with ``float0`` for what is of integers.
    """

    def sides(scale: jax.Array, zero: jax.Array | None) -> Weight:
        return unpack(weight._replace(scale=scale, zero=zero), stored)

    portable, back = jax.vjp(sides, weight.scale, weight.zero)
    dx = xla.input_gradient(dy, portable, stored.fmt, k=stored.k, chunk=chunk)
    found = xla.scale_gradients(dy, x, portable, stored.fmt, chunk=chunk)
    dscale, dzero = back(jax.tree.map(cotangent, found, portable))
    return dx.astype(x.dtype), Weight(no_gradient(weight.words), dscale, dzero)


def no_gradient(a: jax.Array) -> np.ndarray:
    """The cotangent of an array of integers."""
    return np.zeros(a.shape, jax.dtypes.float0)


def cotangent(value: jax.Array, like: jax.Array) -> Any:
    """A cotangent in the dtype of what it belongs to; integers have none."""
    floats = jnp.issubdtype(like.dtype, jnp.floating)
    return value.astype(like.dtype) if floats else no_gradient(like)
