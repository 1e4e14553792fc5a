"""N:M-sparse matmul on a TPU: kept weights become dense planes in fast memory.

Input ``j`` of all groups is one plane of selects among the kept weights that can stand
there, and one dot with its own part of x: no data moves across sublanes. Only the kept
weights and their places are read from memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _tpu_decode as decode
from kernels_pallas.formats import Format, Integer
from kernels_pallas.layouts import TPU, Weight, width
from kernels_pallas.nm_sparse_matmul.layout import NMSparse, index_format
from kernels_pallas.nm_sparse_matmul.xla import by_input, expand

SUBLANES = 16
"""Rows of a bfloat16 tile: M is padded to a multiple of it."""


PIECE = 128
"""Outputs that are expanded at a time: their planes about fill the registers."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one grid step works on.

    Attributes:
      rows: Rows of x.
      groups: Groups of m inputs.
      outputs: Outputs.
    """

    rows: int
    groups: int
    outputs: int


def blocks_for(rows: int, groups: int, outputs: int, scale_rows: int) -> Blocks:
    """Blocks whose dense planes stay small, about 512 KiB of float32 each.

    Args:
      rows: Rows of x, padded.
      groups: ``G'`` of the layout.
      outputs: ``N'`` of the layout.
      scale_rows: Groups that share a scale, from `scale_rows_for`.
    """
    unit = TPU.tile_k if scale_rows == groups else _unit(scale_rows)
    fitting = [g for g in range(unit, max(256, unit) + 1, unit) if groups % g == 0]
    return Blocks(min(rows, 256), max(fitting), min(outputs, 512))


def scale_rows_for(groups: int, scales: int) -> int:
    """Groups that share a scale in the kernel: a block takes scales by eights.

    Args:
      groups: ``G'`` of the layout.
      scales: ``S'`` of the layout.
    """
    shared = groups // scales
    if scales == 1:
        return shared
    return next(
        r
        for r in range(shared, 0, -1)
        if shared % r == 0 and _unit(r) <= 512 and groups % _unit(r) == 0
    )


def _unit(scale_rows: int) -> int:
    return math.lcm(TPU.tile_k, 8 * scale_rows)


def nm_sparse_matmul(
    x: jax.Array,
    weight: NMSparse,
    fmt: Format | None,
    *,
    n: int,
    m: int,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiply by the kept weights.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``.
      weight: In the layout of the TPU.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many. Static.
      blocks: What a grid step works on; by default `blocks_for`. Static.
      interpret: Run on a CPU: True, or the parameters of the TPU interpreter. Static.

    Returns:
      ``float32[M, N']``. Products are of float32 if x or floating values are, else of
      bfloat16, to which codes are rounded after their scale.

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021. Differs: there is no sparse unit; what
      is saved is memory.
    """
    values, indices = weight
    index_bits = width(index_format(m))
    groups, outputs = indices.shape[-2] * 32 // index_bits, indices.shape[-1]
    if not isinstance(values, Weight):
        x = x.astype(jnp.promote_types(x.dtype, values.dtype))
    count = len(x)
    rows = -(-count // SUBLANES) * SUBLANES
    stored = _arrays(values, fmt)
    scale_rows = scale_rows_for(groups, len(stored[1]) if fmt else 1)
    shared = lambda a: jnp.repeat(a, groups // scale_rows // len(a), axis=0)
    stored[1:] = [shared(a) for a in stored[1:]]
    blocks = blocks or blocks_for(rows, groups, outputs, scale_rows)
    rows = -(-rows // blocks.rows) * blocks.rows
    x = jnp.pad(x, ((0, rows - count), (0, groups * m - x.shape[1])))
    call = _call(
        rows, groups, outputs, scale_rows, stored, fmt, (n, m), blocks, interpret
    )
    return call(by_input(x, m), indices, *stored)[:count]


def _arrays(values: jax.Array | Weight, fmt: Format | None) -> list[jax.Array]:
    """What the kernel reads of the values: floats, or words and their sides."""
    if not isinstance(values, Weight):
        return [values]
    words, scale, zero = values
    if zero is None and isinstance(fmt, Integer) and not fmt.signed:
        shift = 2 ** (fmt.bits - 1) if fmt.bits == width(fmt) else 0
        zero = jnp.full_like(scale, -shift)
    return [a for a in (words, scale, zero) if a is not None]


def _call(
    rows: int,
    groups: int,
    outputs: int,
    scale_rows: int,
    stored: list[jax.Array],
    fmt: Format | None,
    pattern: tuple[int, int],
    blocks: Blocks,
    interpret: bool | pltpu.InterpretParams,
) -> Any:
    """The `pl.pallas_call` over rows of x, outputs and groups, these innermost."""
    (n, m), b = pattern, blocks
    planes = lambda length: pl.BlockSpec(
        (n, b.groups * length // groups, b.outputs), lambda i, j, l: (0, l, j)
    )
    side = pl.BlockSpec(
        (max(1, b.groups // scale_rows), b.outputs),
        lambda i, j, l: (l if scale_rows < groups else 0, j),
    )
    kernel = functools.partial(_kernel, fmt=fmt, n=n, m=m, scale_rows=scale_rows)
    return pl.pallas_call(
        kernel,
        name=f"nm_sparse_matmul_{fmt.name if fmt else stored[0].dtype}",
        out_shape=jax.ShapeDtypeStruct((rows, outputs), jnp.float32),
        grid=(rows // b.rows, pl.cdiv(outputs, b.outputs), groups // b.groups),
        in_specs=[
            pl.BlockSpec((m, b.rows, b.groups), lambda i, j, l: (0, i, l)),
            planes(groups * width(index_format(m)) // 32),
            planes(stored[0].shape[1]),
            *[side] * (len(stored) - 1),
        ],
        out_specs=pl.BlockSpec((b.rows, b.outputs), lambda i, j, l: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(
    x_ref: Any,
    places_ref: Any,
    *refs: Any,
    fmt: Format | None,
    n: int,
    m: int,
    scale_rows: int,
) -> None:
    """Add the products of one block of groups to the result."""
    *stored, out_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    index = width(index_format(m))
    for first in range(0, out_ref.shape[1], PIECE):
        at = pl.ds(first, PIECE)
        codes = [decode.integers(places_ref[i, :, at], bits=index) for i in range(n)]
        values = [_values(stored, i, at, fmt, scale_rows) for i in range(n)]
        total = jnp.zeros((out_ref.shape[0], PIECE), jnp.float32)
        places = [c.astype(jnp.int32) for c in codes]
        for j, w in enumerate(expand(values, places, n, m, first=_first(m))):
            total += _dot(x_ref[j], w.astype(x_ref.dtype))
        out_ref[:, at] += total


def _first(m: int) -> int:
    """The signed code of a group's first place."""
    bits = index_format(m).bits
    return -(2 ** (bits - 1)) if bits == width(index_format(m)) else 0


def _values(
    stored: list[Any], plane: int, at: Any, fmt: Format | None, scale_rows: int
) -> jax.Array:
    """``float32[groups, PIECE]`` of one plane of kept weights."""
    if fmt is None:
        return stored[0][plane, :, at].astype(jnp.float32)
    words, *sides = stored
    values = decode.values(words[plane, :, at], fmt, dtype=jnp.float32)
    scale, *zero = [side[:, at] for side in sides]
    pieces = []
    for i in range(scale.shape[0]):
        piece = values[i * scale_rows : (i + 1) * scale_rows]
        if zero:
            piece -= zero[0][i : i + 1]
        pieces.append(piece * scale[i : i + 1])
    return jnp.concatenate(pieces, axis=0)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
