"""MurmurHash3 in `jax.numpy`: which shared value stands at a place of a weight.

The hash of a place is MurmurHash3_x86_32 of eight bytes, the row and the column as
little-endian uint32. Bit 31 is the sign, the other bits modulo a count the bucket.

References:
  Appleby, `MurmurHash3 <https://github.com/aappleby/smhasher>`_, 2011, public domain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_U = np.uint32


def murmur3(*words: jax.Array, seed: int = 0) -> jax.Array:
    """MurmurHash3_x86_32 of a key of whole words.

    Args:
      words: ``uint32[...]`` each, the key's words in order; they broadcast.
      seed: 0 to ``2**32 - 1``. Static.

    Returns:
      ``uint32[...]``.

    Examples:
      >>> key = int.from_bytes(b"test", "little")
      >>> hex(int(murmur3(jnp.uint32(key))))
      '0xba6bd213'
    """
    h = jnp.full_like(words[0], _U(seed))
    for word in words:
        h = _rotate(h ^ _scrambled(word), 13) * _U(5) + _U(0xE6546B64)
    return _finished(h ^ _U(4 * len(words)))


def bucket(h: jax.Array, count: int) -> jax.Array:
    """Which of `count` buckets a hash falls in, by its lower 31 bits.

    Args:
      h: ``uint32[...]``.
      count: 1 to ``2**31``. Static.

    Returns:
      ``int32[...]`` below `count`.
    """
    low = jax.lax.bitcast_convert_type(h & _U(0x7FFFFFFF), jnp.int32)
    if count & (count - 1) == 0:
        return low & np.int32(count - 1)
    return jax.lax.rem(low, jnp.full_like(low, count))


def negative(h: jax.Array) -> jax.Array:
    """Whether a hash's sign bit is set: ``bool[...]``."""
    return jax.lax.bitcast_convert_type(h, jnp.int32) < 0


def _scrambled(word: jax.Array) -> jax.Array:
    return _rotate(word * _U(0xCC9E2D51), 15) * _U(0x1B873593)


def _rotate(word: jax.Array, left: int) -> jax.Array:
    return (word << _U(left)) | (word >> _U(32 - left))


def _finished(h: jax.Array) -> jax.Array:
    """The finalizer, ``fmix32``."""
    h = (h ^ (h >> _U(16))) * _U(0x85EBCA6B)
    h = (h ^ (h >> _U(13))) * _U(0xC2B2AE35)
    return h ^ (h >> _U(16))
