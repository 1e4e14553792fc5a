"""The k smallest scores, exactly, by counting: no sort, and the same on any mesh.

Scores are unsigned integers, so the k-th smallest is found one bit at a time, from
the highest, by asking how many scores lie below a candidate. Each question is one
sum, which XLA shards as it would any reduction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

_FRACTION_BITS = 24


def count_of(sparsity: Any, n: int) -> jax.Array:
    r"""How many of `n` weights a sparsity prunes.

    .. math:: k = \lfloor \bar{s} n + 1/2 \rfloor, \quad
              \bar{s} = \operatorname{round}(2^{24} s) / 2^{24}

    Args:
      sparsity: Number or ``float32[]``, static or traced; clipped to ``[0, 1]``.
      n: Number of weights, below ``2**32``. Static.

    Returns:
      ``uint32[]``, computed in integers: the same traced or not, at any size.

    Examples:
      >>> int(count_of(0.9, 10)), int(count_of(0.25, 2)), int(count_of(0.5, 3))
      (9, 1, 2)
    """
    s = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    m = jnp.round(s * 2**_FRACTION_BITS).astype(jnp.uint32)
    # m * n needs up to 56 bits: multiply 13 + 12 bits by 16 + 16 bits, in uint32.
    m_high, m_low = m >> 12, m & 0xFFF
    n_high, n_low = jnp.uint32(n >> 16), jnp.uint32(n & 0xFFFF)
    a, b, c, d = m_high * n_high, m_high * n_low, m_low * n_high, m_low * n_low
    below = ((b & 0xFFF) << 12) + ((c & 0xFF) << 16) + (d & 0xFFFFFF)
    carry = (below + 2 ** (_FRACTION_BITS - 1)) >> _FRACTION_BITS
    return (a << 4) + (b >> 12) + (c >> 8) + (d >> _FRACTION_BITS) + carry


def kth_smallest(
    scores: Sequence[jax.Array], k: jax.Array, *, stack: int, bits: int = 32
) -> jax.Array:
    """The k-th smallest score, counting from one; for ``k = 0``, zero.

    Args:
      scores: ``uint32[*stack, ...]`` arrays that are ranked together.
      k: ``uint32[]`` or ``uint32[*stack]``.
      stack: Number of leading axes along which slices are ranked apart. Static.
      bits: Scores are below ``2**bits``. Static.

    Returns:
      ``uint32[*stack]``, after `bits` passes over the scores.
    """
    lead = scores[0].shape[:stack]
    k = jnp.broadcast_to(k, lead)

    def try_bit(i: Any, found: jax.Array) -> jax.Array:
        bit = jnp.uint32(bits - 1) - jnp.asarray(i, jnp.uint32)
        candidate = found | (jnp.uint32(1) << bit)
        below = sum(
            (_count(s < _over(candidate, s), stack) for s in scores),
            jnp.zeros(lead, jnp.uint32),
        )
        return jnp.where(below < k, candidate, found)

    return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros(lead, jnp.uint32))


def smallest(
    scores: Sequence[jax.Array], k: jax.Array, *, stack: int = 0
) -> list[jax.Array]:
    """True at the `k` smallest scores of each slice.

    Args:
      scores: ``uint32[*stack, ...]`` arrays that are ranked together.
      k: ``uint32[]``: how many to mark in each slice. May be traced.
      stack: Number of leading axes along which slices are ranked apart. Static.

    Returns:
      A boolean array for each array of scores, with exactly `k` true in each slice
      of them all. Equal scores are taken in order of the arrays, then of the
      elements in row-major order.
    """
    kth = kth_smallest(scores, k, stack=stack)
    below = [s < _over(kth, s) for s in scores]
    left = k - sum((_count(b, stack) for b in below), jnp.zeros(kth.shape, jnp.uint32))
    marked = []
    for s, b in zip(scores, below, strict=True):
        tied = s == _over(kth, s)
        marked.append(b | _first(tied, left, stack))
        left = left - jnp.minimum(left, _count(tied, stack))
    return marked


def _first(chosen: jax.Array, count: jax.Array, stack: int) -> jax.Array:
    """The first `count` of the chosen elements of each slice, in row-major order."""
    index = _linear_index(chosen.shape, stack)
    n = math.prod(chosen.shape[stack:])
    # Elements that are not chosen rank behind all that are.
    rank = jnp.where(chosen, index, jnp.uint32(n))
    last = kth_smallest([rank], count, stack=stack, bits=n.bit_length())
    return chosen & (index <= _over(last, index)) & (_over(count, index) > 0)


def _linear_index(shape: tuple[int, ...], stack: int) -> jax.Array:
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in range(len(shape) - 1, stack - 1, -1):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def _count(x: jax.Array, stack: int) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(stack, x.ndim)), dtype=jnp.uint32)


def _over(a: jax.Array, like: jax.Array) -> jax.Array:
    """`a`, of the stack axes, with axes of size one for the others of `like`."""
    return jnp.expand_dims(a, tuple(range(a.ndim, like.ndim)))
