"""k-means of scalars: sorted once, so that an iteration looks at boundaries alone."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.codebook._optimal import optimal_entries

Init = Literal["linear", "density", "random", "kmeans++", "optimal"]
INITS: tuple[Init, ...] = get_args(Init)
KEYED = ("random", "kmeans++")

_BLOCK = 4096
"""Values of a block; the sum of so many numbers of 12 bits fits into 24."""

MOST = 2**27
"""Values whose sums fit into the limbs."""

_SAMPLE = 4096
"""Values that k-means++ draws its seeds from."""


class Values(NamedTuple):
    """The values to cluster, in order, and exact sums of their beginnings.

    Attributes:
      x: ``float32[n]`` ascending; behind the first `size`, infinity.
      size: ``int32``: values that are not zero.
      fixed: ``uint32[blocks, 4096]``: x as a fraction of `unit`, 0 to 2^24.
      before: ``uint32[3, blocks + 1]``: what the blocks before hold, in 16-bit limbs.
      unit: ``float32``: a power of two that no magnitude exceeds.
    """

    x: jax.Array
    size: jax.Array
    fixed: jax.Array
    before: jax.Array
    unit: jax.Array

    @classmethod
    def of(cls, w: jax.Array) -> Values:
        """Of an array of any shape; zeros are left out."""
        x = w.astype(jnp.float32).reshape(-1)
        x = jnp.sort(jnp.where(x == 0, jnp.inf, x))
        size = jnp.isfinite(x).sum(dtype=jnp.int32)
        finite = jnp.where(jnp.isfinite(x), x, 0.0)
        top = jnp.maximum(jnp.abs(finite[0]), jnp.abs(finite).max())
        unit = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(top > 0, top, 1.0))))
        unit = jnp.where(unit < top, 2 * unit, unit)
        fixed = jnp.round(finite / unit * 2**23).astype(jnp.int32) + 2**23
        fixed = jnp.pad(fixed.astype(jnp.uint32), (0, -x.size % _BLOCK))
        fixed = fixed.reshape(-1, _BLOCK)
        return cls(x, size, fixed, _sums_before(fixed), unit)

    def sums(self, end: jax.Array) -> jax.Array:
        """``uint32[3, E]``: sums of the first ``end[e]`` fixed values, in limbs."""
        block = jnp.minimum(end // _BLOCK, self.fixed.shape[0] - 1)
        place = jnp.arange(_BLOCK, dtype=jnp.int32)
        inside = place[None] < (end - block * _BLOCK)[:, None]
        part = jnp.where(inside, self.fixed[block], jnp.uint32(0))
        return self.before[:, block] + _limbs(part)

    def means(self, end: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Means and counts of the runs that end at ``end[e]``, the first at 0."""
        start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
        count = end - start
        limbs = (self.sums(end) - self.sums(start)).astype(jnp.int32)  # May be below 0.
        low, middle, high = limbs.astype(jnp.float32)
        total = low + 2.0**16 * middle + 2.0**32 * high
        mean = total / jnp.maximum(count, 1).astype(jnp.float32) - 2.0**23
        return mean * 2.0**-23 * self.unit, count


def _limbs(part: jax.Array) -> jax.Array:
    """``uint32[3, ...]``: sums along the last axis of numbers up to 2^24."""
    low = (part & jnp.uint32(0xFFF)).sum(-1, dtype=jnp.uint32)
    high = (part >> jnp.uint32(12)).sum(-1, dtype=jnp.uint32)
    # low + 2^12 high, each below 2^25, as limbs of 16 bits.
    first = low + ((high & jnp.uint32(0xF)) << jnp.uint32(12))
    rest = (high >> jnp.uint32(4)) + (first >> jnp.uint32(16))
    mask = jnp.uint32(0xFFFF)
    return jnp.stack([first & mask, rest & mask, rest >> jnp.uint32(16)])


def _sums_before(fixed: jax.Array) -> jax.Array:
    sums = jnp.cumsum(_limbs(fixed), axis=1, dtype=jnp.uint32)
    return jnp.pad(sums, ((0, 0), (1, 0)))


def nearest(w: jax.Array, entries: jax.Array) -> jax.Array:
    """``uint8`` codes of the nearest entries: of two the lower, of equals the first.

    Args:
      w: ``float[...]``.
      entries: ``float32[E]``, in any order.
    """
    order = jnp.argsort(entries, stable=True)
    ascending = entries[order]
    middle = (ascending[1:] + ascending[:-1]) / 2
    found = jnp.searchsorted(middle, w.astype(jnp.float32), side="left")
    first = jnp.searchsorted(ascending, ascending, side="left")
    return order[first[found]].astype(jnp.uint8)


@functools.partial(
    jax.jit, static_argnames=("entries", "init", "iterations", "keep_zero")
)
def cluster_scalars(
    w: jax.Array,
    *,
    entries: int,
    init: Init,
    iterations: int,
    key: jax.Array | None = None,
    keep_zero: bool = True,
) -> jax.Array:
    """k-means of the entries of an array that are not zero.

    Args:
      w: ``float[...]``, finite.
      entries: E, how many centroids, up to 256. Static.
      init: Where they start. Static.
      iterations: Of Lloyd's algorithm, at most. Static.
      key: Decides random seeds.
      keep_zero: Whether zero, if it is among fewer than E distinct values, is a
        centroid too. Static.

    Returns:
      ``float32[E]`` ascending centroids; those to which no value is nearest repeat the
      last. The same bits on any number of devices: sums are integers. Up to E distinct
      values are their own centroids.
    """
    values = Values.of(w)
    distinct, all_distinct = _distinct(values, entries)
    start = _start(values, entries, init, key)
    found = _lloyd(values, start.astype(jnp.float32), iterations)
    found = jnp.where(all_distinct, distinct, found)
    found = found.astype(w.dtype).astype(jnp.float32)
    found, used = _used_first(values, found)
    room = all_distinct & (used < entries) & (w == 0).any() & keep_zero
    return jnp.sort(found.at[-1].set(jnp.where(room, 0.0, found[-1])))


