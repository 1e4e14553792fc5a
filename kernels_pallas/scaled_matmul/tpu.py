"""Both operands quantized, on TPU: int8 or fp8 products on the matrix unit (from v5e).

Codes of 4 and 2 bits are widened to int8 in fast memory, and a group's sums are exact;
the sums of several groups are scaled and added in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _tpu_decode as decode
from kernels_pallas.formats import Float8, Integer
from kernels_pallas.layouts import Weight, width
from kernels_pallas.quantized_matmul._tpu_blocks import Blocks, blocks_for
from kernels_pallas.scaled_matmul.rows import operand_dtype, sum_dtype

SUBLANES = 32
"""Rows of a tile of bytes: M is padded to a multiple of it."""


def scaled_matmul(
    codes: jax.Array,
    scale: jax.Array,
    weight: Weight,
    fmt: Integer | Float8,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As the reference, on the TPU layout.

    Args:
      codes: ``[M, K]`` in the operand dtype.
      scale: ``float32[M, 1]``.
      weight: In `layouts.TPU`, without zero points.
      fmt: Signed integers, or fp8. Static.
      blocks: What one grid step works on. Static.
      interpret: As `pallas_call` takes it.

    Returns:
      ``float32[M, N']``.
    """
    m, k = codes.shape
    inputs, (groups, outputs) = (
        weight.words.shape[0] * 32 // width(fmt),
        weight.scale.shape,
    )
    blocks = blocks or blocks_for(m, outputs, inputs, fmt, groups)
    codes = jnp.pad(codes, ((0, -m % SUBLANES), (0, inputs - k)))
    scale = jnp.pad(scale, ((0, -m % SUBLANES), (0, 0)))
    rows = min(codes.shape[0], -(-blocks.m // SUBLANES) * SUBLANES)
    call = _call(codes.shape[0], inputs, outputs, groups, rows, blocks, fmt, interpret)
    return call(codes, scale, weight.words, weight.scale)[:m]


def _call(
    m: int,
    inputs: int,
    outputs: int,
    groups: int,
    rows: int,
    blocks: Blocks,
    fmt: Integer | Float8,
    interpret: Any,
) -> Any:
    n, k = blocks.n, min(blocks.k, inputs)
    sides = max(1, groups * k // inputs)
    kernel = functools.partial(
        _kernel, fmt=fmt, inputs=inputs, group=inputs // groups, block=k
    )
    return pl.pallas_call(
        kernel,
        name=f"scaled_matmul_{fmt.name}",
        out_shape=jax.ShapeDtypeStruct((m, outputs), jnp.float32),
        grid=(pl.cdiv(m, rows), pl.cdiv(outputs, n), pl.cdiv(inputs, k)),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i, j, l: (i, l)),
            pl.BlockSpec((rows, 1), lambda i, j, l: (i, 0)),
            pl.BlockSpec((k * width(fmt) // 32, n), lambda i, j, l: (l, j)),
            pl.BlockSpec((sides, n), lambda i, j, l: (l if groups > 1 else 0, j)),
        ],
        out_specs=pl.BlockSpec((rows, n), lambda i, j, l: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((rows, n), sum_dtype(fmt) if groups == 1 else jnp.float32)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(
    codes_ref: Any,
    scale_ref: Any,
    words_ref: Any,
    side_ref: Any,
    out_ref: Any,
    sum_ref: Any,
    *,
    fmt: Integer | Float8,
    inputs: int,
    group: int,
    block: int,
) -> None:
    """Add one block of K to the sum, and write it out after the last."""
    step = pl.program_id(2)
    last = step == pl.num_programs(2) - 1
    whole = inputs == group

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(length: int) -> None:
        size = length if whole else min(group, length)
        for i in range(length // size):
            words = words_ref[
                pl.ds(i * size * width(fmt) // 32, size * width(fmt) // 32)
            ]
            w = _operand(words, fmt)
            sums = jnp.dot(
                codes_ref[:, i * size : (i + 1) * size],
                w,
                preferred_element_type=sum_dtype(fmt),
            )
            if not whole:
                sums = sums.astype(jnp.float32) * side_ref[i : i + 1]
            sum_ref[...] += sums

    tail = inputs % block
    if tail:
        pl.when(~last)(lambda: add(block))
        pl.when(last)(lambda: add(tail))
    else:
        add(block)

    @pl.when(last)
    def _() -> None:
        y = sum_ref[...].astype(jnp.float32)
        out_ref[...] = y * (side_ref[...] if whole else 1.0) * scale_ref[...]


def _operand(words: jax.Array, fmt: Integer | Float8) -> jax.Array:
    if isinstance(fmt, Float8):
        return pltpu.bitcast(words, operand_dtype(fmt))
    return decode.integers(words, bits=width(fmt)).astype(jnp.int8)
