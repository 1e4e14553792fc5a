"""Matmul of two quantized operands by plain XLA, the contraction minor in both.

This is the form that XLA has fast kernels for on every platform; on a CPU only with two
rows or more, so a single row is doubled.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.formats import Float8, Integer
from kernels_pallas.layouts import Weight
from kernels_pallas.scaled_matmul.rows import operand_dtype, sum_dtype


def scaled_matmul(
    codes: jax.Array, scale: jax.Array, weight: Weight, fmt: Integer | Float8
) -> jax.Array:
    """As the reference.

    Args:
      codes: ``[M, K]`` in the operand dtype.
      scale: ``float32[M, 1]``.
      weight: In the portable layout, ``[N, K]``, without zero points.
      fmt: Signed integers, or fp8. Static.

    Returns:
      ``float32[M, N]``.
    """
    m, k = codes.shape
    rows = jnp.concatenate([codes, codes]) if m == 1 else codes
    w_scale = weight.scale.astype(jnp.float32)
    groups = w_scale.shape[-1]
    if groups == 1:
        sums = _sums(rows, weight.words, fmt)[:m]
        return sums.astype(jnp.float32) * scale * w_scale[:, 0][None]
    w = _operand(packing.unpack(weight.words, bits=fmt.bits, count=k), fmt)
    sums = jax.lax.dot_general(
        rows.reshape(rows.shape[0], groups, -1),
        w.reshape(*w_scale.shape, -1),
        (((2,), (2,)), ((1,), (1,))),
        preferred_element_type=sum_dtype(fmt),
    )
    y = jnp.einsum(
        "gmn,ng->mn", sums[:, :m].astype(jnp.float32), w_scale, precision="highest"
    )
    return y * scale


def _sums(codes: jax.Array, words: jax.Array, fmt: Integer | Float8) -> jax.Array:
    """``[M, N]``, plane by plane: sums of integers are exact in any order."""
    per = packing.period(fmt.bits)
    codes = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    planes = packing.planes(words, bits=fmt.bits, count=codes.shape[1])
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=sum_dtype(fmt),
    )
    parts = [dot(codes[:, i::per], _operand(p, fmt)) for i, p in enumerate(planes)]
    return functools.reduce(jnp.add, parts)


def _operand(codes: jax.Array, fmt: Integer | Float8) -> jax.Array:
    """Codes in the operand dtype; integers are sign-extended in bytes."""
    if isinstance(fmt, Integer):
        sign = jnp.uint8(2 ** (fmt.bits - 1))
        codes = (codes ^ sign) - sign
    return jax.lax.bitcast_convert_type(codes, operand_dtype(fmt))
