"""Codes in int32 words to values, inside a Mosaic TPU kernel.

A word block is ``int32[k B / 32, n]``: word ``r`` of a column holds the codes of rows
``32 r / B`` and on, lowest bits first, which is how the chip's bitcast from 32-bit
words to ``B``-bit rows orders them, so that decoding moves no data across sublanes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
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


def values(words: jax.Array, fmt: Format, *, dtype: jnp.dtype) -> jax.Array:
    """What the codes of a block stand for, before scale and zero point.

    Args:
      words: ``int32[k * width(fmt) / 32, n]``, ``n`` a multiple of 128.
      fmt: What the codes stand for. Static.
      dtype: ``bfloat16`` or ``float32``. Static. Integers, fp8 and fp4 are exact in
        both; the entries of other tables are rounded to it.

    Returns:
      ``dtype[k, n]``.
    """
    if isinstance(fmt, Float8):
        return pltpu.bitcast(words, jnp.dtype(fmt.dtype)).astype(dtype)
    codes = integers(words, bits=width(fmt))
    if isinstance(fmt, Table):
        return _looked_up(codes, fmt).astype(dtype)
    return codes.astype(dtype)


def _looked_up(codes: jax.Array, fmt: Table) -> jax.Array:
    """float32 entries of a table of at most 16, gathered from the lanes of a row.

    A gather of 1024 entries costs two permutes; a tree of selects 23 vector operations.
    """
    rows, columns = codes.shape
    entries = codes.astype(jnp.int32) & (2**fmt.bits - 1)
    table = jnp.broadcast_to(_table(fmt), (rows, LANES))
    gather = lambda at: jnp.take_along_axis(table, at, axis=1, mode="promise_in_bounds")
    pieces = [gather(entries[:, i : i + LANES]) for i in range(0, columns, LANES)]
    return jnp.concatenate(pieces, axis=1)


def _table(fmt: Table) -> jax.Array:
    """``float32[1, 128]``: a kernel has no array constants, so entry by entry."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    row = jnp.zeros((1, LANES), jnp.float32)
    for code, value in enumerate(fmt.values):
        row = jnp.where(lane == code, jnp.float32(value), row)
    return row
