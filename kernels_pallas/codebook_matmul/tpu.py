"""Codebook matmul on TPU: table rows lie along the lanes, codes gather from them.

A gather along lanes reads, for each of 8 x 128 codes, an entry of its own row's table.
With M >= d the tables are the codebooks: component ``j`` of all sub-vectors is decoded
and multiplied with ``x[:, j::d]``. With M < d they are the partial products of x and
the codebooks, one table for each sub-vector and row of x, and what is gathered is only
added up: M gathers a code instead of d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _tpu_decode as decode
from kernels_pallas.codebook_matmul import xla
from kernels_pallas.codebook_matmul._tpu_blocks import (
    LANES,
    Blocks,
    adds_up,
    block_rows,
    blocks_for,
)
from kernels_pallas.codebook_matmul.layout import CodebookWeight
from kernels_pallas.formats import Integer
from kernels_pallas.layouts import width


def codebook_matmul(
    x: jax.Array,
    weight: CodebookWeight,
    *,
    bits: int,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiply by a codebook weight in the TPU layout.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``. With M >= d the decoded weight is
        rounded to its dtype; otherwise products are float32.
      weight: In `layouts.TPU`.
      bits: Of a code. Static.
      interpret: As `pallas_call` takes it. Static.

    Returns:
      ``float32[M, N']``.
    """
    m, d = x.shape[0], weight.codebooks.shape[-1]
    count = weight.words.shape[1] * 32 // width(Integer(bits))
    if adds_up(m, d):
        parts, tables = None, _products(x, weight.codebooks, count)
    else:
        parts, tables = _parts(x, count, d), _components(weight, x.shape[1], count)
    blocks = blocks_for(m, d, weight.words.shape[2], count, tables.shape)
    call = _call(parts, tables, weight.words, blocks, bits, interpret)
    y = call(*([] if parts is None else [parts]), weight.words, tables)[:m]
    return y if weight.scale is None else y * weight.scale.astype(jnp.float32)[None]


def _parts(x: jax.Array, count: int, d: int) -> jax.Array:
    """``[d, M', count]``: the inputs that each component is multiplied with."""
    parts = xla.subvectors(x, count, d).transpose(2, 0, 1)
    return jnp.pad(parts, ((0, 0), (0, -len(x) % block_rows(len(x), d)), (0, 0)))


def _products(x: jax.Array, codebooks: jax.Array, count: int) -> jax.Array:
    """Tables ``float32[A, M, count, E']`` of partial products."""
    vectors = -(-x.shape[1] // codebooks.shape[-1])
    products = xla.partial_products(x, codebooks, vectors)
    return _padded(products.transpose(1, 3, 0, 2), count)


def _components(weight: CodebookWeight, k: int, count: int) -> jax.Array:
    """Tables ``float32[A, d, count or 1, E']``: a component of every entry."""
    blocks, _, _, d = weight.codebooks.shape
    tables = weight.codebooks.astype(jnp.float32).transpose(1, 3, 0, 2)
    if blocks == 1:
        return _padded(tables, 1)
    return _padded(jnp.repeat(tables, -(-k // d) // blocks, axis=2), count)


def _padded(tables: jax.Array, rows: int) -> jax.Array:
    """Rows of zeros for the padding of K; the last entry for codes past it."""
    more = (0, -tables.shape[3] % LANES)
    tables = jnp.pad(tables, ((0, 0),) * 3 + (more,), mode="edge")
    return jnp.pad(tables, ((0, 0), (0, 0), (0, rows - tables.shape[2]), (0, 0)))


def _call(
    parts: jax.Array | None,
    tables: jax.Array,
    words: jax.Array,
    blocks: Blocks,
    bits: int,
    interpret: bool | pltpu.InterpretParams,
) -> Callable[..., jax.Array]:
    """The `pl.pallas_call` over (M, N, S) blocks, S innermost."""
    books, lines, outputs = words.shape
    wide = width(Integer(bits))
    _, components, rows_of_table, entries = tables.shape
    m, n, s = blocks
    rows = m if parts is None else parts.shape[1]
    own = rows_of_table > 1
    specs = [
        pl.BlockSpec((books, s * wide // 32, n), lambda i, j, l: (0, l, j)),
        pl.BlockSpec(
            (books, components, s if own else 1, entries),
            lambda i, j, l: (0, 0, l if own else 0, 0),
        ),
    ]
    if parts is not None:
        specs.insert(0, pl.BlockSpec((components, m, s), lambda i, j, l: (0, i, l)))
    return pl.pallas_call(
        functools.partial(_kernel, bits=bits),
        name="codebook_matmul",
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        grid=(rows // m, outputs // n, lines * 32 // wide // s),
        in_specs=specs,
        out_specs=pl.BlockSpec((m, n), lambda i, j, l: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(*refs: Any, bits: int) -> None:
    """Add the products of one block of sub-vectors to the sum."""
    *parts, words, tables, y = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        y[...] = jnp.zeros_like(y)

    @pl.loop(0, y.shape[1] // LANES)
    def _(i: jax.Array) -> None:
        lanes = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        codes = [
            decode.integers(words[a, :, lanes], bits=width(Integer(bits)))
            for a in range(words.shape[0])
        ]
        codes = [c.astype(jnp.int32) & (2**bits - 1) for c in codes]
        for j in range(tables.shape[1]):
            each = [_entries(tables[a, j], c) for a, c in enumerate(codes)]
            read = functools.reduce(jnp.add, each)
            if not parts:
                y[j : j + 1, lanes] += jnp.sum(read, axis=0, keepdims=True)
            else:
                y[:, lanes] += _dot(parts[0][j], read)


def _entries(table: jax.Array, codes: jax.Array) -> jax.Array:
    """``table[s, codes[s, n]]`` (or ``table[0, ...]``) of 128 or 256 entries."""
    halves = [table[:, i : i + LANES] for i in range(0, table.shape[1], LANES)]
    whole = [jnp.broadcast_to(half, codes.shape) for half in halves]
    if len(whole) == 1:
        return _gather(whole[0], jnp.minimum(codes, LANES - 1))
    low = codes & (LANES - 1)
    return jnp.where(codes < LANES, *(_gather(half, low) for half in whole))


def _gather(table: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, at, axis=1, mode="promise_in_bounds")


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(
        x, w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
    )
