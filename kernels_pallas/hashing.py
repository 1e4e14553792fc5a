"""xxHash32 in `jax.numpy`: which shared value stands at a place of a weight.

The key of a place is eight bytes: row and column as little-endian uint32. Its bucket is
``xxh32(key, seed) mod count``; its sign, set for minus, is bit 31 of
``xxh32(key, (seed + 0x9E3779B1) mod 2**32)``. Any implementation of xxHash finds both.

References:
  Collet, `xxHash fast digest algorithm, specification 0.1.1
  <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>`_, XXH32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_U = np.uint32
PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)
_P1, _P2, _P3, _P4, _P5 = map(_U, PRIMES)

MOST = 2**30
"""Buckets at most."""

State = tuple[jax.Array, jax.Array]
"""The hashes of bucket and sign of a row, which its columns share."""


def xxhash32(*words: jax.Array, seed: int = 0) -> jax.Array:
    """XXH32 of a key of one to three whole words.

    Args:
      words: ``uint32[...]`` each, the key's words in order; they broadcast.
      seed: 0 to ``2**32 - 1``. Static.

    Returns:
      ``uint32[...]``.

    Examples:
      >>> key = int.from_bytes(b"test", "little")
      >>> hex(int(xxhash32(jnp.uint32(key))))
      '0x3e2023cf'
    """
    h = _begun(seed, len(words))
    for word in words:
        h = _absorbed(h, word)
    return _finished(h)


def sign_seed(seed: int) -> int:
    """The seed of the signs."""
    return (seed + PRIMES[0]) % 2**32


def row_state(row: jax.Array, *, seed: int) -> State:
    """What is hashed once for a row of places.

    Args:
      row: ``uint32[...]``.
      seed: 0 to ``2**32 - 1``. Static.
    """
    first, second = (_absorbed(_begun(s, 2), row) for s in (seed, sign_seed(seed)))
    return first, second


def place(
    state: State, column: jax.Array, *, count: int, linear: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Bucket and sign of places.

    Args:
      state: Of their rows.
      column: ``uint32[...]``; broadcasts against the rows.
      count: Buckets. Static.
      linear: As for `bucket`. Static.

    Returns:
      ``int32[...]`` below `count`, and ``bool[...]``: whether the value is negated.
    """
    h, sign = (_finished(_absorbed(s, column)) for s in state)
    return bucket(h, count, linear=linear), _signed(sign) < 0


def bucket(h: jax.Array, count: int, *, linear: bool = False) -> jax.Array:
    """Which of `count` buckets a hash falls in.

    Args:
      h: ``uint32[...]``.
      count: 1 to ``2**30``. Static.
      linear: By a table that grows by one bucket at a time: modulo the next power of
        two above `count`, or where there is no such bucket yet, modulo half of it.
        Otherwise modulo `count`. Static.

    Returns:
      ``int32[...]`` below `count`.

    References:
      Litwin, Linear hashing: a new tool for file and table addressing, VLDB 1980.
    """
    low = _signed(h & _U(0x7FFFFFFF))
    if count & (count - 1) == 0:
        return low & np.int32(count - 1)
    if linear:
        whole = 1 << count.bit_length()
        at = low & np.int32(whole - 1)
        return jnp.where(at < count, at, at & np.int32(whole // 2 - 1))
    # In signed arithmetic, which every back end has: bit 31 apart.
    rest = jax.lax.rem(low, jnp.full_like(low, count))
    rest = rest + jnp.where(_signed(h) < 0, np.int32(2**31 % count), np.int32(0))
    return jnp.where(rest >= count, rest - np.int32(count), rest)


def _begun(seed: int, words: int) -> Any:
    return _U((seed + PRIMES[4] + 4 * words) % 2**32)


def _absorbed(h: Any, word: jax.Array) -> jax.Array:
    return _rotate(word * _P3 + h, 17) * _P4


def _rotate(word: jax.Array, left: int) -> jax.Array:
    return (word << _U(left)) | (word >> _U(32 - left))


def _finished(h: jax.Array) -> jax.Array:
    """The final mix."""
    h = (h ^ (h >> _U(15))) * _P2
    h = (h ^ (h >> _U(13))) * _P3
    return h ^ (h >> _U(16))


def _signed(h: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(h, jnp.int32)
