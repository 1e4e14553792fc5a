"""Centred values of unit norm: what correlations and z-scores are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp

ROUNDING = 4.0 * float(jnp.finfo(jnp.float32).eps)
"""What may be rounding of equal values, in units of their size."""


def unit(x: jax.Array, *, axis: int, among: jax.Array) -> jax.Array:
    """Values less their mean, divided by their norm, along an axis.

    Args:
      x: ``float32[...]``.
      axis: Along which mean and norm are taken.
      among: ``bool`` of the same shape, values that count; others give zero.

    Returns:
      ``float32`` of the same shape. Zeros, and no gradient, where the values that
      count are equal to within rounding.
    """
    count = jnp.maximum(among.sum(axis, keepdims=True, dtype=jnp.float32), 1.0)
    x = jnp.where(among, x, 0.0)
    mean = x.sum(axis, keepdims=True) / count
    centred = jnp.where(among, x - mean, 0.0)
    size = jnp.abs(centred).max(axis, keepdims=True)
    # NaN varies, so that it comes through.
    varies = ~(size <= ROUNDING * jnp.abs(x).max(axis, keepdims=True))
    # Divided by the largest first, so that no square underflows or overflows.
    size = jax.lax.stop_gradient(jnp.where(varies, size, 1.0))
    scaled = jnp.where(varies, centred, 0.0) / size
    square = jnp.square(scaled).sum(axis, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(varies, square, 1.0))
