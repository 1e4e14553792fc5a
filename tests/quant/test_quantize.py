"""Every number format against its definition in float64, and its error bounds."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.quant._rounding import round_scale

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


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_its_definition(name: str) -> None:
    fmt, oracle = FORMATS[name]
    block = 32 if name.startswith("mx") else 64
    w = heavy(0, 64, 3) * np.float32([1, 37, 2.0**-9])
    expected = np.empty(w.shape)
    for i, o in itertools.product(range(0, 64, block), range(3)):
        expected[i : i + block, o] = oracle(np.float64(w[i : i + block, o]))
    np.testing.assert_allclose(dense(w, fmt), expected, rtol=2**-23)


def test_every_format_of_the_library_has_a_definition_here() -> None:
    made = {
        name
        for name, f in vars(q).items()
        if getattr(f, "__annotations__", {}).get("return") == "NumberFormat"
    }
    covered = {n for n in made if any(n == f or f.startswith(n) for f in FORMATS)}
    assert made - covered == {"integer", "nvfp4"}


def nvfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Values, e4m3 scales and tensor scale: NVIDIA, 2025, appendix B."""
    blocks = w.reshape(-1, 16, w.shape[1])
    tensor = sixteen_bits(np.abs(w).max() / (6 * 448))
    relative = np.abs(blocks).max(1, keepdims=True) / 6 / tensor
    stored = np.minimum(relative, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = stored.astype(np.float64) * tensor
    scaled = np.clip(blocks / np.where(scale > 0, scale, 1), -6, 6)
    values = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    return values.reshape(w.shape), stored[:, 0], tensor


def test_nvfp4_is_its_definition() -> None:
    w = heavy(1, 64, 3) * np.float32([1, 37, 2.0**-9])
    values, stored, tensor = nvfp4(np.float64(w))
    leaf, found = both(w, q.nvfp4())
    np.testing.assert_array_equal(np.transpose(leaf.scale), stored.view(np.uint8))
    np.testing.assert_array_equal(np.asarray(leaf.tensor_scale), [[tensor]])
    np.testing.assert_allclose(found, values, rtol=2**-22)


def test_nvfp4_has_a_tensor_scale_for_each_layer_of_a_stack() -> None:
    w = heavy(2, 2, 32, 3) * np.float32([1, 2.0**15])[:, None, None]
    leaf, found = both(w, q.nvfp4(), -2)
    layers = [nvfp4(np.float64(layer)) for layer in w]
    tensor_scales = np.ravel(leaf.tensor_scale).tolist()
    assert tensor_scales == [tensor for _, _, tensor in layers]
    expected = [values for values, _, _ in layers]
    np.testing.assert_allclose(found, expected, rtol=2**-22)


def test_mx_scales_are_stored_as_e8m0() -> None:
    w = heavy(3, 64, 3) * np.float32([1, 2.0**40, 2.0**-40])
    leaf = both(w, q.mxfp4())[0]
    largest = np.abs(w.reshape(2, 32, 3)).max(1).astype(np.float64)
    exact = 2.0 ** (np.floor(np.log2(largest)) - 2)
    assert leaf.scale.dtype == jnp.uint8
    stored = np.asarray(leaf.scale).view(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(stored.astype(np.float64).T, exact)


@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 16), ("bfloat16", 8), ("float16", 11)]
)
@pytest.mark.parametrize("direction", ["up", "down", "nearest"])
def test_scales_keep_their_significant_bits(
    dtype: str, bits: int, direction: Any
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.uniform(1, 2, 500) * 2.0 ** rng.integers(-13, 14, 500)).astype(np.float32)
    ulps = 4 * 2.0 ** (bits - 24)  # By which a quotient may be wrong.
    towards = {
        "up": lambda n: np.ceil(n - ulps),
        "down": lambda n: np.floor(n + ulps),
        "nearest": lambda n: np.floor(n + 0.5),
    }
    found = round_scale(jnp.asarray(x), dtype, direction)
    assert found.dtype == dtype
    expected = significant(x, bits, towards[direction])
    np.testing.assert_array_equal(np.float64(found), expected)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(jnp.bfloat16, 8), (jnp.float16, 11)], ids=["bf16", "f16"]
)
def test_codes_are_chosen_for_the_scale_as_stored(dtype: Any, bits: int) -> None:
    w = heavy(4, 64, 3)
    leaf, found = both(w, q.int4(scale_dtype=dtype))
    assert leaf.scale.dtype == dtype
    scale = reaching(np.abs(w).max(0), 7, bits)
    np.testing.assert_array_equal(np.float64(leaf.scale).ravel(), scale)
    expected = np.clip(np.rint(w / scale), -7, 7) * scale
    np.testing.assert_allclose(found, expected, rtol=2**-23)