def _distinct(values: Values, entries: int) -> tuple[jax.Array, jax.Array]:
    """The first E distinct values, the last repeated; and whether these are all."""

    def step(place: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        here = values.x[jnp.clip(place, 0, values.size - 1)]
        after = jnp.searchsorted(values.x, here, side="right").astype(jnp.int32)
        return jnp.where(place < values.size, after, place), here

    end, found = jax.lax.scan(step, jnp.int32(0), None, length=entries)
    return jnp.where(values.size > 0, found, 0.0), end >= values.size


def _start(
    values: Values, entries: int, init: Init, key: jax.Array | None
) -> jax.Array:
    """Ascending starts ``float32[E]``."""
    x = jnp.where(values.size > 0, values.x, 0.0)
    last = jnp.maximum(values.size - 1, 0)
    parts = (np.arange(entries, dtype=np.float32) + 0.5) / entries
    at = lambda fraction: x[(fraction * last.astype(jnp.float32)).astype(jnp.int32)]
    match init:
        case "linear":
            ends = np.linspace(0, 1, entries, dtype=np.float32)
            start = x[0] * (1 - ends) + x[last] * ends
        case "density":
            start = at(parts)
        case "random":
            assert key is not None
            start = at(jax.random.uniform(key, (entries,)))
        case "kmeans++":
            assert key is not None
            start = _seeds(at, entries, key)
        case "optimal":
            shape = jax.ShapeDtypeStruct((entries,), jnp.float32)
            start = jax.pure_callback(
                lambda x, n: optimal_entries(np.asarray(x)[: int(n)], entries),
                shape,
                x,
                values.size,
                vmap_method="sequential",
            )
    return jnp.sort(jnp.where(values.size > 0, start, 0.0))


def _seeds(at: Any, entries: int, key: jax.Array) -> jax.Array:
    """k-means++ in a stratified sample, each value drawn by its squared distance."""
    own, draws = jax.random.split(key)
    noise = jax.random.uniform(own, (_SAMPLE,))
    sample = at((jnp.arange(_SAMPLE, dtype=jnp.float32) + noise) / _SAMPLE)

    def step(distance: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = jnp.cumsum(distance)
        place = jnp.searchsorted(total, jax.random.uniform(key) * total[-1])
        seed = sample[jnp.minimum(place, _SAMPLE - 1)]
        return jnp.minimum(distance, jnp.square(sample - seed)), seed

    keys = jax.random.split(draws, entries)
    return jax.lax.scan(step, jnp.ones_like(sample), keys)[1]


def _ends(values: Values, entries: jax.Array) -> jax.Array:
    """``int32[E]``: where in the sorted values the run of each entry ends."""
    middle = (entries[1:] + entries[:-1]) / 2
    ends = jnp.searchsorted(values.x, middle, side="right").astype(jnp.int32)
    return jnp.append(jnp.minimum(ends, values.size), values.size)


def _lloyd(values: Values, start: jax.Array, iterations: int) -> jax.Array:
    """Means of the nearest values, until no value changes its entry."""

    def go_on(state: tuple[jax.Array, ...]) -> jax.Array:
        step, _, before, ends = state
        return (step < iterations) & (ends != before).any()

    def iterate(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, entries, _, ends = state
        means, count = values.means(ends)
        entries = jnp.where(count > 0, means, entries)
        entries = _revived(values, entries, ends, count)
        return step + 1, entries, ends, _ends(values, entries)

    ends = _ends(values, start)
    state = jnp.int32(0), start, jnp.full_like(ends, -1), ends
    return jax.lax.while_loop(go_on, iterate, state)[1]


def _revived(
    values: Values, entries: jax.Array, ends: jax.Array, count: jax.Array
) -> jax.Array:
    """Entries without values move to the values that are farthest from theirs."""
    last = jnp.maximum(ends - 1, 0)
    low, high = values.x[jnp.minimum(ends - count, last)], values.x[last]
    upper = high - entries >= entries - low
    distance = jnp.where(upper, high - entries, entries - low)
    far = jnp.argsort(jnp.where(count > 0, -distance, jnp.inf), stable=True)
    rank = jnp.cumsum(count == 0, dtype=jnp.int32) - 1
    candidate = jnp.where(upper, high, low)[far][jnp.maximum(rank, 0)]
    moved = (count == 0) & (-jnp.sort(-distance)[jnp.maximum(rank, 0)] > 0)
    return jnp.sort(jnp.where(moved, candidate, entries))


def _used_first(values: Values, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ascending entries to which a value is nearest, the last repeated; how many."""
    entries = jnp.sort(entries)
    ends = _ends(values, entries)
    kept = jnp.diff(ends, prepend=jnp.int32(0)) > 0
    used = kept.sum(dtype=jnp.int32)
    entries = jnp.sort(jnp.where(kept, entries, jnp.inf))
    entries = jnp.where(used > 0, entries, 0.0)
    last = entries[jnp.maximum(used - 1, 0)]
    return jnp.where(jnp.isfinite(entries), entries, last), used
