"""The values of kept weights, given which are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.lift._second_moment import matmul


def refit(
    w: jax.Array,
    values: jax.Array,
    kept: jax.Array,
    h: jax.Array,
    steps: jax.Array | int,
) -> jax.Array:
    r"""Bring the kept weights towards the least error that their mask allows.

    Conjugate gradients on :math:`\min_Q (W - Q)^T H (W - Q)`, Q zero where masked, each
    output on its own and all at once, scaled by the diagonal of H.

    Args:
      w: ``float32[K, R]``, the weight to stand for.
      values: ``float32[K, R]``, where to start; zero where masked.
      kept: ``bool[K, R]``.
      h: ``float32[K, K]``, symmetric and positive definite.
      steps: How many; traced or not.

    Returns:
      ``float32[K, R]``, zero where masked. The error of every output is at most that of
      `values`.

    References:
      Hestenes & Stiefel, 1952, with the preconditioner of Jacobi.
    """
    diagonal = jnp.diagonal(h)[:, None]
    only = lambda a: jnp.where(kept, a, 0.0)
    dot = lambda a, b: jnp.sum(a * b, axis=0, keepdims=True)
    ratio = lambda a, b: jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, residual, direction, along = state
        spread = only(matmul(h, direction))
        length = ratio(along, dot(direction, spread))
        q = q + length * direction
        residual = residual - length * spread
        scaled = residual / diagonal
        after = dot(residual, scaled)
        direction = scaled + ratio(after, along) * direction
        return q, residual, direction, after

    residual = only(matmul(h, w - values))
    scaled = residual / diagonal
    state = (values, residual, scaled, dot(residual, scaled))
    fitted = jax.lax.fori_loop(0, steps, step, state)[0]
    error = lambda q: dot(w - q, matmul(h, w - q))
    return jnp.where(error(fitted) <= error(values), fitted, values)
