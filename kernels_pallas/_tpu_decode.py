"""Codes in int32 words to values, inside a Mosaic TPU kernel.

A word block is ``int32[k B / 32, n]``: word ``r`` of a column holds the codes of rows
``32 r / B`` and on, lowest bits first, which is how the chip's bitcast from 32-bit
words to ``B``-bit rows orders them, so that decoding moves no data across sublanes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.formats import Float8, Format, Table
from kernels_pallas.layouts import width

LANES = 128
TABLE_BITS = 4
_CODES = {2: jnp.int2, 4: jnp.int4, 8: jnp.int8}


def integers(words: jax.Array, *, bits: int) -> jax.Array:
    """The codes of a block as two's-complement integers.

    Args:
      words: ``int32[k * bits / 32, n]``.
      bits: 2, 4 or 8. Static. (The compiler aborts on 2 for TPU v4.)

    Returns:
      ``int2``, ``int4`` or ``int8`` ``[k, n]``.
    """
    return pltpu.bitcast(words, _CODES[bits])


def values(words: jax.Array, fmt: Format, *, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What the codes of a block stand for, before scale and zero point.

    Args:
      words: ``int32[k * width(fmt) / 32, n]``, ``n`` a multiple of 128.
      fmt: What the codes stand for. Static.
      dtype: ``bfloat16`` or ``float32``. Static. Integers, fp8 and fp4 are exact in
        both; the entries of other tables are rounded to it.

    Returns:
      ``dtype[k, n]``, in multiples of `unit`.
    """
    if isinstance(fmt, Float8):
        return pltpu.bitcast(words, jnp.dtype(fmt.dtype)).astype(dtype)
    codes = integers(words, bits=width(fmt))
    if not isinstance(fmt, Table):
        return codes.astype(dtype)
    entries = codes.astype(jnp.int8) & jnp.int8(2**fmt.bits - 1)
    multiples = np.array(fmt.values) / unit(fmt)
    if _are_bytes(multiples):
        return _looked_up(entries, multiples.astype(np.int8)).astype(dtype)
    return _by_bytes(entries, multiples.astype(dtype))


@functools.cache
def unit(fmt: Format) -> float:
    """A power of two of which a table's entries are multiples of 8 bits, else 1.

    Examples:
      >>> from kernels_pallas.formats import FP4_E2M1, INT4, NF4
      >>> unit(FP4_E2M1), unit(NF4), unit(INT4)
      (0.0625, 1.0, 1.0)
    """
    if not isinstance(fmt, Table):
        return 1.0
    _, exponent = np.frexp(np.abs(fmt.values).max())
    step = float(np.ldexp(1.0, exponent - 7))
    return step if _are_bytes(np.array(fmt.values) / step) else 1.0


def _are_bytes(values: np.ndarray) -> bool:
    """Whether all are integers of 8 bits."""
    return bool((values == values.astype(np.int8)).all())


def _by_bytes(entries: jax.Array, table: np.ndarray) -> jax.Array:
    """``table[entries]``, a byte of its bits at a time.

    The chip gathers bytes, four times as many at once as words.
    """
    size = table.dtype.itemsize
    word = jnp.dtype(f"int{8 * size}")
    bits = jnp.zeros(entries.shape, word)
    for i, plane in enumerate(table.view(np.int8).reshape(-1, size).T):
        byte = _looked_up(entries, plane).astype(word)
        kept = byte if i == size - 1 else byte & word.type(255)
        bits |= kept << word.type(8 * i)
    return pltpu.bitcast(bits, table.dtype)


def _looked_up(entries: jax.Array, table: np.ndarray) -> jax.Array:
    """``table[entries]`` of int8, from the lanes of a row: at most 128 entries."""
    rows, columns = entries.shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = jnp.zeros((1, LANES), jnp.int32)
    # A kernel has no array constants: the row is made entry by entry.
    for code, value in enumerate(table):
        row = jnp.where(lane == code, jnp.int32(value), row)
    table_rows = jnp.broadcast_to(row, (rows, LANES)).astype(jnp.int8)
    pieces = [
        _gather(table_rows, entries[:, i : i + LANES]) for i in range(0, columns, LANES)
    ]
    return jnp.concatenate(pieces, axis=1)


def _gather(table: jax.Array, entries: jax.Array) -> jax.Array:
    """``table[i, entries[i, j]]``; `jnp.take_along_axis` would check for negatives."""
    return jax.lax.gather(
        table,
        entries[..., None],
        jax.lax.GatherDimensionNumbers(
            offset_dims=(),
            collapsed_slice_dims=(1,),
            start_index_map=(1,),
            operand_batching_dims=(0,),
            start_indices_batching_dims=(0,),
        ),
        slice_sizes=(1, 1),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
