"""Arrays some of whose positions were removed, and which."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Kept = tuple[bool, ...] | None
"""For every position that an axis had, whether it is there still; None: all are."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sized:
    """An array in the place of a larger one.

    Attributes:
      array: What is left of it.
      kept: Of every axis. Where the layers of a stack lost other positions each: those
        of its first layer, which stand for the others'.
    """

    array: jax.Array
    kept: tuple[Kept, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def whole(cls, array: jax.Array) -> Sized:
        """An array that lost nothing."""
        return cls(array, (None,) * np.ndim(array))

    def cut(self, axis: int, kept: Kept) -> Sized:
        """Without those positions of an axis that `kept` leaves out."""
        mine = self.kept[axis]
        if kept is None or kept == mine:
            return self
        places = np.flatnonzero(np.array(kept)[there(mine, len(kept))])
        array = take(self.array, places, axis)
        return Sized(array, (*self.kept[:axis], kept, *self.kept[axis + 1 :]))

    def cut_all(self, kept: Sequence[Kept]) -> Sized:
        """The same along every axis."""
        result = self
        for axis, k in enumerate(kept):
            result = result.cut(axis, k)
        return result


def there(kept: Kept, size: int) -> np.ndarray:
    """``bool[size]``: the positions that are left."""
    return np.ones(size, bool) if kept is None else np.array(kept)


def as_kept(left: np.ndarray) -> Kept:
    """The kept positions of a mask."""
    return None if left.all() else tuple(left.tolist())


def both(*kept: Kept) -> Kept:
    """The positions that are left in all of several equal axes."""
    given = [k for k in kept if k is not None]
    if not given:
        return None
    return as_kept(np.logical_and.reduce([np.array(k) for k in given]))


def take(a: jax.Array, places: np.ndarray, axis: int) -> jax.Array:
    """Positions of an axis, in order; a slice where they are consecutive."""
    if len(places) and places[-1] - places[0] + 1 == len(places):
        return jax.lax.slice_in_dim(a, places[0], places[-1] + 1, axis=axis)
    return jnp.take(a, jnp.asarray(places, jnp.int32), axis=axis, mode="clip")
