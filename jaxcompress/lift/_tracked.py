"""A weight on its way through a program, from the argument to where it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.layout import Axes, reshape_pieces
from jaxcompress.leaf import Cast, LayoutOp, Leaf, Reshape, Transpose, relayout
from jaxcompress.lift import _compat
from jaxcompress.tree import flatten, unflatten

EITHER = " | "
"""Joins the paths of weights of which a conditional chose one."""


class LiftError(ValueError):
    """A program that cannot run on compressed leaves as asked; names the weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tracked:
    """A weight, compressed or not, with where it came from.

    Attributes:
      value: The array or leaf, in the form the program now has it.
      path: Key path of the parameter.
      dims: For each axis of `value`, the axes of the parameter it is made of.
      rank: Rank of the parameter.
    """

    value: Any
    path: str = dataclasses.field(metadata={"static": True})
    dims: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})
    rank: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, value: Any, path: str) -> Tracked:
        """Start to track the parameter at `path`."""
        rank = len(value.shape)
        return cls(
            value=value, path=path, dims=tuple((i,) for i in range(rank)), rank=rank
        )

    @property
    def paths(self) -> list[str]:
        """The parameters it may be: more than one after a conditional."""
        return self.path.split(EITHER)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.value.dtype

    @property
    def compressed(self) -> bool:
        """Whether the value is a leaf."""
        return isinstance(self.value, Leaf)

    def dense(self) -> jax.Array:
        """The dense array."""
        return self.value.materialize() if self.compressed else self.value

    def relayout(self, op: LayoutOp) -> Tracked:
        """After a layout operation, or ``NotImplemented`` if a leaf cannot follow."""
        value = relayout(self.value, op)
        if value is NotImplemented:
            return NotImplemented
        match op:
            case Transpose(permutation=permutation):
                dims = tuple(self.dims[p] for p in permutation)
            case Reshape(shape=shape):
                dims = _reshape_dims(self.dims, self.shape, shape)
            case Cast():
                dims = self.dims
        return dataclasses.replace(self, value=value, dims=dims)

    def leading(
        self, f: Any, *, axes: int, dims: tuple[tuple[int, ...], ...]
    ) -> Tracked:
        """Apply `f` to the first `axes` axes of every component of the value.

        Args:
          f: A function of one array that acts on its leading axes only.
          axes: How many leading axes it acts on.
          dims: What the axes of the result are made of.

        Returns:
          The result, or ``NotImplemented`` if the leaf's components do not share
          those axes.
        """
        value = self.value
        if isinstance(value, Leaf):
            value = value.map_leading(f, axes)
            if value is NotImplemented:
                return NotImplemented
        else:
            value = f(value)
        return dataclasses.replace(self, value=value, dims=dims)

    def stacked(self, axes: int) -> Tracked:
        """With the first axes leading every component; or ``NotImplemented``."""
        if not isinstance(self.value, Leaf):
            return self
        value = self.value.stacked(axes)
        if value is NotImplemented:
            return NotImplemented
        return dataclasses.replace(self, value=value)

    def axes(self, contracted: Sequence[int], batch: Sequence[int] = ()) -> Axes | None:
        """Roles of the parameter's axes where these axes of the value are contracted.

        Returns:
          The axes, or None where a merge has mixed roles.
        """
        contract = [a for i in contracted for a in self.dims[i]]
        kept = {
            a
            for i, d in enumerate(self.dims)
            if i not in contracted and i not in batch
            for a in d
        }
        contract = sorted(set(contract))
        if not contract or kept & set(contract):
            return None
        stack = 0
        while stack < self.rank and stack not in kept and stack not in contract:
            stack += 1
        return Axes(contract=tuple(a - self.rank for a in contract), stack=stack)


def track(tree: Any, *, arrays: bool) -> Any:
    """Wrap the leaves of a pytree as `Tracked`, by path.

    Args:
      tree: Any pytree.
      arrays: Whether plain arrays are tracked too, or compressed leaves only.
    """
    flat, structure = flatten(tree)
    return unflatten(
        structure,
        {
            path: Tracked.of(leaf, path)
            if isinstance(leaf, Leaf) or (arrays and is_array(leaf))
            else leaf
            for path, leaf in flat.items()
        },
    )


def is_array(x: Any) -> bool:
    """Whether `x` has a shape and a dtype (abstract arrays included)."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def dense(x: Any) -> Any:
    """The dense array behind a tracked value; anything else as it is."""
    return x.dense() if isinstance(x, Tracked) else x


def is_tracked(x: Any) -> bool:
    """Whether `x` is a tracked weight; the `is_leaf=` of tree functions."""
    return isinstance(x, Tracked)


def _reshape_dims(
    dims: tuple[tuple[int, ...], ...], old: tuple[int, ...], new: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """What the axes after a reshape are made of; axes of size one carry nothing."""
    result: list[tuple[int, ...]] = [()] * len(new)
    for left, right in reshape_pieces(old, new):
        merged = tuple(a for i in left for a in dims[i])
        for j in right:
            result[j] = merged
    return tuple(result)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The dense abstract array that a leaf stands for when a function is traced."""
    return _compat.struct(tuple(x.shape), x.dtype, jax.tree.leaves(x))
