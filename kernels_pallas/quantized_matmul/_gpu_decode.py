"""Words of the H200 layout to the 16-bit operand of the tensor cores, in registers.

Two codes are widened at once, in the halves of a 32-bit register, without conversion
instructions: a code becomes the mantissa of a float whose exponent makes one step worth
one (Kim et al., `Who Says Elephants Can't Run <https://arxiv.org/abs/2211.10017>`_,
2022, section 3.3), an FP8 number is shifted into place and multiplied by a power of
two, and a table is looked up with byte permutations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import _gpu_words
from kernels_pallas.formats import Float8, Format, Integer, Table

Assemble = Callable[[list[jax.Array], jax.typing.DTypeLike], jax.Array]
Permute = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_EXPONENT = {jnp.dtype(jnp.bfloat16): (7, 0x4300), jnp.dtype(jnp.float16): (10, 0x6400)}
"""Bits of the mantissa, and the bits of ``2**mantissa``: a step there is one."""


def decode(
    words: jax.Array,
    fmt: Format,
    dtype: jax.typing.DTypeLike,
    *,
    assemble: Assemble,
    permute: Permute,
    zero: jax.Array,
) -> jax.Array:
    """The values of a block of codes.

    Args:
      words: ``int32[B, 128]``, a block of `_gpu_words.arrange`.
      fmt: What the codes stand for.
      dtype: ``bfloat16`` or ``float16``.
      assemble: `fragment` of `_gpu_meaning` or of `_gpu_registers`.
      permute: `permute_bytes` of the same.
      zero: ``int32``, a zero that the compiler does not know: an instruction takes one
        constant, and the assembler would reload the other for each use.

    Returns:
      ``dtype[64, 64]``, outputs by inputs; exact, but for tables, whose entries are
      rounded to `dtype`.
    """
    slots = _gpu_words.PAIRS // words.shape[0]
    if isinstance(fmt, Integer):
        return _integers(words, slots, dtype, assemble, zero)
    if isinstance(fmt, Float8):
        return _float8(words, fmt, dtype, assemble, zero)
    return assemble(_lookup(words, fmt, dtype, permute, zero), dtype)


def _integers(
    words: jax.Array,
    slots: int,
    dtype: jax.typing.DTypeLike,
    assemble: Assemble,
    zero: jax.Array,
) -> jax.Array:
    """Signed integers of ``16 / slots`` bits."""
    bits = _gpu_words.PAIRS // slots
    mantissa, one = _EXPONENT[jnp.dtype(dtype)]
    codes = [_left(words, -bits * i) for i in range(slots)]
    if bits > mantissa:
        masks = _both(0x7F) + zero, _both(0x80) + zero
        low, high = (
            assemble([c & m ^ _both(one) for c in codes], dtype) for m in masks
        )
        return low - high
    sign, mask = 2 ** (bits - 1), 2**bits - 1
    kept = _both(mask) + zero
    biased = assemble([c & kept ^ _both(one + sign) for c in codes], dtype)
    return biased - jnp.asarray(2**mantissa + sign, dtype)


def _float8(
    words: jax.Array,
    fmt: Float8,
    dtype: jax.typing.DTypeLike,
    assemble: Assemble,
    zero: jax.Array,
) -> jax.Array:
    """A narrower float is a wider one of another bias; NaN codes become finite.

    Through ``float16``: as ``bfloat16`` the smallest would be subnormal on the way.
    """
    narrow = jnp.finfo(jnp.dtype(fmt.dtype))
    wide = jnp.finfo(jnp.float16)
    down = 8 - wide.nmant + narrow.nmant
    magnitude, slots = _both(0x7F00 >> down) + zero, []
    for up in (8, 0):
        sign = _left(words, up) & _both(0x8000)
        slots.append(sign | _left(words, up - down) & magnitude)
    values = assemble(slots, jnp.float16)
    if (scale := 2.0 ** (_bias(wide) - _bias(narrow))) != 1:
        values *= jnp.asarray(scale, jnp.float16)
    return values.astype(dtype)


def _lookup(
    words: jax.Array,
    fmt: Table,
    dtype: jax.typing.DTypeLike,
    permute: Permute,
    zero: jax.Array,
) -> list[jax.Array]:
    """Entries of a table of up to 16: bytes by their index, then their 16-bit pairs."""
    entries = np.zeros(16, np.dtype(dtype))
    entries[: len(fmt.values)] = np.asarray(fmt.values)
    bytes_ = entries.view(np.uint8).reshape(-1, 2).T.copy().view(np.uint32)
    planes = [[_word(t) + zero for t in plane] for plane in bytes_]
    index = words & _word(0x77777777)
    upper = _left(words & _word(0x88888888), -1) | _word(0x32103210)
    quads = []
    for shift in (0, -16):
        at, side = _left(index, shift), _left(upper, shift)
        low, high = (
            permute(
                permute(t[0], t[1], at),
                permute(t[2], t[3], at),
                side,
            )
            for t in planes
        )
        quads.append([permute(low, high, _word(s)) for s in (0x5140, 0x7362)])
    return [
        permute(a, b, _word(s))
        for a, b in zip(*quads, strict=True)
        for s in (0x5410, 0x7632)
    ]


def _bias(info: Any) -> int:
    """Of the exponent: the smallest normal number is ``2 ** (1 - bias)``."""
    return 1 - int(info.minexp)


def _left(words: jax.Array, count: int) -> jax.Array:
    """Shift left, or right by minus `count`."""
    if count >= 0:
        return words << _word(count) if count else words
    return jax.lax.shift_right_logical(words, _word(-count))


def _both(half: int) -> jax.Array:
    """A constant in both halves of a register."""
    return _word(half * 0x10001)


def _word(value: int) -> jax.Array:
    return jnp.asarray(np.uint32(value).view(np.int32))
