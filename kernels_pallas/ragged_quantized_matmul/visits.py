"""Which blocks of rows meet which experts: the work list of a ragged matmul."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """One entry for each pair of a block of rows and an expert that has rows there.

    Ordered by block, and by expert within. The list has a static length, that of the
    worst case; entries past `there` repeat the last one.

    Attributes:
      block: ``int32[V]``.
      expert: ``int32[V]``.
      start: ``int32[E]``: first row of each expert.
      end: ``int32[E]``: row after its last.
      there: ``int32[1]``: visits that there are.
    """

    block: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array
    there: jax.Array


def visits(group_sizes: jax.Array, *, rows: int, block: int) -> Visits:
    """The visits of ``rows`` rows in blocks.

    Args:
      group_sizes: ``int32[E]``: rows of each expert, in order.
      rows: All rows. Static.
      block: Rows a block. Static.

    Examples:
      >>> found = visits(jnp.array([3, 0, 2]), rows=6, block=2)
      >>> found.block.tolist(), found.expert.tolist(), found.there.item()
      ([0, 1, 1, 2, 2], [0, 0, 2, 2, 2], 4)
    """
    experts = group_sizes.shape[0]
    # Experts share a block at most once for each expert but the first.
    length = -(-rows // block) + experts - 1
    end = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), end[:-1]])
    first = start // block
    counts = jnp.where(end > start, (end - 1) // block - first + 1, 0)
    done = jnp.cumsum(counts)
    index = jnp.minimum(jnp.arange(length, dtype=jnp.int32), done[-1] - 1)
    index = jnp.maximum(index, 0)
    expert = jnp.searchsorted(done, index, side="right").astype(jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    place = index - (done - counts)[expert]
    return Visits(first[expert] + place, expert, start, end, done[-1:])


def own_rows(found: Visits, visit: jax.Array, *, block: int) -> jax.Array:
    """``bool[block, 1]``: the rows of a visit's block that are its expert's."""
    expert = found.expert[visit]
    row = found.block[visit] * block + jnp.arange(block, dtype=jnp.int32)[:, None]
    inside = (row >= found.start[expert]) & (row < found.end[expert])
    return inside & (visit < found.there[0])
