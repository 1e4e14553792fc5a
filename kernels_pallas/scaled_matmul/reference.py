"""Matmul of two quantized operands in plain `jax.numpy`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.formats import Float8, Integer
from kernels_pallas.layouts import Weight
from kernels_pallas.scaled_matmul.rows import sum_dtype


def scaled_matmul(
    codes: jax.Array, scale: jax.Array, weight: Weight, fmt: Integer | Float8
) -> jax.Array:
    """Sums of each group, then the scales.

    Args:
      codes: ``[M, K]`` in the operand dtype.
      scale: ``float32[M, 1]``.
      weight: In the portable layout, ``[N, K]``, without zero points.
      fmt: Signed integers, or fp8.

    Returns:
      ``float32[M, N]``; sums of integers are exact.
    """
    m, k = codes.shape
    groups, dtype = weight.scale.shape[-1], sum_dtype(fmt)
    words = packing.unpack(weight.words, bits=fmt.bits, count=k)
    w = fmt.integers(words) if isinstance(fmt, Integer) else fmt.decode(words)
    sums = jnp.einsum(
        "mgk,ngk->mng",
        codes.reshape(m, groups, -1).astype(dtype),
        w.reshape(*weight.scale.shape, -1),
        precision="highest",
    )
    y = (sums.astype(jnp.float32) * weight.scale.astype(jnp.float32)[None]).sum(-1)
    return y * scale
