"""The blocks of a sparse weight: a fixed number of places in each row of blocks.

A weight ``[N, K]`` is cut in ``R x B`` blocks ``[bn, bk]`` (edges are filled up with
zeros). Each of the ``R = ceil(N / bn)`` rows of blocks has room for ``C`` of its
``B = ceil(K / bk)`` blocks, so that shapes do not depend on the data: weights stack,
`jax.lax.scan` slices them and rows shard. A row with fewer blocks leaves places empty.

The blocks are floats, or codes of few bits with one scale for each output of a block
(`kernels_pallas.layouts.Weight` with one group, each block a weight ``[bn, bk]``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from kernels_pallas import layouts
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, TPU, Layout, Stored, Weight, width
from kernels_pallas.values import dense_values

T = TypeVar("T")

EMPTY = -1
"""The column of a place that holds no block."""


class BlockSparse(NamedTuple):
    """The arrays of a block-sparse weight.

    ``w[r bn + i, columns[r, c] bk + j] = values[r, c, i, j]``, and zero elsewhere.

    Attributes:
      values: ``float[*stack, R, C, bn, bk]``, or a `Weight` of blocks: in the portable
        layout ``words uint8[*stack, R, C, bn, bk b / 8]`` and
        ``scale[*stack, R, C, bn, 1]``, in that of the TPU
        ``words int32[*stack, R, C, bk B / 32, bn]`` and ``scale[*stack, R, C, 1, bn]``.
      columns: ``int32[*stack, R, C]``, the block's place along K. The columns of a row
        differ; -1 (or any number that is not below B) is an empty place, which counts
        as zeros whatever finite `values` has there, and has no gradient.
    """

    values: jax.Array | Weight
    columns: jax.Array


def pack(
    dense: jax.Array, *, block: tuple[int, int], capacity: int | None = None
) -> BlockSparse:
    """Store the blocks that are not zero.

    Args:
      dense: ``float[*stack, N, K]``.
      block: ``(bn, bk)``: outputs and inputs of a block. Static.
      capacity: Blocks to store of each row of blocks; by default as many as the
        fullest row has (not under `jax.jit`). Of fuller rows the blocks with the
        largest sums of magnitudes stay. Static.

    Returns:
      The blocks of each row in the order of their columns, empty places last; `unpack`
      undoes it exactly where no row has more than `capacity` blocks.

    Raises:
      ValueError: If block or capacity is out of range, or capacity must be given.

    Examples:
      >>> w = jnp.array([[0.0, 0.0, 1.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
      >>> packed = pack(w, block=(1, 2))
      >>> packed.columns.tolist(), packed.values.tolist()
      ([[1], [0]], [[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
    """
    bn, bk = block
    if dense.ndim < 2 or min(block) < 1:
        refuse(
            "block_sparse_matmul.pack",
            "block",
            "be two sizes from 1 of the last two axes of dense",
            f"{block} for {dense.shape}",
            "TPU kernels want multiples of 128.",
        )
    *stack, n, k = dense.shape
    edges = [(0, 0)] * len(stack) + [(0, -n % bn), (0, -k % bk)]
    blocks = jnp.pad(dense, edges).reshape(*stack, -(-n // bn), bn, -(-k // bk), bk)
    blocks = blocks.swapaxes(-3, -2)
    strength = jnp.abs(blocks.astype(jnp.float32)).sum((-2, -1))
    held = _capacity(strength, capacity)
    columns = jax.lax.top_k(strength, held)[1].astype(jnp.int32)
    present = jnp.take_along_axis(strength, columns, axis=-1) != 0
    columns = jnp.sort(jnp.where(present, columns, strength.shape[-1]), axis=-1)
    present = columns < strength.shape[-1]
    at = jnp.where(present, columns, 0)[..., None, None]
    values = jnp.take_along_axis(blocks, at, axis=-3)
    values = jnp.where(present[..., None, None], values, jnp.zeros_like(values))
    return BlockSparse(values, jnp.where(present, columns, EMPTY))


def _capacity(strength: jax.Array, capacity: int | None) -> int:
    """Places in a row, of ``float[..., R, B]`` blocks."""
    blocks = strength.shape[-1]
    if capacity is None:
        if isinstance(strength, Tracer):
            refuse(
                "block_sparse_matmul.pack",
                "capacity",
                "be given under jit",
                None,
                "Blocks are counted only outside: pack there, or give a number.",
            )
        return max(1, int((strength != 0).sum(-1).max(initial=0)))
    if not 1 <= capacity <= blocks:
        refuse(
            "block_sparse_matmul.pack",
            "capacity",
            f"be from 1 to the {blocks} blocks of a row",
            capacity,
            "Leave it out to count them.",
        )
    return capacity


def unpack(
    weight: BlockSparse, fmt: Format | None = None, *, n: int, k: int
) -> jax.Array:
    """The dense weight.

    Args:
      weight: In the portable layout.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Outputs. Static.
      k: Inputs. Static.

    Returns:
      ``[*stack, n, k]``, in the dtype of floating values, else float32.
    """
    values = dense_blocks(weight.values, fmt)

    def place(values: jax.Array, columns: jax.Array) -> jax.Array:
        rows, _, bn, bk = values.shape
        count = -(-k // bk)
        row = jnp.arange(rows)[:, None]
        empty = jnp.zeros((rows, count + 1, bn, bk), values.dtype)
        blocks = empty.at[row, slots(columns, count)].set(values)[:, :count]
        return blocks.swapaxes(1, 2).reshape(rows * bn, count * bk)[:n, :k]

    return _over(place, weight.columns.ndim - 2)(values, weight.columns)


def slots(columns: jax.Array, count: int) -> jax.Array:
    """Columns with every empty place at `count`, one past the blocks of x."""
    return jnp.where((columns < 0) | (columns > count), count, columns)


def dense_blocks(values: jax.Array | Weight, fmt: Format | None) -> jax.Array:
    """``float[..., bn, bk]`` of portable values."""
    return dense_values(values, fmt, block_shape(values, fmt)[1])


def block_shape(
    values: jax.Array | Weight, fmt: Format | None, layout: Layout = PORTABLE
) -> tuple[int, int]:
    """``(bn, bk)``."""
    if not isinstance(values, Weight):
        return values.shape[-2], values.shape[-1]
    assert fmt is not None
    rows, columns = values.words.shape[-2:]
    if layout.name == TPU.name:
        return columns, rows * 32 // width(fmt)
    return rows, columns * 8 // fmt.bits


def repack(weight: BlockSparse, fmt: Format, *, to: Layout) -> BlockSparse:
    """Codes of blocks as a device reads them; `restore` undoes it.

    Args:
      weight: In the portable layout, its values a `Weight`.
      fmt: What their codes stand for. Static.
      to: The layout; blocks must be multiples of its tile. Static.

    Raises:
      ValueError: If they are not.
    """
    assert isinstance(weight.values, Weight)
    bn, bk = block_shape(weight.values, fmt)
    if bn % to.tile_n or bk % to.tile_k:
        refuse(
            "block_sparse_matmul.repack",
            "blocks",
            f"be multiples of [{to.tile_n}, {to.tile_k}] in the {to.name} layout",
            (bn, bk),
            "The portable layout runs by plain XLA.",
        )
    each = lambda values: layouts.repack(values, fmt, n=bn, k=bk, to=to)
    values = _over(each, weight.columns.ndim)(weight.values)
    return weight._replace(values=values)


def restore(weight: BlockSparse, fmt: Format, *, layout: Layout) -> BlockSparse:
    """The portable form of a weight whose codes are in `layout`.

    Args:
      weight: By `repack`.
      fmt: What its codes stand for. Static.
      layout: What it was repacked to. Static.
    """
    assert isinstance(weight.values, Weight)
    bn, bk = block_shape(weight.values, fmt, layout)
    each = lambda v: layouts.unpack(v, Stored(fmt, bn, bk, 1, layout))
    values = _over(each, weight.columns.ndim)(weight.values)
    return weight._replace(values=values)


def _over(f: Callable[..., T], axes: int) -> Callable[..., T]:
    """`f` over leading axes."""
    for _ in range(axes):
        f = jax.vmap(f)
    return f
