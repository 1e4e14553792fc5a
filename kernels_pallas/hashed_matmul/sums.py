"""Sums by index that do not depend on the order of addition."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_WORD = 30
"""Bits of an int32 that a sum may use."""


def exact_sums(values: jax.Array, index: jax.Array, count: int) -> jax.Array:
    r"""Sum values by index, in fixed point: the same bits in any order.

    Two integers of `b` bits stand for each value, few enough that the index with most
    values, `load` of them, does not overflow:

    .. math:: b = 30 - \lceil \log_2 load \rceil

    Args:
      values: ``float32[*places, width]``.
      index: ``int32[*places]`` from 0 to `count`.
      count: Sums. Static.

    Returns:
      ``float32[count, width]``. The mean of an index errs by at most
      ``max|values| * 2**(-2 b)``, and a sum by float32 rounding besides. Values that
      are not finite leave no sum finite.

    Examples:
      >>> values = jnp.array([[3.0], [0.25], [-1.0]])
      >>> exact_sums(values, jnp.array([1, 0, 1]), 2).tolist()
      [[0.25], [2.0]]
    """
    width = values.shape[-1]
    index, flat = index.reshape(-1), values.reshape(-1, width)
    add = lambda a: jnp.zeros((count, *a.shape[1:]), jnp.int32).at[index].add(a)
    load = add(jnp.ones(index.shape, jnp.int32)).max(initial=1)
    bits = _WORD - jnp.int32(jnp.ceil(jnp.log2(load.astype(jnp.float32))))
    largest = jnp.abs(flat).max(initial=0.0)
    _, exponent = jnp.frexp(largest)
    whole = jnp.ldexp(flat, bits - exponent)
    high = jnp.round(whole)
    low = jnp.round(jnp.ldexp(whole - high, bits))
    sums = add(jnp.concatenate([high, low], axis=1).astype(jnp.int32))
    high, low = (s.astype(jnp.float32) for s in jnp.split(sums, 2, axis=1))
    total = jnp.ldexp(high + jnp.ldexp(low, -bits), exponent - bits)
    return total + (largest - largest)
