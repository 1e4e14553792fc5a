"""`BitmaskArray`: the stored form of a pruned weight.

One bit a weight says where the non-zeros are; their values lie together. The values
of a quantized weight are its codes, packed; the rest of that leaf (scales, zero
points) is kept beside them. A leaf that can be stored so has ``elements()`` (codes in
storage order), ``without_elements()``, ``with_elements(codes)`` and ``bits``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    FROZEN,
    Cast,
    LayoutOp,
    Leaf,
    OrderError,
    Ran,
    component,
    leaf_type,
    static,
)
from jaxcompress.prune._masked import MaskedArray
from kernels_pallas import packing


@leaf_type
class BitmaskArray(Leaf):
    """Positions as bits, non-zero elements together.

    Attributes:
      mask: ``uint8[*stack, *out, ceil(K / 8)]`` bits, in storage order.
      elements: ``[*stack, capacity]`` floats, or ``uint8`` packed codes, of the
        entries whose bit is set, in storage order; zero behind the last.
      frame: The quantized leaf without its codes, or None.
      layout: How the axes lie in storage.
      pad: Bits of padding at the end of each row of `mask`.
      capacity: Elements that a stack entry has room for.
      dtype_name: Logical dtype.
    """

    mask: jax.Array = component(role=FROZEN)
    elements: jax.Array = component(role=FROZEN)
    frame: Leaf | None = component(role=FROZEN, default=None)
    layout: Layout = static()
    pad: int = static()
    capacity: int = static()
    dtype_name: str = static()

    preserves_zeros = True
    elementwise = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.logical_shape((*self.mask.shape[:-1], self._k))

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def method(self) -> str:
        """``"bitmask"`` and the method of its values."""
        inner = "dense" if self.frame is None else self.frame.method
        return f"bitmask {inner}"

    @property
    def _k(self) -> int:
        return self.mask.shape[-1] * 8 - self.pad

    def expand(self) -> MaskedArray:
        """The training form: every element in its place."""
        kept = packing.unpack(self.mask, bits=1, count=self._k).astype(bool)
        stack = self.layout.stack_ndim(kept.ndim)
        rows = kept.reshape(*kept.shape[:stack], -1)
        place = jnp.maximum(jnp.cumsum(rows, axis=-1, dtype=jnp.int32) - 1, 0)
        elements = self.elements
        if self.frame is not None:
            bits = self.frame.bits  # type: ignore[attr-defined]
            elements = packing.unpack(elements, bits=bits, count=self.capacity)
        if self.capacity:
            dense = jnp.take_along_axis(elements, place, axis=-1)
        else:
            dense = jnp.zeros(rows.shape, elements.dtype)
        dense = jnp.where(rows, dense, jnp.zeros_like(dense)).reshape(kept.shape)
        if self.frame is None:
            values = self.layout.from_storage(dense).astype(self.dtype)
        else:
            values = self.frame.with_elements(dense)  # type: ignore[attr-defined]
        return MaskedArray(inner=values, mask=self.layout.from_storage(kept))

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
        if isinstance(value, BitmaskArray):
            value = value.expand()
            expanded = MaskedArray(inner=value.inner, mask=expanded.mask & value.mask)
            return store(expanded, self.layout)
        if isinstance(value, Leaf) and not value.elementwise:
            raise OrderError(
                f"{value.method} does not keep each weight where it is, so it would "
                "undo the mask; put it before the mask in the chain."
            )
        # The capacity is known already, also where the mask is traced.
        return store(expanded.replace(inner=value), self.layout, capacity=self.capacity)

    def relayout(self, op: LayoutOp) -> Leaf:
        """A cast keeps the storage; other operations expand it to a masked leaf."""
        if isinstance(op, Cast) and self.frame is None:
            wider = np.dtype(op.dtype).itemsize > self.dtype.itemsize
            return NotImplemented if wider else self.replace(dtype_name=op.dtype.name)
        return self.expand().relayout(op)

    def stacked(self, ndim: int) -> Leaf:
        """Itself if it was stored as a stack; else expanded."""
        if self.layout.stack_ndim(self.mask.ndim) >= ndim:
            return self
        return self.expand().stacked(ndim)

    @property
    def has_own_matmul(self) -> bool:  # type: ignore[override]
        """As the values do."""
        return self.frame is not None and self.frame.has_own_matmul

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

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> BitmaskArray:
        """Only stack axes can be cut: elsewhere the counts of non-zeros differ."""
        stack = self.layout.stack_ndim(self.mask.ndim)
        if any(entry is not None for entry in spec[stack:]):
            raise ValueError(
                f"{self.method}: only the {stack} stack axes can be sharded, since the "
                f"number of non-zeros differs elsewhere; got {tuple(spec)}. Shard the "
                "masked form, or replicate this one."
            )
        lead = tuple(spec[:stack])

        def along(a: jax.Array) -> PartitionSpec:
            """A component whose stack axes may be of size one."""
            sizes = a.shape[: len(lead)]
            return PartitionSpec(
                *(s if n > 1 else None for s, n in zip(lead, sizes, strict=True))
            )

        return self.replace(
            mask=PartitionSpec(*lead),
            elements=PartitionSpec(*lead),
            frame=self.frame and jax.tree.map(along, self.frame),
        )


def store(
    masked: MaskedArray, layout: Layout, *, capacity: int | None = None
) -> BitmaskArray:
    """The stored form of a masked array or masked quantized leaf.

    Args:
      masked: What to store.
      layout: How its axes lie in storage.
      capacity: Room for elements in each stack entry; the largest count by default,
        which needs a concrete mask.

    Raises:
      ValueError: If the mask is traced and no capacity given, or the capacity is too
        small.
    """
    kept = layout.to_storage(masked.mask)
    stack = layout.stack_ndim(kept.ndim)
    rows = kept.reshape(*kept.shape[:stack], -1)
    capacity = _capacity(rows, capacity)
    values, frame = masked.inner, None
    if isinstance(values, Leaf):
        elements = values.elements()  # type: ignore[attr-defined]
        frame = values.without_elements()  # type: ignore[attr-defined]
    else:
        elements = layout.to_storage(values)
    compact = _compact(elements.reshape(rows.shape), rows, capacity)
    if frame is not None:
        compact = packing.pack(compact, bits=frame.bits)
    bits = packing.pack(kept.astype(jnp.uint8), bits=1)
    return BitmaskArray(
        mask=bits,
        elements=compact,
        frame=frame,
        layout=layout,
        pad=bits.shape[-1] * 8 - kept.shape[-1],
        capacity=capacity,
        dtype_name=np.dtype(masked.dtype).name,
    )


def _capacity(rows: jax.Array, capacity: int | None) -> int:
    if isinstance(rows, Tracer):
        if capacity is None:
            raise jax.errors.ConcretizationTypeError(
                rows,
                "prune: how many weights are kept depends on the mask, which is "
                "traced; call compress outside jit, or prune to a constant sparsity.",
            )
        return capacity
    most = int(rows.sum(-1).max()) if math.prod(rows.shape) else 0
    if capacity is not None and capacity < most:
        raise ValueError(
            f"prune: capacity must hold the {most} weights that are kept; got "
            f"{capacity}."
        )
    return most if capacity is None else capacity


def _compact(elements: jax.Array, kept: jax.Array, capacity: int) -> jax.Array:
    """``[*stack, n] -> [*stack, capacity]``: the kept elements, in order."""
    stack, n = kept.shape[:-1], kept.shape[-1]
    place = jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1
    place = jnp.where(kept, place, capacity)  # Out of range: dropped.

    def one(elements: jax.Array, place: jax.Array) -> jax.Array:
        empty = jnp.zeros((capacity,), elements.dtype)
        return empty.at[place].set(elements, mode="drop")

    flat = jax.vmap(one)(elements.reshape(-1, n), place.reshape(-1, n))
    return flat.reshape(*stack, capacity)
