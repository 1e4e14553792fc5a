"""Rounding to integers, the step that every number format shares."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Rounding = Literal["nearest", "stochastic", "toward_zero"]
ROUNDINGS = ("nearest", "stochastic", "toward_zero")


def round_to_integer(
    x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
) -> jax.Array:
    r"""Round to an integer, in `x`'s dtype.

    Nearest rounds ties to even; stochastic rounds up where uniform noise lies below
    the fraction, :math:`\lfloor x \rfloor + [u < x - \lfloor x \rfloor]`, unbiased;
    toward zero truncates.

    Args:
      x: Float array.
      rounding: Static.
      noise: Uniform in [0, 1), of `x`'s shape; needed by stochastic rounding.

    Examples:
      >>> round_to_integer(jnp.array([0.5, 1.5, -1.7]), "nearest").tolist()
      [0.0, 2.0, -2.0]
      >>> round_to_integer(jnp.array([0.5, 1.5, -1.7]), "toward_zero").tolist()
      [0.0, 1.0, -1.0]

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015, section 3.1 (stochastic rounding).
    """
    if rounding == "nearest":
        return jnp.round(x)
    if rounding == "toward_zero":
        return jnp.trunc(x)
    assert noise is not None
    low = jnp.floor(x)
    return low + (noise < x - low).astype(x.dtype)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """``2.0 ** exponent`` exactly, for integer exponents in [-126, 127]."""
    bits = (exponent.astype(jnp.int32) + 127) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def floor_log2(x: jax.Array) -> jax.Array:
    """``floor(log2(x))`` of positive normal float32, exactly; -127 of smaller ones."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return ((bits >> 23) & 255) - 127


# Units in the last place of float32 by which a quotient may be wrong: XLA divides by
# multiplying with a reciprocal.
_SLACK = 4
_DROPPED_BITS = {"float32": 8, "bfloat16": 16, "float16": 13}
_LARGEST_SCALE = {"float32": 0x7F7FFF00, "bfloat16": 0x7F7F0000, "float16": 0x477FE000}


def round_scale(
    scale: jax.Array, dtype: str, direction: Literal["up", "down", "nearest"]
) -> jax.Array:
    """Round positive float32 to 16 significant bits, or fewer if `dtype` has fewer.

    Any code times such a scale is exact in float32, so that quantizing what was
    dequantized finds the same scale and the same codes: a projection, to the bit.
    Saturates at the largest such number of the dtype.

    Args:
      scale: Not negative.
      dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      direction: ``"up"``: the largest weight stays within the grid; ``"down"``: it
        reaches the grid's end, also if codes are truncated.
    """
    step = 1 << _DROPPED_BITS[dtype]
    carry = {"up": step - 1 - _SLACK, "down": _SLACK, "nearest": step // 2}[direction]
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    bits = jnp.minimum(bits, jnp.uint32(_LARGEST_SCALE[dtype])) + jnp.uint32(carry)
    bits = jnp.minimum(bits & jnp.uint32(2**32 - step), _LARGEST_SCALE[dtype])
    rounded = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)
    return rounded.astype(dtype)


def divisor(scale: jax.Array) -> jax.Array:
    """The scale, or infinity where it is zero: whatever it divides gets code zero."""
    return jnp.where(scale > 0, scale, jnp.full_like(scale, jnp.inf))
