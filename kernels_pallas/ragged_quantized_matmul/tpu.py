"""Ragged low-bit matmul on TPU: blocks of rows and their experts by scalar prefetch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight, signed_zero, width
from kernels_pallas.quantized_matmul import tpu
from kernels_pallas.quantized_matmul._tpu_blocks import SUBLANES, Blocks, blocks_for
from kernels_pallas.ragged_quantized_matmul.visits import visits

ROWS = 128
"""Rows a visit, at most."""


def ragged_quantized_matmul(
    x: jax.Array,
    weight: Weight,
    group_sizes: jax.Array,
    fmt: Format,
    *,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As the reference, on the TPU layout.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``.
      weight: In `layouts.TPU`, ``[E, ...]``.
      group_sizes: ``int32[E]``.
      fmt: What the codes stand for; tables of at most 16 entries. Static.
      blocks: What one grid step works on. Static.
      interpret: As `pallas_call` takes it.

    Returns:
      ``float32[M, N']``.
    """
    tpu.check(x, jax.tree.map(lambda a: a[0], weight), fmt)
    m = x.shape[0]
    inputs = weight.words.shape[1] * 32 // width(fmt)
    groups, outputs = weight.scale.shape[1:]
    rows = min(ROWS, m + -m % SUBLANES)
    blocks = blocks or blocks_for(rows, outputs, inputs, fmt, groups)
    blocks = Blocks(rows, blocks.n, min(blocks.k, inputs), blocks.scale_after)
    x = jnp.pad(x, ((0, -m % rows), (0, inputs - x.shape[1])))
    found = visits(group_sizes, rows=m, block=rows)
    zero = signed_zero(weight, fmt)
    sides = (weight.scale,) if zero is None else (weight.scale, zero)
    call = _call(x.shape[0], inputs, outputs, groups, len(sides), found, fmt, blocks)
    y = call(interpret)(*found, x, weight.words, *sides)[:m]
    return jnp.where(jnp.arange(m)[:, None] < found.end[-1], y, 0.0)


def _call(
    m: int,
    inputs: int,
    outputs: int,
    groups: int,
    sides: int,
    found: Any,
    fmt: Format,
    blocks: Blocks,
) -> Any:
    rows, n, k = blocks.m, blocks.n, blocks.k
    word_rows = k * width(fmt) // 32
    side_rows = max(1, groups * k // inputs)
    kernel = functools.partial(
        _kernel, fmt=fmt, inputs=inputs, group=inputs // groups, blocks=blocks
    )
    side = pl.BlockSpec(
        (1, side_rows, n),
        lambda j, v, l, block, expert, *_: (expert[v], l if groups > 1 else 0, j),
    )
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(found),
        grid=(pl.cdiv(outputs, n), found.block.shape[0], pl.cdiv(inputs, k)),
        in_specs=[
            pl.BlockSpec((rows, k), lambda j, v, l, block, *_: (block[v], l)),
            pl.BlockSpec(
                (1, word_rows, n),
                lambda j, v, l, block, expert, *_: (expert[v], l, j),
            ),
            *[side] * sides,
        ],
        out_specs=pl.BlockSpec((rows, n), lambda j, v, l, block, *_: (block[v], j)),
        scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32)],
    )
    return lambda interpret: pl.pallas_call(
        kernel,
        name=f"ragged_quantized_matmul_{fmt.name}",
        out_shape=jax.ShapeDtypeStruct((m, outputs), jnp.float32),
        grid_spec=spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(
    block_ref: Any,
    expert_ref: Any,
    start_ref: Any,
    end_ref: Any,
    count_ref: Any,
    x_ref: Any,
    words_ref: Any,
    scale_ref: Any,
    *refs: Any,
    fmt: Format,
    inputs: int,
    group: int,
    blocks: Blocks,
) -> None:
    """Sum over K, then write the rows that are the visit's own."""
    *zero_ref, out_ref, sum_ref = refs
    visit, step = pl.program_id(1), pl.program_id(2)
    there = visit < count_ref[0]
    last = step == pl.num_programs(2) - 1

    @pl.when(there)
    def _() -> None:
        sides = (scale_ref.at[0], zero_ref[0].at[0] if zero_ref else None)
        tpu.accumulate(
            x_ref,
            words_ref.at[0],
            sides,
            sum_ref,
            step,
            fmt=fmt,
            inputs=inputs,
            group=group,
            blocks=blocks,
        )

    @pl.when(last & there)
    def _() -> None:
        expert, block = expert_ref[visit], block_ref[visit]
        row = jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0) + block * blocks.m
        own = (row >= start_ref[expert]) & (row < end_ref[expert])
        before = block_ref[jnp.maximum(visit - 1, 0)]
        fresh = (visit == 0) | (before != block)
        others = jnp.where(fresh, 0.0, out_ref[...])
        out_ref[...] = jnp.where(own, sum_ref[...], others)
