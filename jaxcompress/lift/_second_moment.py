"""The second moment of a weight's inputs, which tells what its errors cost."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.lift._statistics import Statistics

_RAISES = 12


class Factor(NamedTuple):
    r"""A damped second moment and its factor, :math:`H = (I + U) D (I + U)^T`.

    Attributes:
      h: ``float32[K, K]`` damped; unit rows for inputs that are always zero.
      feedback: ``float32[K, K]``, the transpose of ``I + U``: row k is what the errors
        of the inputs before k add to input k.
      importance: ``float32[K]``, D: what a squared error in input k costs, made up for
        by the inputs after it.
      damping: What was added to the diagonal, relative to its mean.
    """

    h: jax.Array
    feedback: jax.Array
    importance: jax.Array
    damping: jax.Array


def check_feedback(who: str, damping: float, block: int, refine: int) -> None:
    """Options of an algorithm that feeds errors forward; ValueError names a bad one."""
    if not damping >= 0.0:
        raise ValueError(f"{who}: damping must not be negative; got {damping}.")
    if block < 1:
        raise ValueError(f"{who}: block must be positive; got {block}.")
    if refine < 0:
        raise ValueError(f"{who}: refine must not be negative; got {refine}.")


def factorize(gram: jax.Array, damping: float) -> Factor:
    """Damp and factor a second moment; tenfold the damping until that succeeds.

    Args:
      gram: ``float32[K, K]``, symmetric and positive semidefinite but for rounding.
      damping: Relative to the mean of the diagonal's entries that are not zero. Static.

    Returns:
      The factor; the identity's if nothing succeeds.
    """
    unit = unit_moment(gram)
    eye = jnp.eye(unit.shape[0], dtype=jnp.float32)

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        tries, relative, *_ = state
        h = unit + relative * eye
        # Reversed twice, a lower factor is an upper one.
        lower = jax.lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)
        finite = jnp.isfinite(lower).all()
        factor = jnp.where(finite, lower.T[::-1, ::-1], eye)
        done = finite | (tries + 1 == _RAISES)
        raised = jnp.where(done, relative, jnp.maximum(relative, 1e-6) * 10)
        return tries + 1, raised, done, factor, jnp.where(finite, h, eye)

    start = (jnp.int32(0), jnp.float32(damping), jnp.bool(False), eye, eye)
    _, used, _, factor, h = jax.lax.while_loop(lambda s: ~s[2], attempt, start)
    root = jnp.diagonal(factor)
    return Factor(h, factor / root[:, None], jnp.square(root), used)


def mean_gram(
    stats: Statistics | None, stack: tuple[int, ...], k: int, *, who: str, path: str
) -> jax.Array:
    """Mean of ``x x^T`` of every stack entry, ``float32[S, K, K]``; zero without data.

    Raises:
      ValueError: If the statistics are not of this weight, or without gram.
    """
    if stats is None:
        return jnp.zeros((math.prod(stack), k, k), jnp.float32)
    if stats.gram is None:
        raise ValueError(
            f"{who}: the statistics of {path!r} have no gram; collect them with "
            "calibrate(..., gram=True)."
        )
    if stats.gram.shape != (*stack, k, k):
        raise ValueError(
            f"{who}: the gram of {path!r} must have shape {(*stack, k, k)}: its stack "
            f"axes, and its contracting axes flattened; got {stats.gram.shape}."
        )
    gram = stats.gram.astype(jnp.float32).reshape(-1, k, k)
    gram = gram / jnp.maximum(stats.count.astype(jnp.float32), 1.0).reshape(-1, 1, 1)
    # A sum that overflowed says nothing: as if there were no data.
    finite = jnp.isfinite(gram).all((-1, -2), keepdims=True)
    return jnp.where(finite, gram, 0.0)


def unit_moment(gram: jax.Array) -> jax.Array:
    """A second moment ``[K, K]`` relative to the mean of its diagonal.

    Inputs that are always zero get the rows of the identity: a squared error in them
    counts, and disturbs no other.
    """
    diagonal = jnp.diagonal(gram)
    live = diagonal > 0
    mean = jnp.where(live, diagonal, 0.0).sum() / jnp.maximum(
        live.sum(dtype=jnp.float32), 1.0
    )
    both = live[:, None] & live[None, :]
    eye = jnp.eye(gram.shape[0], dtype=jnp.float32)
    return jnp.where(both, gram / jnp.where(mean > 0, mean, 1.0), eye)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """In full float32."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)
