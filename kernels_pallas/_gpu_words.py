"""The order of codes inside the words that the H200 kernel reads.

``words`` is ``int32[N' / 64, 2 K' B]``: strips of 64 outputs, each block after block
of 64 inputs (``[B, 128]`` words), in the order in which the 128 threads of a
warpgroup hold wgmma's operand A. So a thread reads its codes by loads of 16 bytes
without bank conflicts, and every pair of codes falls into the two halves of one
register without a shuffle.

Thread ``32 p + 4 r + q`` of a block holds the 16 pairs ``P = 4 s + 2 c + h``: outputs
``16 p + 8 h + r``, inputs ``16 s + 8 c + 2 q`` and the next one. Pair ``P`` occupies,
in word ``P // (16 / B)`` of the thread and with ``i = P % (16 / B)``, the bits
``B i`` and on (its first code) and ``16 + B i`` and on (its second). Word ``V a + b``
of thread ``t``, with ``V = min(B, 4)``, is word ``V (128 a + t) + b`` of the block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 64
THREADS = 128
PAIRS = 16


def arrange(codes: jax.Array, *, bits: int) -> jax.Array:
    """Codes in the order of the kernel.

    Args:
      codes: ``uint8[N', K']``, both multiples of 64; the low `bits` bits are kept.
      bits: ``B``, bits of a stored code: 2, 4 or 8. Static.

    Returns:
      ``int32[N' / 64, 2 K' B]``.
    """
    n, k = codes.shape
    kept = codes.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    axes = kept.reshape(n // BLOCK, 4, 2, 8, k // BLOCK, 4, 2, 4, 2)
    # [N / 64, K / 64, thread = (p, r, q), P = (s, c, h), half]
    axes = axes.transpose(0, 4, 1, 3, 7, 5, 6, 2, 8)
    pairs = axes.reshape(n // BLOCK, k // BLOCK, THREADS, bits, PAIRS // bits, 2)
    words = (pairs << _shifts(bits)).sum(axis=(-2, -1), dtype=jnp.uint32)
    vector = min(bits, 4)
    words = words.reshape(*words.shape[:3], bits // vector, vector).swapaxes(2, 3)
    words = words.reshape(n // BLOCK, -1)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def restore(words: jax.Array, *, bits: int) -> jax.Array:
    """The inverse of `arrange`: ``uint8[N', K']``."""
    rows, columns = words.shape[0], words.shape[1] // (THREADS * bits)
    vector = min(bits, 4)
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    words = words.reshape(rows, columns, bits // vector, THREADS, vector)
    words = words.swapaxes(2, 3).reshape(rows, columns, THREADS, bits, 1, 1)
    pairs = (words >> _shifts(bits)) & jnp.uint32(2**bits - 1)
    axes = pairs.reshape(rows, columns, 4, 8, 4, 4, 2, 2, 2)
    axes = axes.transpose(0, 2, 7, 3, 1, 5, 6, 4, 8)
    return axes.reshape(rows * BLOCK, columns * BLOCK).astype(jnp.uint8)


def _shifts(bits: int) -> jax.Array:
    """Where the codes of pair ``i`` lie in a word: ``uint32[16 / B, 2]``."""
    first = bits * jnp.arange(PAIRS // bits, dtype=jnp.uint32)
    return jnp.stack([first, first + jnp.uint32(16)], axis=-1)[None, None, None, None]
