"""What the stored forms of pruned weights share."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.coded import CodedLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import Cast, LayoutOp, Leaf, OrderError, Ran, Traits
from jaxcompress.prune._masked import MaskedArray


class SparseLeaf(Leaf):
    """A leaf that stores only the elements that are kept, and where they are.

    The elements of a quantized weight are its codes, packed; the rest of that leaf
    (scales, zero points), its *frame*, is kept beside them.
    """

    frame: CodedLeaf | None
    layout: Layout
    dtype_name: str

    @property
    def traits(self) -> Traits:
        """A mask's; the matmul is the values' own."""
        return Traits(
            preserves_zeros=True,
            elementwise=True,
            own_matmul=self.frame is not None and self.frame.traits.own_matmul,
        )

    @abc.abstractmethod
    def expand(self) -> MaskedArray:
        """The training form: every element in its place."""

    @abc.abstractmethod
    def stored_again(self, masked: MaskedArray) -> Leaf:
        """Other values under the same mask."""

    @abc.abstractmethod
    def intersection(self, masked: MaskedArray) -> Leaf:
        """Values of which the mask of another sparse leaf leaves fewer."""

    @property
    @abc.abstractmethod
    def stack(self) -> int:
        """How many leading axes stack independent weights."""

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def kind(self) -> str:
        """That of the values: ``"dense"``, or the frame's method."""
        return "dense" if self.frame is None else self.frame.method

    def materialize(self) -> jax.Array:
        """The dense values."""
        return self.expand().materialize()

    def values(self) -> tuple[Any, ...]:
        """The dense values, if they are floats."""
        return self.expand().values()

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """`f` of the dense values, stored again under the same mask."""
        expanded = self.expand()
        if isinstance(expanded.inner, Leaf):
            return expanded.map_values(f)
        value = f(expanded.materialize())
        if isinstance(value, SparseLeaf):
            value = value.expand()
            mask = expanded.mask & value.mask
            return self.intersection(MaskedArray(inner=value.inner, mask=mask))
        if isinstance(value, Leaf) and not value.traits.elementwise:
            raise OrderError(
                f"{value.method} does not keep each weight where it is, so it would "
                "undo the mask; put it before the mask in the chain."
            )
        return self.stored_again(expanded.replace(inner=value))

    def relayout(self, op: LayoutOp) -> Leaf:
        """A cast keeps the storage; other operations expand it to a masked leaf."""
        if isinstance(op, Cast) and self.frame is None:
            wider = np.dtype(op.dtype).itemsize > self.dtype.itemsize
            return NotImplemented if wider else self.replace(dtype_name=op.dtype.name)
        return self.expand().relayout(op)

    def stacked(self, ndim: int) -> Leaf:
        """Itself if it was stored as a stack; else expanded."""
        return self if self.stack >= ndim else self.expand().stacked(ndim)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """As the training form."""
        return self.expand().dot_general(
            x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
        )

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the values do."""
        return x if self.frame is None else self.expand().prepare_activations(x, axes)


def join(dense: jax.Array, leaf: SparseLeaf) -> Any:
    """Undo `coded.split`: the array or quantized leaf of elements in storage order."""
    if leaf.frame is None:
        return leaf.layout.from_storage(dense).astype(leaf.dtype)
    return leaf.frame.with_elements(dense)


def specs_along(entries: Sequence[Any], tree: Any) -> Any:
    """Specs of components whose first axes are cut so, but for those of size one."""

    def along(a: jax.Array) -> PartitionSpec:
        sizes = a.shape[: len(entries)]
        return PartitionSpec(
            *(s if n > 1 else None for s, n in zip(entries, sizes, strict=True))
        )

    return jax.tree.map(along, tree)
