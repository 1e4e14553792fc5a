"""Codes of 1 to 8 bits as a little-endian bit stream along the last axis.

``code[i]`` occupies bits ``[i * bits, (i + 1) * bits)`` of the stream, bit 0 being
the lowest bit of byte 0; for 4 bits that is the low nibble first. The stream is
padded with zeros to whole bytes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def packed_length(count: int, *, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits occupy."""
    return -(-count * bits // 8)


def pack(codes: jax.Array, *, bits: int) -> jax.Array:
    """Pack codes along the last axis.

    Args:
      codes: ``integer[..., n]``; the low `bits` bits of each are kept, so signed
        codes are stored in two's complement.
      bits: Bits a code, 1 to 8. Static.

    Returns:
      ``uint8[..., ceil(n * bits / 8)]``.

    Examples:
      >>> pack(jnp.array([1, 2, -1], jnp.int8), bits=4).tolist()
      [33, 15]
    """
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    codes = codes & jnp.uint8(2**bits - 1)
    per, span = _period(bits)
    *lead, n = codes.shape
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -n % per)])
    codes = codes.reshape(*lead, -1, per).astype(jnp.uint16)
    words = [jnp.zeros(codes.shape[:-1], jnp.uint16) for _ in range(span)]
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        placed = codes[..., i] << jnp.uint16(shift)
        words[byte] |= placed & jnp.uint16(255)
        if shift + bits > 8:
            words[byte + 1] |= placed >> jnp.uint16(8)
    stream = jnp.stack(words, axis=-1).astype(jnp.uint8).reshape(*lead, -1)
    return stream[..., : packed_length(n, bits=bits)]


def unpack(words: jax.Array, *, bits: int, count: int) -> jax.Array:
    """The first `count` codes of a packed stream, unsigned: the inverse of `pack`.

    Args:
      words: ``uint8[..., bytes]``.
      bits: Bits a code, 1 to 8. Static.
      count: Codes to read. Static.

    Returns:
      ``uint8[..., count]``, each below ``2**bits``.

    Raises:
      TypeError: If `words` is not ``uint8``: arithmetic over the tree corrupted it.

    Examples:
      >>> unpack(jnp.array([33, 15], jnp.uint8), bits=4, count=3).tolist()
      [1, 2, 15]
    """
    if words.dtype != jnp.uint8:
        raise TypeError(
            f"unpack: words must be uint8; got {words.dtype}. Arithmetic over a tree "
            "of compressed leaves (x * 2, averaging) corrupts codes: act on the params "
            "before `compress`."
        )
    if bits == 8:
        return words[..., :count]
    codes = jnp.stack(planes(words, bits=bits, count=count), axis=-1)
    return codes.reshape(*codes.shape[:-2], -1)[..., :count]


def planes(words: jax.Array, *, bits: int, count: int) -> list[jax.Array]:
    """The codes of a packed stream by their place in its period.

    Args:
      words: ``uint8[..., bytes]``.
      bits: Bits a code, 1 to 8. Static.
      count: Codes to read. Static.

    Returns:
      `period` arrays ``uint8[..., ceil(count / period)]``: plane ``i`` holds codes
      ``i``, ``i + period`` and so on; what lies past the stream is zero.

    Examples:
      >>> [p.tolist() for p in planes(jnp.array([33, 15], jnp.uint8), bits=4, count=3)]
      [[1, 15], [2, 0]]
    """
    per, span = _period(bits)
    length = -(-count // per)
    missing = max(0, length * span - words.shape[-1])
    words = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, missing)])
    parts = [words[..., i : length * span : span] for i in range(span)]
    codes = []
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        code = parts[byte] >> jnp.uint8(shift)
        if shift + bits > 8:
            code |= parts[byte + 1] << jnp.uint8(8 - shift)
        codes.append(code & jnp.uint8(2**bits - 1))
    return codes


def period(bits: int) -> int:
    """Codes after which the stream begins a byte again."""
    return _period(bits)[0]


def _period(bits: int) -> tuple[int, int]:
    """Codes and bytes after which the stream's phase repeats."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
