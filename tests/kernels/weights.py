"""Random quantized weights with their float64 values, worked out code by code."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels_pallas import formats as f
from kernels_pallas.layouts import Weight

TABLE = f.Table(values=(-3.0, -0.25, 0.5, 1.5, 7.0), name="odd")

FORMATS = {
    fmt.name: fmt
    for fmt in (
        *(f.INT8, f.INT4, f.INT3, f.INT2),
        *(f.UINT8, f.UINT4, f.UINT3, f.UINT2),
        *(f.NF4, f.FP4_E2M1, f.FP8_E4M3, f.FP8_E5M2, TABLE),
    )
}


def random_weight(
    rng: np.random.Generator, fmt: f.Format, n: int, k: int, groups: int
) -> tuple[Weight, np.ndarray]:
    """A portable weight and the dense float64 ``[n, k]`` it stands for."""
    codes = rng.choice(_codes(fmt), size=(n, k))
    scale = rng.uniform(0.5, 2.0, size=(n, groups)).astype(np.float32)
    values = np.vectorize(lambda c: value(fmt, int(c)), otypes=[float])(codes)
    zero = None
    if isinstance(fmt, f.Integer) and not fmt.signed:
        zero = rng.integers(0, 2**fmt.bits, size=(n, groups)).astype(np.uint8)
        values -= np.repeat(zero, k // groups, axis=1)
    words = np.stack([stream(row, fmt.bits) for row in codes])
    dense = values * np.repeat(scale, k // groups, axis=1).astype(np.float64)
    side = None if zero is None else jnp.asarray(zero)
    return Weight(jnp.asarray(words), jnp.asarray(scale), side), dense


def _codes(fmt: f.Format) -> np.ndarray:
    if isinstance(fmt, f.Table):
        return np.arange(len(fmt.values))
    every = np.arange(2**fmt.bits)
    return np.array([c for c in every if math.isfinite(value(fmt, int(c)))])


def value(fmt: f.Format, code: int) -> float:
    """What one code stands for."""
    if isinstance(fmt, f.Table):
        return fmt.values[code]
    if isinstance(fmt, f.Float8):
        return float(np.uint8(code).view(getattr(ml_dtypes, fmt.dtype)))
    return code - (2**fmt.bits if fmt.signed and code >= 2 ** (fmt.bits - 1) else 0)


def stream(codes: Any, bits: int) -> np.ndarray:
    """Codes as the bytes of one little-endian integer."""
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    length = -(-len(codes) * bits // 8)
    return np.frombuffer(number.to_bytes(length, "little"), np.uint8)


def matmul_bound(x: np.ndarray, w: np.ndarray, product: float = 2.0**-22) -> np.ndarray:
    """Error bound of ``x @ w.T`` with float32 sums.

    Args:
      x: ``[M, K]``.
      w: ``[N, K]``.
      product: Relative error of a product: two roundings of a dequantized weight and
        one of the product by default.
    """
    k = x.shape[-1]
    size = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    return size * (product + (k + 1) * 2.0**-24)
