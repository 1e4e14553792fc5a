"""Hashed matmul on TPU: each tile of the weight is made in fast memory, then used.

Single weights: the hash of every place is computed in the vector units, and its value
gathered along lanes, from as many registers as the buckets fill. Blocks: the hash of a
block is computed in the scalar unit, and names the rows of the table to copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.hashed_matmul._tpu_blocks import LANES, Blocks, blocks_for
from kernels_pallas.hashed_matmul.reference import Hashing, Origin
from kernels_pallas.hashing import place, row_state


def hashed_matmul(
    x: jax.Array,
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    origin: Origin = (0, 0),
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiply by a weight that is looked up tile by tile.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``; the buckets are rounded to its dtype.
      buckets: ``float[B]``, few enough for `fits`.
      hashing: Which bucket a weight is. Static.
      n: Outputs. Static.
      origin: Where in the whole weight this part of it begins, in whole blocks.
      interpret: As `pallas_call` takes it. Static.

    Returns:
      ``float32[M, N]``.
    """
    m, k = x.shape
    blocks = blocks_for(m, n, k, hashing)
    x = jnp.pad(x, ((0, -m % blocks.m), (0, -k % blocks.k)))
    start = jnp.stack(
        [
            jnp.asarray(o, jnp.int32) // b
            for o, b in zip(origin, hashing.block, strict=True)
        ]
    )
    table = _table(buckets.astype(jnp.float32), hashing)
    call = _call(x, table, hashing, n, len(buckets), blocks, interpret)
    return call(start, x, table)[:m, :n]


def _table(buckets: jax.Array, hashing: Hashing) -> jax.Array:
    """Single weights: ``[1, B']``. Blocks: ``[bk / 128, R + bn - 1, 128]``, wrapped.

    Only of a table 128 wide may a slice begin at any row.
    """
    bn, bk = hashing.block
    if hashing.block == (1, 1):
        return jnp.pad(buckets, (0, -len(buckets) % LANES))[None]
    count = hashing.starts(len(buckets))
    lines = buckets.reshape(count, bk // LANES, LANES).swapaxes(0, 1)
    return lines[:, np.arange(count + bn - 1) % count]


def _call(
    x: jax.Array,
    table: jax.Array,
    hashing: Hashing,
    outputs: int,
    buckets: int,
    blocks: Blocks,
    interpret: bool | pltpu.InterpretParams,
) -> Callable[..., jax.Array]:
    """The `pl.pallas_call` over (M, N, K) blocks, K innermost."""
    m, n, k = blocks
    rows, inputs = x.shape
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows // m, pl.cdiv(outputs, n), inputs // k),
        in_specs=[
            pl.BlockSpec((m, k), lambda i, j, l, _: (i, l)),
            pl.BlockSpec(memory_space=pltpu.VMEM),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, l, _: (i, j)),
        scratch_shapes=[pltpu.VMEM((n, k), x.dtype)],
    )
    return pl.pallas_call(
        functools.partial(_kernel, hashing=hashing, buckets=buckets),
        name="hashed_matmul",
        out_shape=jax.ShapeDtypeStruct((rows, n * grid.grid[1]), jnp.float32),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(
    origin: Any,
    x: Any,
    table: Any,
    y: Any,
    w: Any,
    *,
    hashing: Hashing,
    buckets: int,
) -> None:
    """Add the product with one tile of the weight to the sum."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        y[...] = jnp.zeros_like(y)

    bn, bk = hashing.block
    row = origin[0] + pl.program_id(1) * (w.shape[0] // bn)
    column = origin[1] + pl.program_id(2) * (w.shape[1] // bk)
    fill = _single if hashing.block == (1, 1) else _blockwise
    fill(w, table, row, column, hashing, buckets)
    y[...] += jax.lax.dot_general(
        x[...],
        w[...],
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _single(
    w: Any,
    table: Any,
    row: jax.Array,
    column: jax.Array,
    hashing: Hashing,
    buckets: int,
) -> None:
    """A hash and a gather for every weight of the tile, 128 columns at a time."""
    shape = (w.shape[0], LANES)
    rows = row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    state = row_state(rows.astype(jnp.uint32), seed=hashing.seed)

    @pl.loop(0, w.shape[1] // LANES)
    def _(i: jax.Array) -> None:
        columns = column + i * LANES + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        at, negative = place(
            state, columns.astype(jnp.uint32), count=buckets, linear=hashing.linear
        )
        values = _looked_up(table[...], at)
        values = jnp.where(negative, -values, values)
        lanes = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        w[:, lanes] = values.astype(w.dtype)


def _looked_up(table: jax.Array, at: jax.Array) -> jax.Array:
    """``table[0, at]``, from a register of 128 entries after the other."""
    low, high = at & (LANES - 1), at >> int(math.log2(LANES))
    values = jnp.zeros(at.shape, jnp.float32)
    for i in range(table.shape[1] // LANES):
        entries = jnp.broadcast_to(table[:, i * LANES : (i + 1) * LANES], at.shape)
        found = jnp.take_along_axis(entries, low, axis=1, mode="promise_in_bounds")
        values = jnp.where(high == i, found, values)
    return values


def _blockwise(
    w: Any,
    table: Any,
    row: jax.Array,
    column: jax.Array,
    hashing: Hashing,
    buckets: int,
) -> None:
    """Rows of the table for every block of the tile."""
    (bn, bk), count = hashing.block, hashing.starts(buckets)

    @pl.loop(0, w.shape[0] // bn)
    def _(i: jax.Array) -> None:
        state = row_state((row + i).astype(jnp.uint32), seed=hashing.seed)
        for j in range(w.shape[1] // bk):
            first, negative = place(
                state,
                (column + j).astype(jnp.uint32),
                count=count,
                linear=hashing.linear,
            )
            runs = pl.ds(first, bn)
            for c in range(bk // LANES):
                run = table[c, runs, :]
                run = jnp.where(negative, -run, run)
                lanes = pl.ds(j * bk + c * LANES, LANES)
                w[pl.ds(pl.multiple_of(i * bn, bn), bn), lanes] = run.astype(w.dtype)
