"""Errors of a matmul's output by its inputs' second moment, and making up for them.

Weights are ``float[*stack, *core]``, second moments ``float32[*stack, K, K]``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import Leaf


def moved(
    axes: Axes, damping: float, w: jax.Array, gram: jax.Array, cross: jax.Array
) -> jax.Array:
    """The weight that makes up for the errors of its inputs, in least squares."""
    layout = Layout.of(w.shape, axes)
    k = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / k
    ridge = damping * mean * jnp.eye(k, dtype=jnp.float32)
    flat = _flat(axes, w)
    right = jnp.matmul(cross + ridge, flat, precision="highest")
    empty = mean <= 0
    left = jnp.where(empty, jnp.eye(k, dtype=jnp.float32), gram + ridge)
    solved = jax.scipy.linalg.solve(left, jnp.where(empty, flat, right), assume_a="pos")
    good = jnp.isfinite(solved).all(axis=(-2, -1), keepdims=True)
    solved = jnp.matrix_transpose(jnp.where(good, solved, flat))
    storage = layout.to_storage(w).shape
    return layout.from_storage(solved.reshape(storage)).astype(w.dtype)


def relative_error(axes: Axes, w: jax.Array, leaf: Leaf, gram: jax.Array) -> jax.Array:
    """Relative output error of a compressed weight, in energy."""
    dense = _flat(axes, w)
    off = dense - _flat(axes, leaf.materialize())

    def energy(a: jax.Array) -> jax.Array:
        return jnp.sum(a * jnp.matmul(gram, a, precision="highest"))

    total = energy(dense)
    return jnp.where(total > 0, energy(off) / jnp.where(total > 0, total, 1.0), 0.0)


def _flat(axes: Axes, w: jax.Array) -> jax.Array:
    """``[*stack, K, outputs]``."""
    layout = Layout.of(w.shape, axes)
    a = layout.to_storage(w.astype(jnp.float32))
    stack = a.shape[: axes.stack]
    return jnp.matrix_transpose(a.reshape(*stack, -1, a.shape[-1]))
