"""A weight that a sweep has not reached yet, on its way through the program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import (
    FROZEN,
    WEIGHT,
    Cast,
    LayoutOp,
    Leaf,
    Reshape,
    Transpose,
    component,
    leaf_type,
    relayout,
    relayout_array,
    static,
)


@leaf_type
class Pending(Leaf):
    """A dense weight that remembers what was done to it since it was a parameter.

    A sweep compresses it where it is used, in its own orientation, and then repeats
    the layout operations on the compressed leaf.

    Attributes:
      value: The weight, or the entries of its stack that a slice has left, in the
        parameter's own axes.
      index: ``int32[*lead]``: which entry of the stack each is, counting along the
        first `depth` axes of the parameter.
      depth: How many of the parameter's leading axes have been sliced or led.
      ops: Layout operations since, on the axes after ``lead``.
    """

    value: jax.Array = component(role=WEIGHT)
    index: jax.Array = component(role=FROZEN)
    depth: int = static(default=0)
    ops: tuple[LayoutOp, ...] = static(default=())

    @classmethod
    def of(cls, w: jax.Array) -> Pending:
        """A parameter, whole."""
        return cls(value=w, index=jnp.zeros((), jnp.int32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, after the layout operations."""
        lead = self.index.ndim
        shape = tuple(self.value.shape[lead:])
        for op in self.ops:
            shape = _shape_after(op, shape)
        return (*self.value.shape[:lead], *shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        casts = [op.dtype for op in self.ops if isinstance(op, Cast)]
        return np.dtype(casts[-1] if casts else self.value.dtype)

    @property
    def method(self) -> str:
        """Nothing was done to it."""
        return "dense"

    def materialize(self) -> jax.Array:
        """The dense array, after the layout operations."""
        w = self.value
        for op in self.ops:
            w = relayout_array(w, _with_lead(op, w.shape[: self.index.ndim]))
        return w

    def relayout(self, op: LayoutOp) -> Leaf:
        """Note the operation; one that drops a lead of ones needs no note."""
        lead = self.index.ndim
        drops_lead = isinstance(op, Reshape) and tuple(op.shape) == self.shape[lead:]
        if drops_lead and lead and self.index.size == 1:
            value = self.value.reshape(self.value.shape[lead:])
            return self.replace(value=value, index=self.index.reshape(()))
        rest = _without_lead(op, self.shape, self.index.ndim)
        return rest if rest is NotImplemented else self.replace(ops=(*self.ops, rest))

    def stacked(self, ndim: int) -> Leaf:
        """Count the first axes as entries of a stack."""
        lead = self.index.ndim
        if ndim <= lead:
            return self
        ops, shape = [], self.shape[lead:]
        for op in self.ops:
            rest = _without_lead(op, shape, ndim - lead)
            if rest is NotImplemented:
                return NotImplemented
            ops.append(rest)
            shape = _shape_after(op, shape)
        extra = self.value.shape[lead:ndim]
        n = math.prod(extra)
        index = self.index.reshape(*self.index.shape, *(1,) * len(extra)) * n
        index = index + jnp.arange(n, dtype=jnp.int32).reshape(*(1,) * lead, *extra)
        return self.replace(index=index, depth=self.depth + len(extra), ops=tuple(ops))

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Pending:
        """The weight's own, unless layout operations have moved its axes."""
        del sizes
        if any(not isinstance(op, Cast) for op in self.ops):
            raise ValueError("Pending: sharding after a layout operation is not kept.")
        lead = PartitionSpec(*spec[: self.index.ndim])
        return self.replace(value=PartitionSpec(*spec), index=lead)

    def repeat_on(self, leaf: Leaf) -> Any:
        """The compressed weight after the same operations; dense where it cannot."""
        value: Any = leaf
        for op in self.ops:
            moved = relayout(value, op)
            if moved is NotImplemented:
                moved = relayout_array(value.materialize(), op)
            value = moved
        return value


def _shape_after(op: LayoutOp, shape: Sequence[int]) -> tuple[int, ...]:
    match op:
        case Transpose(permutation=permutation):
            return tuple(shape[p] for p in permutation)
        case Reshape(shape=new):
            return tuple(new)
        case Cast():
            return tuple(shape)


def _without_lead(op: LayoutOp, shape: Sequence[int], n: int) -> Any:
    """The operation on the axes after the first `n`, or NotImplemented."""
    match op:
        case Transpose(permutation=p):
            if p[:n] != tuple(range(n)):
                return NotImplemented
            return Transpose(permutation=tuple(i - n for i in p[n:]))
        case Reshape(shape=new):
            if tuple(new[:n]) != tuple(shape[:n]):
                return NotImplemented
            return Reshape(shape=tuple(new[n:]))
        case Cast():
            return op


def _with_lead(op: LayoutOp, lead: Sequence[int]) -> LayoutOp:
    """Undo `_without_lead`."""
    n = len(lead)
    match op:
        case Transpose(permutation=p):
            return Transpose(permutation=(*range(n), *(i + n for i in p)))
        case Reshape(shape=new):
            return Reshape(shape=(*lead, *new))
        case Cast():
            return op
