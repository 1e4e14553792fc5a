"""k-means of vectors: seeds far apart, then Lloyd's iteration in bounded memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.codebook._beam import chunks, nearest

_PART = 2**13
"""Vectors summed at a time; 2**13 integers of 17 bits add up to less than 2**31."""

_BITS = 17
_SAMPLE = 64
"""Vectors for each seed, of which the seeds are drawn."""


class Clusters(NamedTuple):
    """What k-means finds.

    Attributes:
      entries: ``float32[E, d]`` centroids, sorted by their coordinates.
      codes: ``int32[n]`` of the nearest.
      error: ``float32[n]`` squared distances to it.
    """

    entries: jax.Array
    codes: jax.Array
    error: jax.Array


class Points(NamedTuple):
    """Vectors ``float32[n, d]``, and their weights of that shape, or None."""

    x: jax.Array
    weights: jax.Array | None


def cluster(
    x: jax.Array,
    *,
    entries: int,
    key: jax.Array,
    weights: jax.Array | None = None,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> Clusters:
    r"""k-means of vectors.

    .. math:: \min_C \sum_i \min_e \sum_j m_{ij} (x_{ij} - C_{ej})^2

    Args:
      x: ``float[n, d]`` vectors.
      entries: E, how many centroids. Static.
      key: Decides the seeds.
      weights: ``float[n, d]``, m: what squared errors count for; None for 1.
      iterations: At most so many, of all vectors. An int or traced.
      tolerance: They end when the centroids' squared movement is at most this part of
        their squared length.

    Returns:
      Centroids, and the nearest of each vector. A centroid without vectors moves to
      one that is far from its own. The same bits on any number of devices: sums are
      exact. If all vectors (at most ``64 E`` of them) are E or fewer different ones,
      the centroids are those.

    Raises:
      ValueError: If `x` is no matrix of floats, `weights` has another shape, or
        `entries` is not positive.

    Examples:
      >>> x = jnp.array([[0.0], [0.5], [10.0], [11.0]])
      >>> found = cluster(x, entries=2, key=jax.random.key(0))
      >>> found.entries.tolist(), found.codes.tolist()
      ([[0.25], [10.5]], [0, 0, 1, 1])

    References:
      Lloyd, `Least Squares Quantization in PCM
      <https://doi.org/10.1109/TIT.1982.1056489>`_, 1982; Arthur & Vassilvitskii,
      `k-means++ <https://dl.acm.org/doi/10.5555/1283383.1283494>`_, 2007, section 2.2.
      Differs: seeds are drawn from, and first moved on, a sample of 64 vectors each.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        raise ValueError(
            "codebook.cluster: x must be floats of shape [vectors, dimensions]; got "
            f"{x.dtype}{list(x.shape)}. Reshape or convert it."
        )
    if weights is not None and weights.shape != x.shape:
        raise ValueError(
            f"codebook.cluster: weights must have the shape of x, {x.shape}; got "
            f"{weights.shape}. Broadcast them."
        )
    if entries < 1:
        raise ValueError(f"codebook.cluster: entries must be positive; got {entries}.")
    if weights is not None:
        weights = weights.astype(jnp.float32)
    limits = jnp.int32(iterations), jnp.float32(tolerance)
    return _cluster(x.astype(jnp.float32), weights, key, limits, entries)


@functools.partial(jax.jit, static_argnames="entries")
def _cluster(
    x: jax.Array,
    weights: jax.Array | None,
    key: jax.Array,
    limits: tuple[jax.Array, jax.Array],
    entries: int,
) -> Clusters:
    """As `cluster`."""
    n = x.shape[0]
    pick, draw = jax.random.split(key)
    points = Points(x, weights)
    if n > _SAMPLE * entries:
        chosen = _stratified(pick, n, _SAMPLE * entries)
        sample = jax.tree.map(lambda a: a[chosen], points)
        table = _iterate(sample, _seeds(sample, draw, entries), limits)
    else:
        table = _seeds(points, draw, entries)
    table = _iterate(points, table, limits)
    found = nearest(x, table, weights)
    table, codes = in_order(table, found.codes[:, 0])
    return Clusters(table, codes, found.error)


