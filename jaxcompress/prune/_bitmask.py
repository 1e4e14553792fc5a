"""`BitmaskArray`: the stored form of a pruned weight.

One bit a weight says where the non-zeros are; their values lie together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxcompress import coded
from jaxcompress.coded import CodedLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, Leaf, component, leaf_type, static
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._sparse import SparseLeaf, join, specs_along
from kernels_pallas import packing


@leaf_type
class BitmaskArray(SparseLeaf):
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
    frame: CodedLeaf | None = component(role=FROZEN, default=None)
    layout: Layout = static()
    pad: int = static()
    capacity: int = static()
    dtype_name: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.logical_shape((*self.mask.shape[:-1], self._k))

    @property
    def method(self) -> str:
        """``"bitmask"`` and the method of its values."""
        return f"bitmask {self.kind}"

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.layout.stack_ndim(self.mask.ndim)

    @property
    def _k(self) -> int:
        return self.mask.shape[-1] * 8 - self.pad

    def expand(self) -> MaskedArray:
        """The training form: every element in its place."""
        kept = packing.unpack(self.mask, bits=1, count=self._k).astype(bool)
        rows = kept.reshape(*kept.shape[: self.stack], -1)
        place = jnp.maximum(jnp.cumsum(rows, axis=-1, dtype=jnp.int32) - 1, 0)
        elements = coded.unpack(self.elements, self.frame, self.capacity)
        if self.capacity:
            dense = jnp.take_along_axis(elements, place, axis=-1)
        else:
            dense = jnp.zeros(rows.shape, elements.dtype)
        dense = jnp.where(rows, dense, jnp.zeros_like(dense)).reshape(kept.shape)
        mask = self.layout.from_storage(kept)
        return MaskedArray(inner=join(dense, self), mask=mask)

    def packed_codes(self) -> dict[str, int]:
        """Positions, and the codes of a quantized weight."""
        codes = {} if self.frame is None else {"elements": self.frame.bits}
        return {"mask": 1, **codes}

    def stored_again(self, masked: MaskedArray) -> Leaf:
        """With the capacity it has, which is known also where the mask is traced."""
        return store(masked, self.layout, capacity=self.capacity)

    def intersection(self, masked: MaskedArray) -> Leaf:
        """With the capacity of what is left."""
        return store(masked, self.layout)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> BitmaskArray:
        """Only stack axes can be cut: elsewhere the counts of non-zeros differ."""
        if any(entry is not None for entry in spec[self.stack :]):
            raise ValueError(
                f"{self.method}: only the {self.stack} stack axes can be sharded, "
                "since the number of non-zeros differs elsewhere; got "
                f"{tuple(spec)}. Shard the masked form, or replicate this one."
            )
        lead = tuple(spec[: self.stack])
        return self.replace(
            mask=PartitionSpec(*lead),
            elements=PartitionSpec(*lead),
            frame=self.frame and specs_along(lead, self.frame),
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
    elements, frame = coded.split(masked.inner, layout)
    compact = _compact(elements.reshape(rows.shape), rows, capacity)
    bits = packing.pack(kept.astype(jnp.uint8), bits=1)
    return BitmaskArray(
        mask=bits,
        elements=coded.pack(compact, frame),
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
