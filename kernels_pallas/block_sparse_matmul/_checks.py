"""What `block_sparse_matmul` refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_matmul.layout import BlockSparse, block_shape
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Layout, Weight
from kernels_pallas.target import Target

WHO = "block_sparse_matmul"


def outputs(n: int | None, rows: int, bn: int) -> int:
    """Outputs of so many rows of blocks, `n` if it is given."""
    if n is None:
        return rows * bn
    if not (rows - 1) * bn < n <= rows * bn:
        refuse(
            WHO,
            "n",
            f"end in the last of {rows} rows of blocks of {bn} outputs",
            n,
            "Give the outputs that the weight was packed with.",
        )
    return n


def check(
    x: jax.Array,
    weight: BlockSparse,
    fmt: Format | None,
    layout: Layout,
    target: Target,
) -> None:
    """Raise the errors of `block_sparse_matmul` before anything is traced."""
    values, columns = weight
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{WHO}: x must be floating; got {x.dtype}. Convert it.")
    if columns.dtype != jnp.int32:
        raise TypeError(
            f"{WHO}: columns must be int32; got {columns.dtype}. Arithmetic over a "
            "tree corrupts them: act on the values only."
        )
    if isinstance(values, Weight) != (fmt is not None):
        refuse(
            WHO,
            "fmt",
            "be given for codes, and only for them",
            f"{fmt} with values of type {type(values).__name__}",
            "Codes are a kernels_pallas.layouts.Weight.",
        )
    if layout.name not in ("portable", target.platform):
        refuse(
            WHO,
            "layout",
            "be the device's or portable",
            f"{layout.name!r} on {target.kind!r}",
            "Undo it by block_sparse_matmul.restore.",
        )
    _check_shapes(x, weight, fmt, layout)


def _check_shapes(
    x: jax.Array, weight: BlockSparse, fmt: Format | None, layout: Layout
) -> None:
    values, columns = weight
    places, stack = columns.shape, columns.shape[:-2]
    stored = jax.tree.leaves(values)
    if columns.ndim < 2 or any(a.shape[:-2] != places for a in stored):
        refuse(
            WHO,
            "values",
            f"begin with the shape of columns [*stack, R, C], {places}",
            [a.shape for a in stored],
            "Build both by block_sparse_matmul.pack.",
        )
    if x.ndim <= len(stack) or x.shape[: len(stack)] != stack:
        refuse(
            WHO,
            "x",
            f"be [*stack, ..., K] with the weight's stack {stack}",
            x.shape,
            "Move the stack to the front, or use jax.vmap.",
        )
    if isinstance(values, Weight):
        _check_codes(values, fmt, layout)


def _check_codes(values: Weight, fmt: Format | None, layout: Layout) -> None:
    if values.words.dtype != layout.dtype:
        raise TypeError(
            f"{WHO}: words of the {layout.name} layout must be {layout.dtype}; got "
            f"{values.words.dtype}. Use block_sparse_matmul.repack."
        )
    bn, bk = block_shape(values, fmt, layout)
    side = (bn, 1) if layout == PORTABLE else (1, bn)
    shapes = [a.shape[-2:] for a in values[1:] if a is not None]
    if any(shape != side for shape in shapes):
        refuse(
            WHO,
            "scale and zero",
            f"be [..., {side[0]}, {side[1]}]: one for each output of a block",
            shapes,
            "Take smaller blocks for finer scales.",
        )
    if fmt is not None and bk * fmt.bits % 8:
        refuse(
            WHO,
            "words",
            "hold whole bytes of codes for each row of a block",
            f"{bk} codes of {fmt.bits} bits",
            "Take blocks of a multiple of 8 inputs.",
        )
