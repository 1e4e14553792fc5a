"""Which entries of codebooks are nearest to vectors: one code each, or several added.

Vectors lie along the last axis of what is compared, which is then elementwise: results
do not depend on how many vectors there are, nor on how many devices hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 8192
"""Vectors compared at a time: with 8 dimensions, 256 kB of float32."""

_UNROLL = 8


class Found(NamedTuple):
    """Codes of vectors.

    Attributes:
      codes: ``int32[n, A]``, one for each codebook.
      error: ``float32[n]`` squared distance to the sum of the entries.
    """

    codes: jax.Array
    error: jax.Array


def beam_search(
    x: jax.Array,
    books: jax.Array,
    *,
    width: int = 1,
    weights: jax.Array | None = None,
    start: jax.Array | None = None,
) -> Found:
    r"""Find codes whose entries add up to nearly each vector.

    .. math:: \min_{c_1 \dots c_A} \sum_j m_j \Big(x_j - \sum_a C_{a, c_a, j}\Big)^2

    Book by book, the `width` best sums are kept; then each code is chosen once more
    given all others.

    Args:
      x: ``float32[n, d]`` vectors.
      books: ``float32[A, E, d]`` codebooks.
      width: Sums kept on the way; with one codebook, 1 is exact. Static.
      weights: ``float32[n, d]``, m: what squared errors count for.
      start: ``int32[n, A]`` codes that may stay: no error is then larger than theirs.

    Returns:
      Codes and errors. Of equally near entries of one codebook, the first.

    Examples:
      >>> books = jnp.array([[[0.0], [10.0]], [[0.0], [1.0]]])
      >>> beam_search(jnp.array([[11.2], [0.4]]), books).codes.tolist()
      [[1, 1], [0, 0]]

    References:
      Babenko & Lempitsky, `Additive Quantization for Extreme Vector Compression
      <https://openaccess.thecvf.com/content_cvpr_2014/html/Babenko_Additive_Quantization_for_2014_CVPR_paper.html>`_,
      2014, section 3 (beam search); Egiazarian et al., `AQLM
      <https://arxiv.org/abs/2401.06118>`_, 2024, section 3.2. Differs: books in a fixed
      order, and one pass over single codes at the end.
    """

    def one(part: tuple[Any, ...]) -> Found:
        x, m, start = part
        xt = x.T
        mt = None if m is None else m.T
        codes, error = _search(xt, books, width, mt)
        if start is not None:
            old = start.T
            codes, error = _better((codes, error), (old, _error(xt, books, old, mt)))
        if books.shape[0] > 1:
            codes, error = _conditional(xt, books, codes, error, mt)
        return Found(codes.T, error)

    return in_chunks(one, (x, weights, start))


def nearest(
    x: jax.Array, entries: jax.Array, weights: jax.Array | None = None
) -> Found:
    """`beam_search` in one codebook ``float32[E, d]``."""
    return beam_search(x, entries[None], weights=weights)


def in_chunks(f: Callable[[Any], Any], arrays: Any, size: int = CHUNK) -> Any:
    """`f` of some rows of every array at a time.

    Args:
      f: Of the arrays with at most `size` rows, to arrays with as many.
      arrays: Pytree of arrays of equally many rows, ``[n, ...]``.
      size: Rows at a time.
    """
    n = jax.tree.leaves(arrays)[0].shape[0]
    if n <= size:
        return f(arrays)
    cut = jax.lax.map(f, jax.tree.map(lambda a: chunks(a, size), arrays))
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], cut)


def chunks(a: jax.Array, size: int) -> jax.Array:
    """``[n, ...]`` as ``[count, size, ...]``, zeros at the end."""
    extra = -a.shape[0] % size
    a = jnp.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)))
    return a.reshape(-1, size, *a.shape[1:])


def _search(
    x: jax.Array, books: jax.Array, width: int, m: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes ``[A, n]`` and errors ``[n]`` of the best of the last beam."""
    residual = x[None]
    codes = jnp.zeros((1, 0, x.shape[1]), jnp.int32)
    error = jnp.zeros((1, x.shape[1]), jnp.float32)
    for a, table in enumerate(books):
        keep = min(width, residual.shape[0] * table.shape[0])
        last = a + 1 == books.shape[0]
        picked, error = _best(residual, table, 1 if last else keep, m)
        source, code = picked // table.shape[0], picked % table.shape[0]
        codes = jnp.take_along_axis(codes, source[:, None], axis=0)
        codes = jnp.concatenate([codes, code[:, None]], axis=1)
        if not last:
            residual = jnp.take_along_axis(residual, source[:, None], axis=0)
            residual = residual - jnp.moveaxis(table[code], -1, 1)
    return codes[0], error[0]


