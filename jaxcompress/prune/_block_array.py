"""`BlockSparseArray`: the stored form of a weight of which whole blocks are kept."""

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
from jaxcompress.leaf import FROZEN, Leaf, Ran, Traits, component, leaf_type, static
from jaxcompress.prune import _bitmask
from jaxcompress.prune._kernels import block_dot, block_site
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._sparse import SparseLeaf, join, specs_along

EMPTY = -1
"""The column of a place that holds no block."""


@leaf_type
class BlockSparseArray(SparseLeaf):
    """The kept blocks of each row of blocks, and their columns.

    The storage matrix ``[N, K]`` (outputs flattened by inputs flattened) is cut in
    ``R x B`` blocks of ``bn x bk``, the edges filled up;
    ``w[r bn + i, columns[r, c] bk + j] = element[r, c, i, j]``, zero elsewhere. It is
    the portable layout of `kernels_pallas.block_sparse_matmul`.

    Attributes:
      elements: ``[*stack, R, C, bn, bk]`` floats, or ``uint8[..., ceil(bk b / 8)]``
        packed codes.
      columns: ``int32[*stack, R, C]``, ascending in a row; -1, at its end, where a row
        has fewer blocks than there is room for.
      frame: The quantized leaf without its codes, or None.
      layout: How the axes lie in storage.
      block: ``(bn, bk)``.
      out: Sizes of the output axes but the first, whose size is derived.
      short: Outputs that the last row of blocks lacks.
      k: Inputs.
      dtype_name: Logical dtype.
      kernel: Whether the sparse kernel multiplies it; see `use_kernels`.
    """

    elements: jax.Array = component(role=FROZEN)
    columns: jax.Array = component(role=FROZEN)
    frame: CodedLeaf | None = component(role=FROZEN, default=None)
    layout: Layout = static()
    block: tuple[int, int] = static()
    out: tuple[int, ...] = static()
    short: int = static()
    k: int = static()
    dtype_name: str = static()
    kernel: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.logical_shape(self._storage)

    @property
    def method(self) -> str:
        """``"blocks 16x16"`` and the method of its values."""
        return f"blocks {self.block[0]}x{self.block[1]} {self.kind}"

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.columns.ndim - 2

    @property
    def _storage(self) -> tuple[int, ...]:
        lead = self.columns.shape[: self.stack]
        return (*lead, *self.out_sizes, self.k)

    @property
    def out_sizes(self) -> tuple[int, ...]:
        """Sizes of the output axes, in storage order."""
        if not self.layout.out:
            return ()
        return (self.outputs // math.prod(self.out), *self.out)

    @property
    def outputs(self) -> int:
        """N: outputs, flattened."""
        return self.columns.shape[-2] * self.block[0] - self.short

    def expand(self) -> MaskedArray:
        """The training form: every element in its place."""
        bn, bk = self.block
        elements = coded.unpack(self.elements, self.frame, bk)
        columns = -(-self.k // bk)
        full = self.columns >= 0

        def place(a: jax.Array, at: jax.Array) -> jax.Array:
            rows = at.shape[0]
            empty = jnp.zeros((rows, columns + 1, *a.shape[2:]), a.dtype)
            row = jnp.arange(rows)[:, None]
            return empty.at[row, jnp.where(at < 0, columns, at)].set(a)[:, :columns]

        for _ in range(self.stack):
            place = jax.vmap(place)
        kept = place(full, self.columns)[..., None, None]
        dense = place(elements, self.columns)
        kept = jnp.broadcast_to(kept, dense.shape)

        def flat(a: jax.Array) -> jax.Array:
            a = a.swapaxes(-3, -2)
            lead = a.shape[: self.stack]
            a = a.reshape(*lead, a.shape[-4] * bn, columns * bk)
            return a[..., : self.outputs, : self.k].reshape(self._storage)

        mask = self.layout.from_storage(flat(kept))
        return MaskedArray(inner=join(flat(dense), self), mask=mask)

    def portable(self) -> BlockSparseArray:
        """Without the kernel, which files do not name."""
        return self.replace(kernel=False)

    def with_kernel(self) -> BlockSparseArray:
        """With the kernel, where blocks hold floats."""
        return self if self.frame is not None else self.replace(kernel=True)

    @property
    def traits(self) -> Traits:
        """The kernel, where it was asked for, is a matmul of its own."""
        return super().traits._replace(
            own_matmul=self.kernel or super().traits.own_matmul
        )

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """By the sparse kernel where it was asked for; else as the training form."""
        site = None
        if self.kernel:
            site = block_site(self, x, dimension_numbers, leaf_is_lhs)
        if site is not None:
            return block_dot(self, x, site, params)
        return super().dot_general(
            x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
        )

    def stored_again(self, masked: MaskedArray) -> Leaf:
        """In the same blocks, with as much room."""
        capacity = self.columns.shape[-1]
        return store_blocks(masked, self.layout, block=self.block, capacity=capacity)

    def intersection(self, masked: MaskedArray) -> Leaf:
        """As bits, since blocks may be kept in part."""
        return _bitmask.store(masked, self.layout)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> BlockSparseArray:
        """Stacks can be cut, and the first output axis between rows of blocks."""
        full = self.layout.absorb_stack(self.stack)
        lead, rest = list(full.out[: self.stack]), list(full.out[self.stack :])
        rows = spec[rest[0]] if rest else None
        names = () if rows is None else rows if isinstance(rows, tuple) else (rows,)
        parts = math.prod(sizes[name] for name in names)
        others = [spec[a] for a in (*rest[1:], *full.contract)]
        if any(s is not None for s in others) or (
            parts > 1 and (self.short or self.columns.shape[-2] % parts)
        ):
            raise ValueError(
                f"{self.method}: besides stack axes only the first output axis can be "
                f"sharded, in a number of parts that divides its "
                f"{self.columns.shape[-2]} whole rows of blocks; got {tuple(spec)}."
            )
        entries = [spec[a] for a in lead]
        own = PartitionSpec(*entries, rows)
        frame = [*entries, rows] if rest else entries
        return self.replace(
            elements=own,
            columns=own,
            frame=self.frame and specs_along(frame, self.frame),
        )


def store_blocks(
    masked: MaskedArray,
    layout: Layout,
    *,
    block: tuple[int, int],
    capacity: int | None = None,
) -> BlockSparseArray:
    """The stored form of a masked array or masked quantized leaf.

    Args:
      masked: Blocks of which the mask keeps nothing are left out; of others all
        elements are stored, zero where the mask is not set.
      layout: How its axes lie in storage.
      block: Outputs and inputs of a block.
      capacity: Room for blocks in each row of blocks; the fullest row's by default,
        which needs a concrete mask.

    Raises:
      ConcretizationTypeError: If the mask is traced and no capacity given.
      ValueError: If the capacity is too small.
    """
    elements, frame = coded.split(masked.inner, layout)
    kept = layout.to_storage(masked.mask)
    if frame is None:
        elements = jnp.where(kept, elements, jnp.zeros_like(elements))
    out = kept.shape[layout.stack_ndim(kept.ndim) : -1]
    kept = in_blocks(kept, layout, block)
    present = kept.any((-2, -1))
    capacity = _capacity(present, capacity)
    order = jnp.argsort(~present, axis=-1, stable=True)[..., :capacity]
    full = jnp.take_along_axis(present, order, axis=-1)
    chosen = jnp.take_along_axis(
        in_blocks(elements, layout, block), order[..., None, None], axis=-3
    )
    chosen = jnp.where(full[..., None, None], chosen, jnp.zeros_like(chosen))
    return BlockSparseArray(
        elements=coded.pack(chosen, frame),
        columns=jnp.where(full, order.astype(jnp.int32), EMPTY),
        frame=frame,
        layout=layout,
        block=block,
        out=tuple(out[1:]),
        short=-math.prod(out) % block[0],
        k=elements.shape[-1],
        dtype_name=np.dtype(masked.dtype).name,
    )


def in_blocks(a: jax.Array, layout: Layout, block: tuple[int, int]) -> jax.Array:
    """``[*stack, *out, K] -> [*stack, R, B, bn, bk]``, filled up with zeros."""
    bn, bk = block
    stack = a.shape[: layout.stack_ndim(a.ndim)]
    k = a.shape[-1]
    a = a.reshape(*stack, math.prod(a.shape[len(stack) : -1]), k)
    n = a.shape[-2]
    a = jnp.pad(a, [(0, 0)] * len(stack) + [(0, -n % bn), (0, -k % bk)])
    a = a.reshape(*stack, -(-n // bn), bn, -(-k // bk), bk)
    return a.swapaxes(-3, -2)


def _capacity(present: jax.Array, capacity: int | None) -> int:
    if isinstance(present, Tracer):
        if capacity is None:
            raise jax.errors.ConcretizationTypeError(
                present,
                "prune.blocks: how many blocks a row has depends on the mask, which is "
                "traced; call compress outside jit, or use scope='row'.",
            )
        return capacity
    most = int(present.sum(-1, dtype=jnp.int32).max(initial=0))
    if capacity is not None and capacity < most:
        raise ValueError(
            f"prune.blocks: capacity must hold the {most} blocks of the fullest row; "
            f"got {capacity}."
        )
    return most if capacity is None else capacity
