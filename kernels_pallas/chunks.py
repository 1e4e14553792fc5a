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
    head, tail = _cut(rows, at_once)
    parts = []
    if head is not None:
        y = jax.lax.map(f, head)
        parts.append(y.reshape(-1, *y.shape[2:]))
    if tail is not None:
        parts.append(f(tail))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def sum_rows(f: Callable[[T], Any], rows: T, at_once: int) -> Any:
    """``f(rows)``, for an `f` that sums over rows, `at_once` of them at a time.

    Args:
      f: From arrays of n rows to a pytree of sums over them, for any n.
      rows: As for `map_rows`.
      at_once: How many rows. Static.
    """
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    head, tail = _cut(rows, at_once)
    if head is None:
        return f(rows)
    first = jax.tree.map(lambda a: a[0], head)
    rest = jax.tree.map(lambda a: a[1:], head)
    total, _ = jax.lax.scan(lambda t, part: (add(t, f(part)), None), f(first), rest)
    return total if tail is None else add(total, f(tail))


def _cut(rows: T, at_once: int) -> tuple[T | None, T | None]:
    """Whole chunks ``[count, at_once, ...]`` if there are several, and the rest."""
    n = len(jax.tree.leaves(rows)[0])
    count = n // at_once
    if n <= at_once:
        return None, rows
    split = lambda a: a[: count * at_once].reshape(count, at_once, *a.shape[1:])
    rest = jax.tree.map(lambda a: a[count * at_once :], rows)
    return jax.tree.map(split, rows), rest if n % at_once else None
