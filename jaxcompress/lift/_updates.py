"""Writes into a part of a weight, which stays compressed: key-value caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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

    def write(a: jax.Array, part: jax.Array) -> jax.Array:
        rest = (jnp.zeros_like(starts[0]),) * (a.ndim - axes)
        return jax.lax.dynamic_update_slice(a, part, (*starts[:axes], *rest))

    return _write(w, update, axes, write)


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

    return _write(w, updates, axes, write)


def _write(
    w: Tracked,
    update: jax.Array,
    axes: int,
    write: Callable[[jax.Array, jax.Array], jax.Array],
) -> Tracked:
    """Write the components of an encoded update into those of the weight."""
    if not w.compressed:
        return NotImplemented
    if w.value.stacked(axes) is not w.value:
        return NotImplemented  # Parts that share scales cannot be written apart.
    part = w.value.encode_like(update)
    if part is NotImplemented:
        return NotImplemented
    return dataclasses.replace(w, value=jax.tree.map(write, w.value, part))