@pytest.mark.parametrize("name", ["int8", "uint4", "fp8_e4m3", "nf4", "mxfp4"])
def test_a_bfloat16_weight_is_quantized_in_float32(name: str) -> None:
    fmt, _ = FORMATS[name]
    w = jnp.asarray(heavy(5, 64, 3), jnp.bfloat16)
    found = dense(w, fmt)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(dense(np.float32(w), fmt))
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_fake_quantize_is_the_stored_value_with_an_identity_gradient() -> None:
    w, fmt = heavy(6, 64, 3), q.int4(group_size=16)
    value, pull_back = jax.vjp(jax.jit(lambda w: q.fake_quantize(w, fmt)), w)
    np.testing.assert_array_equal(value, dense(w, fmt))
    np.testing.assert_array_equal(pull_back(w[::-1])[0], w[::-1])


# -- granularity

Index = tuple[int, ...]
SHAPES = {"matrix": (8, 6), "stack": (3, 8, 6), "conv": (3, 2, 4, 6)}
CONV = (-4, -3, -2)
GRANULARITIES: dict[str, tuple[str, Any, dict[str, Any], Callable[..., Any]]] = {
    "matrix": ("matrix", None, {}, lambda i, o: o),
    "matrix_tensor": (
        "matrix",
        None,
        {"granularity": q.PerTensor()},
        lambda i, o: None,
    ),
    "matrix_group": ("matrix", None, {"group_size": 4}, lambda i, o: (i // 4, o)),
    "matrix_block": (
        "matrix",
        None,
        {"granularity": q.Block2D(out=3, contract=4)},
        lambda i, o: (i // 4, o // 3),
    ),
    "matrix_left": ("matrix", -1, {"group_size": 2}, lambda o, i: (o, i // 2)),
    "matrix_inputs": (
        "matrix",
        None,
        {"granularity": q.PerChannel(axes=(-2,))},
        lambda i, o: i,
    ),
    "stack": ("stack", -2, {}, lambda l, i, o: (l, o)),
    "stack_tensor": (
        "stack",
        -2,
        {"granularity": q.PerTensor()},
        lambda l, i, o: l,
    ),
    "stack_group": ("stack", -2, {"group_size": 2}, lambda l, i, o: (l, i // 2, o)),
    "stack_block": (
        "stack",
        -2,
        {"granularity": q.Block2D(out=2, contract=8)},
        lambda l, i, o: (l, o // 2),
    ),
    "heads": ("stack", (-3, -2), {}, lambda h, i, o: o),
    "heads_group": (
        "stack",
        (-3, -2),
        {"group_size": 12},
        lambda h, i, o: ((h * 8 + i) // 12, o),
    ),
    "heads_reversed": (
        "stack",
        (-2, -3),
        {"group_size": 4},
        lambda h, i, o: ((i * 3 + h) // 4, o),
    ),
    "heads_apart": (
        "stack",
        (-3, -1),
        {"group_size": 9},
        lambda a, o, b: ((a * 6 + b) // 9, o),
    ),
    "heads_kept": (
        "stack",
        (-3, -2),
        {"granularity": q.PerChannel(axes=(-3,))},
        lambda h, i, o: h,
    ),
    "conv": ("conv", CONV, {}, lambda a, b, i, o: o),
    "conv_tensor": (
        "conv",
        CONV,
        {"granularity": q.PerTensor()},
        lambda a, b, i, o: None,
    ),
    "conv_group": (
        "conv",
        CONV,
        {"group_size": 8},
        lambda a, b, i, o: ((a * 8 + b * 4 + i) // 8, o),
    ),
    "conv_rows": (
        "conv",
        CONV,
        {"granularity": q.PerChannel(axes=(-3, -1))},
        lambda a, b, i, o: (b, o),
    ),
    "conv_block": (
        "conv",
        CONV,
        {"granularity": q.Block2D(out=2, contract=6)},
        lambda a, b, i, o: ((a * 8 + b * 4 + i) // 6, o // 2),
    ),
    "conv_stack": ("conv", -2, {}, lambda a, b, i, o: (a, b, o)),
}


@pytest.mark.parametrize("name", GRANULARITIES)
def test_weights_of_a_block_share_a_scale(name: str) -> None:
    kind, axes, options, block = GRANULARITIES[name]
    w = heavy(7, *SHAPES[kind])
    members: dict[Any, list[Index]] = defaultdict(list)
    for index in np.ndindex(w.shape):
        members[block(*index)].append(index)
    expected = np.empty(w.shape)
    for indices in members.values():
        at = tuple(zip(*indices, strict=True))
        expected[at] = symmetric(4)(np.float64(w[at]))
    _, found = both(w, q.int4(**options), axes)
    np.testing.assert_allclose(found, expected, rtol=2**-23)


@pytest.mark.parametrize("name", ["uint4", "ternary", "binary", "int8_wide"])
def test_sums_and_ranges_are_taken_over_merged_rows_too(name: str) -> None:
    """`PerChannel` of an input axis merges scales that stand apart in storage."""
    fmt, oracle = FORMATS[name]
    w = heavy(8, *SHAPES["conv"])
    fmt = fmt.replace(granularity=q.PerChannel(axes=(-3,)))
    expected = np.stack(
        [oracle(np.float64(w[:, b]).ravel()).reshape(3, 4, 6) for b in range(2)], 1
    )
    _, found = both(w, fmt, CONV)
    np.testing.assert_allclose(found, expected, rtol=2**-22)


def test_a_vector_is_one_channel() -> None:
    w = heavy(9, 16)
    _, found = both(w, q.int4())
    np.testing.assert_allclose(found, symmetric(4)(np.float64(w)), rtol=2**-23)


def test_axes_of_the_format_go_before_those_of_the_call() -> None:
    w = heavy(10, 8, 6)
    given_twice = both(w, q.int4(axes=-1), -2)[1]
    np.testing.assert_array_equal(given_twice, both(w, q.int4(), -1)[1])
    assert not np.array_equal(given_twice, both(w, q.int4())[1])


# -- error bounds

MATRIX = hnp.arrays(
    np.float32, (64, 3), elements=st.floats(-1, 1, width=32, allow_subnormal=False)
)
MAGNITUDES = st.integers(-20, 20)


@pytest.mark.parametrize(
    ("name", "slack"),
    [
        *((name, 2**-16) for name in ("int2", "int3", "int4", "int8", "int8_wide")),
        *((name, 2**-8) for name in ("uint2", "uint4", "uint8")),
    ],
)
@given(w=MATRIX, exponent=MAGNITUDES)
def test_integers_err_by_half_a_scale_at_most(
    name: str, slack: float, w: np.ndarray, exponent: int
) -> None:
    w = np.where(np.abs(w) < 2**-20, 0, w) * np.float32(2.0**exponent)
    leaf, found = both(w, FORMATS[name][0])
    error = np.abs(np.float64(found) - w)
    assert (error <= (0.5 + slack) * np.ravel(leaf.scale)).all()


def test_asymmetric_integers_err_by_half_a_scale_at_most() -> None:
    end = np.float32(127.5 * (1 + 0.49 * 2**-15))
    leaf, found = both(np.stack([[end], [-end]]), q.int8(symmetric=False))
    error = np.abs(np.float64(found).ravel() - [end, -end])
    assert (error <= (0.5 + 2**-16) * np.ravel(leaf.scale)).all()


@pytest.mark.parametrize(
    ("name", "mantissa", "smallest", "largest"),
    [
        ("fp8_e4m3", 3, 2.0**-9, 448),
        ("fp8_e5m2", 2, 2.0**-16, 57344),
        ("fp4_e2m1", 1, 0.5, 6),
    ],
)
@given(w=MATRIX, exponent=MAGNITUDES)
def test_floats_err_by_half_a_unit_in_the_last_place(
    name: str,
    mantissa: int,
    smallest: float,
    largest: float,
    w: np.ndarray,
    exponent: int,
) -> None:
    w = np.where(np.abs(w) < 2**-20, 0, w) * np.float32(2.0**exponent)
    error = np.abs(np.float64(dense(w, FORMATS[name][0])) - w)
    scale = np.abs(w).max(0) / largest
    relative = np.abs(w) * 2.0 ** -(mantissa + 1)
    assert (error <= np.maximum(relative, smallest / 2 * scale) * (1 + 2**-12)).all()


def normals() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(10, 64, 3)).astype(np.float32)


def squared_error(matrices: np.ndarray, fmt: q.NumberFormat) -> float:
    return float(np.mean([(np.float64(dense(w, fmt)) - w) ** 2 for w in matrices]))


@pytest.mark.parametrize("family", ["int", "uint"])
def test_a_bit_more_quarters_the_squared_error(family: str) -> None:
    errors = [squared_error(normals(), FORMATS[f"{family}{b}"][0]) for b in range(2, 9)]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert (ratios > 3).all()
    assert ratios[-1] == pytest.approx(4, rel=0.15)


def test_an_outlier_spoils_only_its_own_group() -> None:
    matrices = normals()
    matrices[:, 5] = 100.0
    groups = [squared_error(matrices, q.int4(group_size=g)) for g in (8, 16, 32, 64)]
    assert groups == sorted(groups)
    assert groups[-1] > 5 * groups[0]
    assert groups[-1] == squared_error(matrices, q.int4())


def test_a_grid_fitted_to_normals_suits_normals() -> None:
    even = squared_error(normals(), q.int4())
    assert squared_error(normals(), q.nf4()) < 0.9 * even
    assert squared_error(normals(), q.log(4)) > even


# -- zeros, and rounding other than to nearest


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_of_zeros_is_exact_beside_others(name: str) -> None:
    w = heavy(0, 64, 3)
    w[:, 1] = 0
    found = np.asarray(dense(w, FORMATS[name][0]))
    assert not found[:, 1].any()
    assert found[:, ::2].any(0).all()


ROUNDED = {
    "int4": q.int4(),
    "uint4": q.int4(symmetric=False),
    "fp4_e2m1": q.fp4_e2m1(),
    "nf4": q.nf4(),
    "mxfp8": q.mxfp8(),
}
rounded = pytest.mark.parametrize("name", ROUNDED)


@rounded
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """Hoeffding over 4096 draws of 32 weights: a false alarm once in 10^6 keys."""
    draws, false_alarm = 4096, 1e-6
    column = np.random.default_rng(3).uniform(-0.8, 1, 32).astype(np.float32)
    column[:2] = 1.0, -0.875  # For uint4 15 even steps, so that nothing is clipped.
    w = np.tile(column[:, None], draws)
    fmt = ROUNDED[name].replace(rounding="stochastic")
    found = np.float64(both(w, fmt, key=KEY)[1])
    gap = found.max(1) - found.min(1)
    tolerance = math.sqrt(math.log(2 * len(column) / false_alarm) / (2 * draws))
    # A mean of draws from two points `gap` apart; the grid itself is float32.
    assert (np.abs(found.mean(1) - column) <= gap * tolerance + 2**-15).all()
    assert all(len(np.unique(row)) <= 2 for row in found)
    assert (gap > 0).sum() >= 20


def test_the_same_key_gives_the_same_bytes_and_another_key_others() -> None:
    w = heavy(11, 64, 3)
    fmt = q.int4(rounding="stochastic")
    words = [
        both(w, fmt, key=jax.random.key(seed))[0].words.tobytes() for seed in (0, 0, 1)
    ]
    assert words[0] == words[1] != words[2]


@rounded
def test_toward_zero_never_increases_a_magnitude(name: str) -> None:
    w = heavy(12, 64, 3)
    w[0] = np.abs(w).max(0)
    fmt = ROUNDED[name].replace(rounding="toward_zero")
    found = np.float64(dense(w, fmt))
    assert (np.abs(found) <= np.abs(w) * (1 + 2**-15)).all()
    assert (found * w >= 0).all()
    assert np.abs(found).sum() < np.abs(np.float64(dense(w, ROUNDED[name]))).sum()


def test_toward_zero_truncates() -> None:
    w = jnp.array([[7.0], [-1.75], [1.75], [-0.5]])
    _, found = both(w, q.int4(rounding="toward_zero"))
    assert found.ravel().tolist() == [7, -1, 1, 0]


# -- not yet as documented


def projected_again(w: Any, fmt: q.NumberFormat) -> bool:
    """Whether quantizing what was dequantized gives the same leaf."""
    once, values = both(w, fmt)
    twice, _ = both(values, fmt)
    pairs = zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_truncating_what_was_truncated_gives_the_same_leaf() -> None:
    assert projected_again(heavy(1, 64, 3), q.int4(rounding="toward_zero"))


def test_a_block_whose_scale_underflows_has_zero_codes() -> None:
    w = np.ones((64, 3), np.float32)
    w[0] = 2.0**22
    assert projected_again(w, q.nvfp4())


def test_finite_weights_come_back_finite_from_float16_scales() -> None:
    w = np.full((64, 3), 2.0**20, np.float32)
    with jax.debug_nans(False):
        found = dense(w, q.int4(scale_dtype=np.float16))
    assert np.isfinite(found).all()


def test_the_largest_float32_comes_back_finite() -> None:
    w = np.full((64, 3), np.finfo(np.float32).max)
    with jax.debug_nans(False):
        found = dense(w, q.int2())
    assert np.isfinite(found).all()


# -- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.integer(1), "integer: bits must be 2 to 8; got 1"),
        (lambda: q.integer(9), "integer: bits must be 2 to 8; got 9"),
        (lambda: q.log(1), "log: bits must be 2 to 8; got 1"),
        (lambda: q.normal(9), "normal: bits must be 2 to 8; got 9"),
        (lambda: q.lloyd(0), "lloyd: bits must be 2 to 8; got 0"),
        (
            lambda: q.int4(group_size=8, granularity=q.PerTensor()),
            r"int4: give group_size or granularity, not both; got 8 and PerTensor\(\)",
        ),
        (lambda: q.nf4(group_size=0), "nf4: group_size must be positive; got 0"),
        (
            lambda: q.int8(rounding="up"),
            r"int8: rounding must be one of .*'toward_zero'\); got 'up'",
        ),
        (
            lambda: q.int8(scale_dtype=np.int32),
            r"int8: scale_dtype must be one of .*'float16'\); got int32",
        ),
        (lambda: q.mxfp4(group_size=16), r"mxfp4: \['group_size'\] are fixed"),
        (
            lambda: q.nvfp4(scale_dtype=np.float32),
            r"nvfp4: \['scale_dtype'\] are fixed",
        ),
        (
            lambda: q.mxint8(granularity=q.PerTensor()),
            r"mxint8: \['granularity'\] are fixed",
        ),
    ],
)
def test_formats_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


W = np.ones((8, 6), np.float32)
STATIC = q.int8(activations=q.static(q.Integer(bits=8)))


@pytest.mark.parametrize(
    ("w", "fmt", "axes", "message"),
    [
        (
            W,
            q.int4(group_size=3),
            None,
            r"group_size must divide .* of 'w', 8; got 3.*\[1, 2, 4, 8\]",
        ),
        (W, q.mxfp4(), None, "group_size must divide .* of 'w', 8; got 32"),
        (
            W,
            q.int4(granularity=q.Block2D(out=4, contract=8)),
            None,
            "block of outputs must divide the last output axis of 'w', 6; got 4",
        ),
        (
            W,
            q.int4(granularity=q.Block2D(out=6, contract=5)),
            None,
            "block of inputs must divide the flattened .* of 'w', 8; got 5",
        ),
        (
            W,
            q.int4(granularity=q.PerChannel(axes=(1,))),
            None,
            r"axes must be negative .*; got \(1,\) for shape \(8, 6\)",
        ),
        (
            W,
            q.int4(granularity=q.PerChannel(axes=(-3,))),
            None,
            r"axes must be negative .*; got \(-3,\)",
        ),
        (W, q.int4(rounding="stochastic"), None, "stochastic rounding needs a key"),
        (W, STATIC, None, "need their calibrated scale"),
        (
            np.ones((2, 3, 4), np.float32),
            q.int4(),
            None,
            r"contracting axes of 'w', of shape \(2, 3, 4\), cannot be told",
        ),
        (W, q.int4(), 0, r"axes must be distinct and negative.*got \(0,\)"),
        (W, q.int4(), (-1, -1), r"axes must be distinct .*got \(-1, -1\)"),
        (W, q.int4(), (), r"axes must be distinct .*got \(\)"),
        (
            W,
            q.int4(),
            jc.Axes(contract=(-2,), stack=1),
            r"axes must be distinct and negative.*got \(-2,\)",
        ),
        (np.float32([[1, np.nan]]), q.int4(), None, "'w' has 1 NaN or infinite of 2"),
        (np.float32([[np.inf, 1]]), q.int4(), None, "'w' has 1 NaN or infinite of 2"),
        (np.ones((0, 4), np.float32), q.int4(), None, r"'w' has shape \(0, 4\)"),
        (np.ones((), np.float32), q.int4(), None, r"'w' has shape \(\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    w: Any, fmt: Any, axes: Any, message: str
) -> None:
    match = rf"quantize to {re.escape(fmt.name)}: .*{message}"
    with jax.debug_nans(False), pytest.raises(ValueError, match=match):
        q.quantize(jnp.asarray(w), fmt, axes=axes)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_weights_that_are_not_real_floats_are_refused(dtype: Any) -> None:
    w = jnp.ones((4, 4), dtype)
    name = w.dtype.name
    with pytest.raises(TypeError, match=f"int4: .*real floating.*'layer/w' is {name}"):
        q.quantize(w, q.int4(), path="layer/w")


@pytest.mark.parametrize(
    ("fmt", "name"),
    [
        (q.int4(group_size=128), "int4 g128"),
        (q.int4(symmetric=False), "uint4"),
        (q.int8(granularity=q.PerTensor()), "int8 per tensor"),
        (q.int8(granularity=q.PerChannel(axes=(-2,))), "int8 per axes (-2,)"),
        (q.fp8_e4m3(granularity=q.Block2D(out=32, contract=16)), "fp8_e4m3 32x16"),
        (q.table(UNEVEN, name="uneven"), "uneven"),
        (q.log(4), "log4"),
        (q.normal(3), "normal3"),
        (q.lloyd(3), "lloyd_max3"),
        (q.mxfp8(element=q.E5M2), "mxfp8_e5m2"),
        (q.nvfp4(), "nvfp4"),
        (
            q.int8(activations=q.dynamic(q.Integer(bits=8))),
            "int8 + int8 activations per token",
        ),
        (
            q.fp8_e4m3(activations=q.static(q.E4M3)),
            "fp8_e4m3 + fp8_e4m3 activations static",
        ),
    ],
)
def test_reports_name_formats_as_the_field_does(fmt: Any, name: str) -> None:
    assert fmt.name == name