def _best(
    residual: jax.Array, table: jax.Array, keep: int, m: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The `keep` nearest pairs of a beam ``[b, d, n]`` and an entry ``[E, d]``.

    Returns:
      ``int32[keep, n]``, beam times E plus entry, and errors ``float32[keep, n]``; the
      nearest first.
    """
    beams, d, n = residual.shape
    entries = table.shape[0]
    unroll = math.gcd(entries, max(1, _UNROLL // beams))
    blocks = table.reshape(-1, unroll, d)

    def step(i: jax.Array, best: tuple[Any, ...]) -> tuple[Any, ...]:
        for u in range(unroll):
            error = _distance(residual, blocks[i, u], m)
            for b in range(beams):
                best = _insert(best, error[b], b * entries + i * unroll + u)
        return best

    empty = [jnp.full(n, jnp.inf, jnp.float32)] * keep, [jnp.zeros(n, jnp.int32)] * keep
    error, picked = jax.lax.fori_loop(0, entries // unroll, step, empty)
    return jnp.stack(picked), jnp.stack(error)


def _insert(
    best: tuple[list[Any], list[Any]], error: Any, name: Any
) -> tuple[list[Any], list[Any]]:
    """A sorted list of errors and their names with one more, the last left out."""
    errors, names = [], []
    for old, old_name in zip(*best, strict=True):
        nearer = error < old
        errors.append(jnp.where(nearer, error, old))
        names.append(jnp.where(nearer, name, old_name))
        error = jnp.where(nearer, old, error)
        name = jnp.where(nearer, old_name, name)
    return errors, names


def _distance(residual: jax.Array, entry: jax.Array, m: jax.Array | None) -> jax.Array:
    """Squared, ``[..., n]``, of ``[..., d, n]`` and ``[d]``, added up in order."""
    total = jnp.zeros((), jnp.float32)
    for j in range(entry.shape[0]):
        square = jnp.square(residual[..., j, :] - entry[j])
        if m is not None:
            square = square * jnp.broadcast_to(m[j], square.shape)
        total = total + square
    return total


def _error(
    x: jax.Array, books: jax.Array, codes: jax.Array, m: jax.Array | None
) -> jax.Array:
    """Squared error ``[n]`` of codes ``[A, n]``."""
    residual = x - _sum(books, codes)
    return _distance(residual, jnp.zeros(x.shape[0], jnp.float32), m)


def _sum(books: jax.Array, codes: jax.Array) -> jax.Array:
    """Entries added up, ``[d, n]``."""
    total = books[0][codes[0]]
    for a in range(1, books.shape[0]):
        total = total + books[a][codes[a]]
    return total.T


def _better(
    new: tuple[jax.Array, jax.Array], old: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    lower = new[1] < old[1]
    return jnp.where(lower, new[0], old[0]), jnp.where(lower, new[1], old[1])


def _conditional(
    x: jax.Array,
    books: jax.Array,
    codes: jax.Array,
    error: jax.Array,
    m: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Each code again, the others given."""

    def choose(a: jax.Array, state: tuple[jax.Array, jax.Array]):
        codes, error = state
        left = x - _sum(books, codes) + books[a][codes[a]].T
        picked, found = _best(left[None], books[a], 1, m)
        return _better((codes.at[a].set(picked[0]), found[0]), (codes, error))

    return jax.lax.fori_loop(0, books.shape[0], choose, (codes, error))
