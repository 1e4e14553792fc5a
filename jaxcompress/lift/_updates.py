"""Writes into a part of a weight, which stays compressed: key-value caches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Place
from jaxcompress.lift._tracked import Tracked


def leading_axes(new: Any, old: tuple[int, ...]) -> int:
    """One more than the last axis that is cut."""
    cut = [i for i, (a, b) in enumerate(zip(new, old, strict=True)) if a != b]
    return cut[-1] + 1 if cut else 0


def dynamic_update_slice(
    eqn: Any, w: Tracked, update: jax.Array, *starts: jax.Array
) -> Tracked:
    """Encode the update alone, and write its components at the same place."""
    del eqn
    axes = leading_axes(update.shape, w.shape)

    zero = jnp.zeros_like(starts[0])

    def write(a: jax.Array, part: jax.Array) -> jax.Array:
        rest = (zero,) * (a.ndim - axes)
        return jax.lax.dynamic_update_slice(a, part, (*starts[:axes], *rest))

    def read(a: jax.Array) -> jax.Array:
        shared = [n == 1 for n in a.shape[:axes]]
        first = [zero if one else i for i, one in zip(starts, shared, strict=False)]
        sizes = [1 if one else n for n, one in zip(update.shape, shared, strict=False)]
        rest = (zero,) * (a.ndim - axes)
        return jax.lax.dynamic_slice(a, (*first, *rest), (*sizes, *a.shape[axes:]))

    return _write(w, update, Place(axes, write, read))


def scatter(eqn: Any, w: Tracked, indices: jax.Array, updates: jax.Array) -> Tracked:
    """``w.at[i].set(updates)`` of whole trailing axes; indices must not repeat."""
    numbers = eqn.params["dimension_numbers"]
    window = tuple(numbers.update_window_dims)
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    seen = [i for i in range(len(w.shape)) if i not in gone]
    sizes = {i: updates.shape[n] for i, n in zip(seen, window, strict=True)}
    partial = {i for i, n in sizes.items() if n != w.shape[i]}
    axes = max(gone | partial | {*numbers.scatter_dims_to_operand_dims}, default=-1) + 1
    lead = updates.ndim - (len(w.shape) - axes)
    trailing = tuple(range(lead, updates.ndim))
    if window[len(window) - len(trailing) :] != trailing:
        return NotImplemented

    def write(a: jax.Array, part: jax.Array) -> jax.Array:
        kept = window[: len(window) - len(trailing)]
        dims = (*kept, *range(lead, lead + a.ndim - axes))
        return jax.lax.scatter(
            a,
            indices,
            part,
            numbers._replace(update_window_dims=dims),
            indices_are_sorted=eqn.params["indices_are_sorted"],
            unique_indices=eqn.params["unique_indices"],
            mode=eqn.params["mode"],
        )

    def read(a: jax.Array) -> jax.Array:
        if any(n != 1 for n in a.shape[:axes]):
            return NotImplemented  # It would have to be gathered.
        return a.reshape((1,) * lead + a.shape[axes:])

    return _write(w, updates, Place(axes, write, read))


def _write(w: Tracked, update: jax.Array, place: Place) -> Tracked:
    """Write an update into a compressed array, in its own format."""
    if not w.compressed:
        return NotImplemented
    value = w.value.written(update, place)
    if value is NotImplemented:
        return NotImplemented
    return dataclasses.replace(w, value=value)
