"""What the operations of `_gpu_registers` mean, for interpretation on a CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas._gpu_words import BLOCK, THREADS


def fragment(slots: list[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
    """What the threads' registers mean as a matrix.

    Args:
      slots: ``16 / B`` arrays ``int32[B, 128]``; of each thread's words in turn, the
        two 16-bit values of one pair.
      dtype: The 16-bit type of the values.

    Returns:
      ``dtype[64, 64]``, outputs by inputs.
    """
    bits = slots[0].shape[0]
    vector = min(bits, 4)
    pairs = jnp.stack(slots, axis=-1)
    pairs = pairs.reshape(bits // vector, THREADS, vector, -1).swapaxes(0, 1)
    values = jax.lax.bitcast_convert_type(pairs, dtype)
    axes = values.reshape(4, 8, 4, 4, 2, 2, 2).transpose(0, 5, 1, 3, 4, 2, 6)
    return axes.reshape(BLOCK, BLOCK)


def permute_bytes(low: jax.Array, high: jax.Array, selector: jax.Array) -> jax.Array:
    """The PTX instruction ``prmt.b32`` on selectors below 8.

    Args:
      low: ``int32[...]``, bytes 0 to 3.
      high: ``int32[...]``, bytes 4 to 7.
      selector: ``int32[...]``; nibble ``i`` of its low half chooses byte ``i``.
    """
    result = jnp.zeros_like(selector)
    for i in range(4):
        at = jax.lax.shift_right_logical(selector, jnp.int32(4 * i)) & 7
        source = jnp.where(at < 4, low, high)
        byte = jax.lax.shift_right_logical(source, 8 * (at & 3)) & 255
        result |= byte << 8 * i
    return result
