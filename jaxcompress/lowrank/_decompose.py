"""Truncated singular value decompositions, exact and randomized."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.lowrank._factors import product


class Triplets(NamedTuple):
    """Leading singular triplets of a matrix or a stack of them.

    Attributes:
      u: ``float32[*stack, m, r]`` left singular vectors.
      s: ``float32[*stack, r]`` singular values, descending.
      vt: ``float32[*stack, r, n]`` right singular vectors, as rows.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array

    def balanced(self) -> tuple[jax.Array, jax.Array]:
        """The two factors of the product, of equal column and row norms."""
        root = jnp.sqrt(self.s)
        return self.u * root[..., None, :], root[..., :, None] * self.vt


def truncated_svd(w: jax.Array, rank: int) -> Triplets:
    """The leading `rank` singular triplets, by the exact decomposition.

    Args:
      w: ``float32[*stack, m, n]``.
      rank: At most the smaller of `m` and `n`. Static.
    """
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return Triplets(u[..., :, :rank], s[..., :rank], vt[..., :rank, :])


def randomized_svd(
    w: jax.Array,
    rank: int,
    *,
    key: jax.Array,
    oversample: int = 8,
    power_iterations: int = 2,
) -> Triplets:
    r"""The leading `rank` singular triplets, from the range of a random projection.

    :math:`Q` spans :math:`(W W^T)^q W \Omega` for a normal :math:`\Omega` of
    ``rank + oversample`` columns; the decomposition is that of the small
    :math:`Q^T W`. It needs matmuls with `w` and decompositions of thin matrices only,
    so a sharded `w` is never gathered.

    Args:
      w: ``float32[*stack, m, n]``.
      rank: At most the smaller of `m` and `n`. Static.
      key: Decides :math:`\Omega`.
      oversample: Columns beyond the rank. Static.
      power_iterations: :math:`q`; each sharpens a slow decay of the singular values.
        Static.

    Returns:
      The triplets; exact to rounding if `w` has no higher rank than the columns, and
      otherwise in expectation near the exact ones, the nearer the more iterations.

    Raises:
      ValueError: If an option is out of range.

    Examples:
      >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.array([3.0, 4.0]))
      >>> randomized_svd(w, 1, key=jax.random.key(0)).s.round(3).tolist()
      [27.386...]

    References:
      Halko et al., `Finding Structure with Randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, Algorithms 4.4 and 5.1.
    """
    most = min(w.shape[-2:])
    if not 1 <= rank <= most:
        raise ValueError(
            f"lowrank.randomized_svd: rank must be from 1 to {most}; got {rank}."
        )
    if oversample < 0 or power_iterations < 0:
        raise ValueError(
            "lowrank.randomized_svd: oversample and power_iterations must not be "
            f"negative; got {oversample} and {power_iterations}."
        )
    columns = min(rank + oversample, most)
    shape = (*w.shape[:-2], w.shape[-1], columns)
    orthonormal = lambda a: jnp.linalg.qr(a)[0]
    q = orthonormal(product(w, jax.random.normal(key, shape, jnp.float32)))
    for _ in range(power_iterations):
        back = orthonormal(product(jnp.matrix_transpose(w), q))
        q = orthonormal(product(w, back))
    small = truncated_svd(product(jnp.matrix_transpose(q), w), rank)
    return small._replace(u=product(q, small.u))


def leading(w: jax.Array, rank: int, key: jax.Array | None) -> Triplets:
    """Randomized, if there is a key and the rank is small beside the matrix."""
    if key is not None and 2 * (rank + 8) <= min(w.shape[-2:]):
        return randomized_svd(w, rank, key=key)
    return truncated_svd(w, rank)


def rebalanced(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same product ``[m, r] [r, n]`` by factors of equal column and row norms."""
    ql, a = jnp.linalg.qr(left)
    qr, b = jnp.linalg.qr(jnp.matrix_transpose(right))
    small = truncated_svd(product(a, jnp.matrix_transpose(b)), left.shape[-1])
    left, right = small.balanced()
    return product(ql, left), product(right, jnp.matrix_transpose(qr))
