"""Rows of a weight a few at a time, so that what is made of them stays in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def map_rows(f: Callable[[T], jax.Array], rows: T, at_once: int) -> jax.Array:
    """``f(rows)``, for an `f` that treats rows apart, `at_once` of them at a time.

    Args:
      f: From arrays of n rows to an array of n rows, for any n.
      rows: A pytree of arrays with the same leading axis.
      at_once: How many rows. Static.
    """
    count, rest = divmod(_length(rows), at_once)
    if count + (rest > 0) <= 1:
        return f(rows)
    if not rest:
        split = lambda a: a.reshape(count, at_once, *a.shape[1:])
        return _merge(jax.lax.map(f, jax.tree.map(split, rows)))
    part = lambda i: f(_cut(rows, i * at_once, at_once))
    y = _merge(jax.lax.map(part, jnp.arange(count)))
    return jnp.concatenate([y, f(_tail(rows, rest))])


def sum_rows(f: Callable[[T], Any], rows: T, at_once: int) -> Any:
    """``f(rows)``, for an `f` that sums over rows, `at_once` of them at a time.

    Args:
      f: From arrays of n rows to a pytree of sums over them, for any n.
      rows: As for `map_rows`.
      at_once: How many rows. Static.
    """
    count, rest = divmod(_length(rows), at_once)
    if count + (rest > 0) <= 1:
        return f(rows)
    add = lambda total, part: jax.tree.map(jnp.add, total, f(part))
    step = lambda i, total: add(total, _cut(rows, i * at_once, at_once))
    total = jax.lax.fori_loop(1, count, step, f(_cut(rows, 0, at_once)))
    return add(total, _tail(rows, rest)) if rest else total


def _merge(y: jax.Array) -> jax.Array:
    return y.reshape(-1, *y.shape[2:])


def _length(rows: Any) -> int:
    return len(jax.tree.leaves(rows)[0])


def _cut(rows: T, start: Any, length: int) -> T:
    """Sliced where they are used: no copy of the whole."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, length), rows)


def _tail(rows: T, length: int) -> T:
    return jax.tree.map(lambda a: a[a.shape[0] - length :], rows)
