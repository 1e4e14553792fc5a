"""Every number format in float64, of one block: what it is by definition."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxcompress import quant as q

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=("fmt", "axes"))
def both(w: Any, fmt: q.NumberFormat, axes: Any = None, key: Any = None) -> Any:
    """The leaf and its dense values."""
    leaf = q.quantize(w, fmt, axes=axes, key=key)
    return leaf, leaf.materialize()


dense = lambda *args, **options: both(*args, **options)[1]
Oracle = Callable[[np.ndarray], np.ndarray]


def heavy(seed: int, *shape: int) -> np.ndarray:
    """Normals over many magnitudes, a tenth of them zeros: subnormals and outliers."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * 2.0 ** rng.integers(-10, 2, shape)
    return (w * (rng.uniform(size=shape) > 0.1)).astype(np.float32)


def significant(x: Any, bits: int, rounding: Any) -> Any:
    """Rounded to so many significant bits, as every float scale is."""
    fraction, exponent = np.frexp(np.float64(x))
    return np.ldexp(rounding(fraction * 2**bits), exponent - bits)


def sixteen_bits(x: Any) -> Any:
    return significant(x, 16, lambda n: np.floor(n + 0.5))


def reaching(largest: Any, codes: float, bits: int = 16) -> Any:
    """The scale of a largest weight, which stays within the grid (to 4 ulp)."""
    up = lambda n: np.ceil(n - 4 * 2.0 ** (bits - 24))
    return significant(np.float32(largest) / np.float32(codes), bits, up)


# -- the definitions: of one block, in float64


def onto(grid: Any) -> Oracle:
    """Scale the largest magnitude to the grid's; take the nearest point."""
    points = np.float64(grid)

    def oracle(w: np.ndarray) -> np.ndarray:
        scale = reaching(np.abs(w).max(), np.abs(points).max())
        nearest = np.abs(w[:, None] - points * scale).argmin(1)
        return points[nearest] * scale

    return oracle


def symmetric(bits: int) -> Oracle:
    top = 2 ** (bits - 1) - 1
    return onto(np.arange(-top, top + 1))


def wide(bits: int) -> Oracle:
    """Two's complement in full: the smallest scale that reaches both ends."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def oracle(w: np.ndarray) -> np.ndarray:
        scale = max(reaching(w.max(), high), reaching(w.min(), low))
        return np.clip(np.rint(w / scale), low, high) * scale

    return oracle


def asymmetric(low: int, high: int) -> Oracle:
    """``r = S (q - Z)``, Jacob et al., 2018, eq. 1, with zero in the range."""

    def oracle(w: np.ndarray) -> np.ndarray:
        least, most = min(w.min(), 0), max(w.max(), 0)
        scale = reaching(np.float32(most) - np.float32(least), high - low)
        zero = low - np.rint(least / scale)
        return (np.clip(np.rint(w / scale) + zero, low, high) - zero) * scale

    return oracle


def floats(exponent: int, mantissa: int, largest: float) -> np.ndarray:
    """``(-1)^s 2^(e - bias) (1 + m / 2^M)``, subnormals without the leading one."""
    bias = 2 ** (exponent - 1) - 1
    values = [
        math.ldexp((e > 0) + m / 2**mantissa, max(e, 1) - bias)
        for e in range(2**exponent)
        for m in range(2**mantissa)
    ]
    kept = np.array([v for v in values if v <= largest])
    return np.concatenate([-kept[:0:-1], kept])


def ternary(w: np.ndarray) -> np.ndarray:
    """Li et al., 2016, eq. 3, 5 and 6."""
    kept = np.abs(w) > 0.7 * np.abs(w).mean()
    return sixteen_bits(np.abs(w[kept]).mean()) * np.sign(w) * kept


def binary(w: np.ndarray) -> np.ndarray:
    """Rastegari et al., 2016, eq. 6."""
    return sixteen_bits(np.abs(w).mean()) * np.where(w < 0, -1, 1)


def shared_exponent(w: np.ndarray, emax: int) -> float:
    """OCP MX v1.0, section 6.3."""
    return 2.0 ** (math.floor(math.log2(np.abs(w).max())) - emax)


def mx(dtype: Any, emax: int) -> Oracle:
    """A saturating cast relative to the shared exponent."""
    top = float(ml_dtypes.finfo(dtype).max)

    def oracle(w: np.ndarray) -> np.ndarray:
        scale = shared_exponent(w, emax)
        cast = np.clip(w / scale, -top, top).astype(dtype)
        return cast.astype(np.float64) * scale

    return oracle


def mxint8(w: np.ndarray) -> np.ndarray:
    scale = shared_exponent(w, 0) / 64
    return np.clip(np.rint(w / scale), -127, 127) * scale


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
POWERS = 2.0 ** np.arange(-6, 1)
UNEVEN = (-1.0, -0.25, 0.0, 0.5, 0.75)

FORMATS: dict[str, tuple[q.NumberFormat, Oracle]] = {
    **{f"int{b}": (q.integer(b), symmetric(b)) for b in range(2, 9)},
    **{
        f"uint{b}": (q.integer(b, symmetric=False), asymmetric(0, 2**b - 1))
        for b in range(2, 9)
    },
    "uint4_narrow": (q.int4(symmetric=False, narrow=True), asymmetric(1, 15)),
    "int2_wide": (q.int2(narrow=False), wide(2)),
    "int8_wide": (q.int8(narrow=False), wide(8)),
    "ternary": (q.ternary(), ternary),
    "binary": (q.binary(), binary),
    "fp8_e4m3": (q.fp8_e4m3(), onto(floats(4, 3, 448))),
    "fp8_e5m2": (q.fp8_e5m2(), onto(floats(5, 2, 57344))),
    "fp6_e3m2": (q.fp6_e3m2(), onto(floats(3, 2, 28))),
    "fp6_e2m3": (q.fp6_e2m3(), onto(floats(2, 3, 7.5))),
    "fp4_e2m1": (q.fp4_e2m1(), onto(floats(2, 1, 6))),
    "nf4": (q.nf4(), onto(NF4)),
    "log4": (q.log(4), onto([*-POWERS[::-1], 0, *POWERS])),
    "normal3": (q.normal(3), onto(q.normal_quantiles(3).values)),
    "lloyd3": (q.lloyd(3), onto(q.lloyd_max(3).values)),
    "table": (q.table(UNEVEN), onto(UNEVEN)),
    "mxfp8_e4m3": (q.mxfp8(), mx(ml_dtypes.float8_e4m3fn, 8)),
    "mxfp8_e5m2": (q.mxfp8(element=q.E5M2), mx(ml_dtypes.float8_e5m2, 15)),
    "mxfp6_e3m2": (q.mxfp6(), mx(ml_dtypes.float6_e3m2fn, 4)),
    "mxfp6_e2m3": (q.mxfp6(element=q.E2M3), mx(ml_dtypes.float6_e2m3fn, 2)),
    "mxfp4": (q.mxfp4(), mx(ml_dtypes.float4_e2m1fn, 2)),
    "mxint8": (q.mxint8(), mxint8),
}
