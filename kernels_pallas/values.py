"""Stored values, be they floats or codes with scales, and their cotangents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul.reference import dequantize


def dense_values(
    values: jax.Array | Weight, fmt: Format | None, count: int
) -> jax.Array:
    """``float[..., count]`` of portable values."""
    if isinstance(values, Weight):
        assert fmt is not None
        return dequantize(values, fmt, k=count)
    return values


def floats(values: jax.Array | Weight) -> Any:
    """What of the values has a gradient: the blocks, or scales and zero points."""
    if not isinstance(values, Weight):
        return values
    zero = values.zero
    integer = zero is None or not jnp.issubdtype(zero.dtype, jnp.floating)
    return values.scale, None if integer else zero


def with_floats(values: jax.Array | Weight, given: Any) -> jax.Array | Weight:
    """`values` with what `floats` found replaced."""
    if not isinstance(values, Weight):
        return given
    scale, zero = given
    return Weight(values.words, scale, values.zero if zero is None else zero)