def _stratified(key: jax.Array, n: int, count: int) -> jax.Array:
    """``int32[count]`` indices below n, one from each of as many equal runs."""
    places = jnp.arange(count, dtype=jnp.int32)
    low = places * (n // count) + jnp.minimum(places, n % count)
    length = n // count + (places < n % count).astype(jnp.int32)
    return low + jax.random.randint(key, (count,), 0, length, jnp.int32)


def _seeds(points: Points, key: jax.Array, entries: int) -> jax.Array:
    """k-means++: each next vector by chance, in proportion to its error so far.

    The smallest of exponential variables over the errors is drawn so.
    """
    x, m = points
    xt, n = x.T, x.shape[0]
    mt = None if m is None else m.T
    known = jnp.ones(n, jnp.float32) if mt is None else jnp.sum(mt, axis=0)

    def draw(i: jax.Array, state: tuple[jax.Array, jax.Array]):
        table, error = state
        wait = jax.random.exponential(jax.random.fold_in(key, i), (n,), jnp.float32)
        wait = jnp.where(error > 0, wait / jnp.where(error > 0, error, 1.0), jnp.inf)
        new = x[jnp.argmin(wait)]
        square = jnp.square(xt - new[:, None])
        found = jnp.sum(square if mt is None else square * mt, axis=0)
        error = jnp.where(i == 0, found, jnp.minimum(error, found))
        return table.at[i].set(new), error

    table = jnp.zeros((entries, x.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, entries, draw, (table, known))[0]


def _iterate(
    points: Points, table: jax.Array, limits: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Lloyd's iteration until the centroids rest."""

    def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
        count, moved, table = state
        return (count < limits[0]) & (moved > limits[1] * jnp.square(table).sum())

    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, _, table = state
        new = _moved(points, table)
        return count + 1, jnp.square(new - table).sum(), new

    return jax.lax.while_loop(go_on, step, (jnp.int32(0), jnp.float32(jnp.inf), table))[
        2
    ]


def _moved(points: Points, table: jax.Array) -> jax.Array:
    """Every centroid at the mean of its vectors, or, of none, at one far off."""
    x, m = points
    found = nearest(x, table, m)
    codes = found.codes[:, 0]
    new, used = toward_means(table, codes, x - table[codes], m)
    empty = ~used

    def revived(new: jax.Array) -> jax.Array:
        count = min(table.shape[0], x.shape[0])
        error, far = jax.lax.top_k(found.error, count)
        rank = jnp.clip(jnp.cumsum(empty, dtype=jnp.int32) - 1, 0, count - 1)
        better = empty & (error[rank] > 0)
        return jnp.where(better[:, None], x[far[rank]], new)

    return jax.lax.cond(empty.any(), revived, lambda new: new, new)


def toward_means(
    table: jax.Array, codes: jax.Array, residual: jax.Array, m: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Move entries by the mean of what their vectors lack.

    Args:
      table: ``float32[E, d]``.
      codes: ``int32[n]``.
      residual: ``float32[n, d]``.
      m: Weights ``float32[n, d]``, or None.

    Returns:
      The entries, and whether each has vectors, ``bool[E]``. An entry whose vectors
      lack nothing stays as it is, to the bit.
    """
    e = table.shape[0]
    weigh = jnp.ones_like(residual) if m is None else m
    total = exact_sums(residual * weigh, codes, e)
    count = exact_sums(weigh if m is not None else weigh[:, :1], codes, e)
    new = table + jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)
    return new, (count > 0).any(-1)


def exact_sums(values: jax.Array, codes: jax.Array, entries: int) -> jax.Array:
    """Sums of rows by code, ``float32[entries, d]``, the same in whatever order.

    Of `_PART` rows each, values are rounded to 34 bits below the largest, in two
    integers; then parts are added one after another.
    """
    size = min(_PART, values.shape[0])
    unit = 2.0**_BITS

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]):
        v, c = part
        top = jnp.max(jnp.abs(v))
        scale = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(top > 0, top, 1.0))))
        scaled = v / scale * (unit / 2)
        high = jnp.round(scaled)
        low = jnp.round((scaled - high) * unit)
        both = jnp.concatenate([high, low], axis=-1).astype(jnp.int32)
        sums = jax.ops.segment_sum(both, c, entries).astype(jnp.float32)
        high, low = jnp.split(sums, 2, axis=-1)
        return total + (high + low / unit) * (scale * (2 / unit)), None

    start = jnp.zeros((entries, values.shape[1]), jnp.float32)
    parts = (chunks(values, size), chunks(codes, size))
    return jax.lax.scan(add, start, parts)[0]


def in_order(table: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entries sorted by coordinates, and their codes; unused ones repeat the last."""
    used = jnp.zeros(table.shape[0], bool).at[codes].set(True)
    keys = tuple(table[:, j] for j in reversed(range(table.shape[1])))
    order = jnp.lexsort((*keys, ~used))
    places = jnp.arange(table.shape[0], dtype=jnp.int32)
    last = jnp.sum(used, dtype=jnp.int32) - 1
    rank = jnp.zeros_like(places).at[order].set(places)
    return table[order][jnp.minimum(places, last)], rank[codes]
