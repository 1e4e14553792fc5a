"""Which scores are the lowest: exact, without a sort, on sharded arrays."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def magnitude_rank(w: jax.Array) -> jax.Array:
    """``uint32`` that orders weights by magnitude.

    The bit patterns of positive floats, as integers, are in the order of their
    values; infinities and NaN do not occur.
    """
    return jax.lax.bitcast_convert_type(jnp.abs(w.astype(jnp.float32)), jnp.uint32)


def lowest(
    ranks: Sequence[jax.Array], count: jax.Array, *, stack: int = 0
) -> list[jax.Array]:
    """Mark exactly the `count` lowest entries of several arrays taken together.

    The threshold is found by bisection on the 32 bits of the ranks: 32 passes of
    counts, which XLA runs where the shards are. Entries equal to the threshold are
    taken in order of array and position, so the result does not depend on devices.

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

    def total(marks: list[jax.Array]) -> jax.Array:
        axes = [tuple(range(stack, m.ndim)) for m in marks]
        sums = [m.sum(a, dtype=jnp.int32) for m, a in zip(marks, axes, strict=True)]
        return jnp.stack(sums).sum(0)

    def spread(a: jax.Array, like: jax.Array) -> jax.Array:
        return a.reshape(shape + (1,) * (like.ndim - stack))

    def step(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        below = total([r < spread(candidate, r) for r in ranks])
        return jnp.where(below < count, candidate, low)

    # The largest rank that fewer than `count` entries lie below: the threshold.
    threshold = jax.lax.fori_loop(0, 32, step, jnp.zeros(shape, jnp.uint32))
    below = [r < spread(threshold, r) for r in ranks]
    missing = count - total(below)
    marked = []
    for r, under in zip(ranks, below, strict=True):
        ties = r == spread(threshold, r)
        flat = ties.reshape(*shape, -1)
        order = jnp.cumsum(flat, axis=-1, dtype=jnp.int32).reshape(r.shape)
        marked.append(under | (ties & (order <= spread(missing, r))))
        missing = missing - flat.sum(-1, dtype=jnp.int32)
    return marked
