"""Which scores are the lowest: exact, without a sort, on sharded arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def rank(score: jax.Array) -> jax.Array:
    """``uint32`` in the order of ``float32`` scores; both zeros rank alike.

    The bit patterns of positive floats, as integers, are in the order of their values,
    those of negative ones in the opposite order. NaN does not occur.
    """
    bits = jax.lax.bitcast_convert_type(score, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, jnp.uint32(0), bits)
    return jnp.where(bits >= sign, ~bits, bits | sign)


@functools.partial(jax.jit, static_argnames="stack")  # One compilation a shape.
def lowest(
    ranks: Sequence[jax.Array], count: jax.Array, *, stack: int = 0
) -> list[jax.Array]:
    """Mark exactly the `count` lowest entries of several arrays taken together.

    The threshold is found by bisection on the 32 bits of the ranks: 32 passes of
    counts, which XLA runs where the shards are; nothing of the size of the weights
    moves. Entries equal to the threshold are taken in order of array and position,
    found by bisection too, so the result does not depend on devices.

    Args:
      ranks: ``uint32[*stack, ...]`` arrays.
      count: ``int32[*stack]`` entries to mark (traced or not).
      stack: Leading axes whose entries are ranked apart from each other.

    Returns:
      Boolean arrays, true at the marked entries.

    Examples:
      >>> lowest([jnp.array([3, 1, 2, 1], jnp.uint32)], jnp.array(2))[0].tolist()
      [False, True, False, True]
    """
    shape = ranks[0].shape[:stack]
    count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), shape)
    threshold = _reached([(r, jnp.ones_like(r, bool)) for r in ranks], count, stack)
    below = [r < _spread(threshold, r) for r in ranks]
    missing = count - sum(_total(m, stack) for m in below)
    marked = []
    for r, under in zip(ranks, below, strict=True):
        ties = r == _spread(threshold, r)
        taken = _first(ties, missing, stack)
        missing = missing - _total(taken, stack)
        marked.append(under | taken)
    return marked


def _first(among: jax.Array, count: jax.Array, stack: int) -> jax.Array:
    """Mark the first `count` true entries of a mask, or all there are."""
    whole = jnp.ones_like(count) * math.prod(among.shape[stack:])
    position = _positions(among.shape, stack)

    def search() -> jax.Array:
        return _reached([(position, among)], count, stack).astype(jnp.int32)

    # Ties seldom have to be split: a whole array of them is taken or left.
    split = jnp.any((count > 0) & (count < _total(among, stack)))
    last = jax.lax.cond(split, search, lambda: whole)
    last = jnp.where(count > 0, last, -1)
    return among & (position.astype(jnp.int32) <= _spread(last, among))


def _positions(shape: tuple[int, ...], stack: int) -> jax.Array:
    """``uint32`` position of every entry within its stack entry."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(stack, len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += index * jnp.uint32(stride)
    return position


def _reached(
    ranked: Sequence[tuple[jax.Array, jax.Array]], count: jax.Array, stack: int
) -> jax.Array:
    """The largest rank that fewer than `count` of the entries marked lie below."""

    def step(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        below = sum(_total(m & (r < _spread(candidate, r)), stack) for r, m in ranked)
        return jnp.where(below < count, candidate, low)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros(count.shape, jnp.uint32))


def _total(mask: jax.Array, stack: int) -> jax.Array:
    return mask.sum(tuple(range(stack, mask.ndim)), dtype=jnp.int32)


def _spread(a: jax.Array, like: jax.Array) -> jax.Array:
    """One value a stack entry, to broadcast against an array."""
    return a.reshape(a.shape + (1,) * (like.ndim - a.ndim))
