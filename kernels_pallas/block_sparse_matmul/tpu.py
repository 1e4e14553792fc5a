"""Block-sparse matmul on a TPU: the columns, in scalar memory, pick the blocks of x.

x stays in VMEM, whole rows of it at a time, and one block of zeros after its last: what
an empty place multiplies. Steps past the last block of their rows read nothing new and
compute nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _tpu_decode as decode
from kernels_pallas.block_sparse_matmul.layout import BlockSparse, block_shape, slots
from kernels_pallas.formats import Format, Integer
from kernels_pallas.layouts import TPU, Weight, width

SUBLANES = 16
"""Rows of a bfloat16 tile: M is padded to a multiple of it."""

X_BYTES = 2 * 2**20
"""Of rows of x in VMEM, twice: those of the next step are copied meanwhile."""

STEP_BYTES = 2**20
"""Of blocks that a grid step reads: enough to stream at the memory's rate."""

UNROLLED = 32
"""Products of a grid step, at most: each is code of its own."""

SCALAR_BYTES = 2**19
"""For columns, of the 1 MiB of scalar memory."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """What one grid step works on.

    Attributes:
      m: Rows of x.
      rows: Rows of blocks.
      places: Places of each row.
    """

    m: int
    rows: int
    places: int


def steps_for(m: int, k: int, rows: int, places: int, block_bytes: int) -> Steps:
    """Steps of about `STEP_BYTES`, with whole rows where these are small enough.

    Args:
      m: Rows of x.
      k: Bytes of a row of x.
      rows: Rows of blocks of the weight.
      places: Places of a row.
      block_bytes: Of one stored block.
    """
    fits = max(1, min(UNROLLED, STEP_BYTES // block_bytes))
    at_once = min(places, fits)
    rows = min(rows, max(1, fits // places))
    held = max(SUBLANES, min(256, X_BYTES // k // SUBLANES * SUBLANES))
    return Steps(min(held, -(-m // SUBLANES) * SUBLANES), rows, at_once)


def refusal(k: int, block: tuple[int, int], places: int, itemsize: int) -> str | None:
    """Why the kernel does not take a weight; None if it does.

    Args:
      k: Inputs.
      block: ``(bn, bk)``.
      places: Rows of blocks times places of each.
      itemsize: Bytes of a number of x.
    """
    bn, bk = block
    if bn % TPU.tile_n or bk % TPU.tile_k:
        return f"blocks of {bn} x {bk} are no multiples of {TPU.tile_n} x {TPU.tile_k}"
    if 4 * places > SCALAR_BYTES:
        return f"{places} columns do not fit in scalar memory"
    if SUBLANES * (k + 2 * bk) * itemsize > X_BYTES:
        return f"{SUBLANES} rows of {k} inputs do not fit in VMEM"
    if bn * bk * itemsize > STEP_BYTES:
        return f"a block of {bn} x {bk} does not fit in a step"
    return None


def block_sparse_matmul(
    x: jax.Array,
    weight: BlockSparse,
    fmt: Format | None,
    *,
    steps: Steps | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiply by the blocks that are there.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``.
      weight: ``[N, K]``, blocks of multiples of 128; codes in the layout of the TPU.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      steps: What a grid step works on; by default `steps_for`. Static.
      interpret: Run on a CPU: True, or the parameters of the TPU interpreter. Static.

    Returns:
      ``float32[M, R bn]``. Products are of float32 if x or floating values are, else
      of bfloat16: exact for integers and floats, tables rounded.

    References:
      Gale et al., `Sparse GPU Kernels for Deep Learning
      <https://arxiv.org/abs/2006.10901>`_, 2020, for the aim.
    """
    values, columns = weight
    bn, bk = block_shape(values, fmt, TPU)
    (m, k), (rows, places) = x.shape, columns.shape
    blocks = -(-k // bk)
    if not isinstance(values, Weight):
        x = x.astype(jnp.promote_types(x.dtype, values.dtype))
        values = values.astype(x.dtype)
    stored = _arrays(values, fmt)
    if steps is None:
        size = max(1, stored[0].nbytes // (rows * places))
        steps = steps_for(m, (blocks + 1) * bk * x.dtype.itemsize, rows, places, size)
    x = jnp.pad(x, ((0, -m % steps.m), (0, (blocks + 1) * bk - k)))
    at = jnp.pad(
        slots(columns, blocks),
        ((0, -rows % steps.rows), (0, 0)),
        constant_values=blocks,
    )
    call = _call(x, stored, fmt, (bn, bk), steps, (rows, places), interpret)
    return call(at.reshape(-1), _last(at, blocks, steps), x, *stored)[:m]


def _arrays(values: jax.Array | Weight, fmt: Format | None) -> list[jax.Array]:
    """What the kernel reads of the values: floats, or words and their sides."""
    if not isinstance(values, Weight):
        return [values]
    words, scale, zero = values
    if zero is None and isinstance(fmt, Integer) and not fmt.signed:
        shift = 2 ** (fmt.bits - 1) if fmt.bits == width(fmt) else 0
        zero = jnp.full_like(scale, -shift)
    return [a for a in (words, scale, zero) if a is not None]


def _last(at: jax.Array, blocks: int, steps: Steps) -> jax.Array:
    """``int32[groups of rows]``: the last step that has a block; -1 if none has."""
    at = at.reshape(-1, steps.rows, at.shape[-1])
    place = jax.lax.broadcasted_iota(jnp.int32, at.shape, 2)
    found = jnp.where(at < blocks, place // jnp.int32(steps.places), jnp.int32(-1))
    return found.max((1, 2))


def _call(
    x: jax.Array,
    stored: list[jax.Array],
    fmt: Format | None,
    block: tuple[int, int],
    steps: Steps,
    shape: tuple[int, int],
    interpret: bool | pltpu.InterpretParams,
) -> Any:
    """The `pl.pallas_call` over rows of x, rows of blocks and their places."""
    (rows, places), columns = shape, steps.rows * block[0]

    def at(i: Any, j: Any, l: Any, slots: Any, last: Any) -> tuple[Any, ...]:
        del i, slots
        return j, jnp.minimum(l, jnp.maximum(last[j], 0)), 0, 0

    return pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, bk=block[1], places=places),
        name=f"block_sparse_matmul_{fmt.name if fmt else x.dtype}",
        out_shape=jax.ShapeDtypeStruct((x.shape[0], rows * block[0]), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(
                x.shape[0] // steps.m,
                pl.cdiv(rows, steps.rows),
                pl.cdiv(places, steps.places),
            ),
            in_specs=[
                pl.BlockSpec((steps.m, x.shape[1]), lambda i, j, l, *_: (i, 0)),
                *(
                    pl.BlockSpec((steps.rows, steps.places, *a.shape[-2:]), at)
                    for a in stored
                ),
            ],
            out_specs=pl.BlockSpec((steps.m, columns), lambda i, j, l, *_: (i, j)),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(
    slots_ref: Any,
    last_ref: Any,
    x_ref: Any,
    *refs: Any,
    fmt: Format | None,
    bk: int,
    places: int,
) -> None:
    """Add the products of some places of some rows of blocks to the result."""
    *stored, out_ref = refs
    group, step = pl.program_id(1), pl.program_id(2)
    rows, at_once = stored[0].shape[:2]
    bn = out_ref.shape[1] // rows

    @pl.when(step == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    def add(count: int) -> None:
        for row in range(rows):
            first = (group * rows + row) * places + step * at_once
            total = jnp.zeros((x_ref.shape[0], bn), jnp.float32)
            for i in range(count):
                start = pl.multiple_of(slots_ref[first + i] * bk, decode.LANES)
                x = x_ref[:, pl.ds(start, bk)]
                total += _product(x, [a[row, i] for a in stored], fmt)
            out_ref[:, row * bn : (row + 1) * bn] += total

    tail = places % at_once
    whole = step < places // at_once
    present = step <= last_ref[group]
    pl.when(present & whole)(lambda: add(at_once))
    if tail:
        pl.when(present & ~whole)(lambda: add(tail))


def _product(x: jax.Array, stored: list[jax.Array], fmt: Format | None) -> jax.Array:
    """``float32[m, bn]`` of one block."""
    if fmt is None:
        return _dot(x, stored[0], 1)
    words, scale, *zero = stored
    product = _dot(x, decode.values(words, fmt, dtype=x.dtype), 0)
    if zero:
        product -= jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) * zero[0]
    return product * scale


def _dot(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(
        x, w, dims, precision=precision, preferred_element_type=jnp.float32
    )
