"""Every code of every element, and the rounding of values to them."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quant import E2M1, E2M3, E3M2, E4M3, E5M2, Integer, Minifloat, Table
from jaxcompress.quant._elements import NF4
from jaxcompress.quant._rounding import floor_log2, power_of_two, round_to_integer

FLOATS: dict[str, tuple[Minifloat, Any]] = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
    "e3m2": (E3M2, ml_dtypes.float6_e3m2fn),
    "e2m3": (E2M3, ml_dtypes.float6_e2m3fn),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
}
floats = pytest.mark.parametrize("name", FLOATS)
NORMAL = NormalDist()

encode = jax.jit(
    lambda element, x, rounding, noise=None: element.encode(x, rounding, noise),
    static_argnums=(0, 2),
)
decode = jax.jit(lambda element, codes: element.decode(codes), static_argnums=0)


def all_codes(bits: int) -> np.ndarray:
    return np.arange(2**bits, dtype=np.uint8)


def points(name: str) -> np.ndarray:
    """The finite values of a float element, ascending, from ml_dtypes."""
    element, dtype = FLOATS[name]
    values = all_codes(element.bits).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def between(name: str) -> np.ndarray:
    """Ties, their neighbours, subnormals, saturation and a thousand others."""
    grid = points(name).astype(np.float32)
    ties = (grid[1:] + grid[:-1]) / 2
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    wide = rng.normal(size=1000) * 2.0 ** rng.integers(-24, 20, 1000)
    x = np.concatenate([grid, ties, *near, wide.astype(np.float32)])
    return np.append(x, np.float32([1e30, -1e30, 1e-30, -0.0]))


@floats
def test_every_code_of_a_float_decodes_to_its_value(name: str) -> None:
    element, dtype = FLOATS[name]
    codes = all_codes(element.bits)
    with jax.debug_nans(False):
        decoded = decode(element, jnp.asarray(codes))
    expected = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decoded, expected)
    signed = ~np.isnan(expected)
    np.testing.assert_array_equal(
        np.signbit(decoded)[signed], np.signbit(expected)[signed]
    )


@floats
def test_floats_round_as_ml_dtypes_and_saturate(name: str) -> None:
    element, dtype = FLOATS[name]
    x = between(name)
    codes = encode(element, jnp.asarray(x), "nearest")
    assert codes.dtype == jnp.uint8
    top = points(name)[-1]
    expected = np.clip(x, -top, top).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(element, codes), expected)


@floats
def test_float_codes_come_back_from_their_values(name: str) -> None:
    element, _ = FLOATS[name]
    grid = jnp.asarray(points(name), jnp.float32)
    for rounding in ("nearest", "toward_zero"):
        codes = encode(element, grid, rounding)
        np.testing.assert_array_equal(decode(element, codes), grid)
        assert len(np.unique(codes)) == grid.size


@floats
def test_floats_toward_zero_take_the_inner_neighbour(name: str) -> None:
    element, _ = FLOATS[name]
    x, grid = between(name), points(name)
    inner = grid[np.searchsorted(grid, np.abs(x), side="right") - 1] * np.sign(x)
    codes = encode(element, jnp.asarray(x), "toward_zero")
    np.testing.assert_array_equal(decode(element, codes), inner)


@pytest.mark.parametrize(
    ("element", "largest", "smallest", "top_exponent"),
    [
        (E4M3, 448.0, 2.0**-9, 8),
        (E5M2, 57344.0, 2.0**-16, 15),
        (E3M2, 28.0, 0.0625, 4),
        (E2M3, 7.5, 0.125, 2),
        (E2M1, 6.0, 0.5, 2),
    ],
    ids=list(FLOATS),
)
def test_ranges_are_those_of_the_mx_specification(
    element: Minifloat, largest: float, smallest: float, top_exponent: int
) -> None:
    assert element.largest == largest
    assert element.top_exponent == top_exponent
    assert decode(element, jnp.uint8(1)) == smallest


def test_minifloats_are_built_from_their_field_widths() -> None:
    assert Minifloat(exponent=4, mantissa=3, nan=True) == E4M3
    assert [e.bits for e, _ in FLOATS.values()] == [8, 8, 6, 6, 4]
    assert [e.label for e in (E4M3, E3M2, E2M1)] == [
        "fp8_e4m3",
        "fp6_e3m2",
        "fp4_e2m1",
    ]


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_of_an_integer_decodes_to_its_value(bits: int) -> None:
    codes = all_codes(bits)
    signed = np.where(codes < 2 ** (bits - 1), codes, codes.astype(int) - 2**bits)
    c = jnp.asarray(codes)
    np.testing.assert_array_equal(decode(Integer(bits=bits), c), signed)
    np.testing.assert_array_equal(decode(Integer(bits=bits, symmetric=False), c), codes)
    eighths = Integer(bits=bits, fraction=3)
    np.testing.assert_array_equal(decode(eighths, c), signed / 8)
    assert eighths.largest == (2 ** (bits - 1) - 1) / 8


@pytest.mark.parametrize(
    ("element", "low", "high"),
    [
        (Integer(bits=2), -1, 1),
        (Integer(bits=4), -7, 7),
        (Integer(bits=8), -127, 127),
        (Integer(bits=2, narrow=False), -2, 1),
        (Integer(bits=8, narrow=False), -128, 127),
    ],
    ids=str,
)
def test_integers_round_ties_to_even_and_saturate(
    element: Integer, low: int, high: int
) -> None:
    x = np.arange(-300, 300, dtype=np.float32) / 2
    decoded = decode(element, encode(element, jnp.asarray(x), "nearest"))
    even = np.array([round(float(v)) for v in x])
    np.testing.assert_array_equal(decoded, np.clip(even, low, high))


@pytest.mark.parametrize(
    ("element", "x", "values", "codes"),
    [
        (jc.quant.Ternary(), [-0.3, 0.0, 2.0], [-1, 0, 1], [3, 0, 1]),
        (jc.quant.Binary(), [-0.3, 0.0, 2.0], [-1, 1, 1], [0, 1, 1]),
    ],
    ids=["ternary", "binary"],
)
def test_signs(element: Any, x: list, values: list, codes: list) -> None:
    found = encode(element, jnp.array(x, jnp.float32), "nearest")
    assert found.tolist() == codes
    assert decode(element, found).tolist() == values


def test_nf4_is_the_table_of_its_derivation() -> None:
    """Quantiles of a normal, 8 below and 9 above zero, as published by its authors."""
    offset = 0.9677083
    half = lambda n: np.array(
        [NORMAL.inv_cdf(p) for p in np.linspace(offset, 0.5, n)[:-1]]
    )
    values = np.sort(np.concatenate([half(9), [0.0], -half(8)]))
    np.testing.assert_allclose(NF4.values, values / values.max(), atol=2e-6)
    assert (NF4.values[0], NF4.values[7], NF4.values[15]) == (-1.0, 0.0, 1.0)


def test_nf4_has_the_published_digits() -> None:
    assert NF4.values[1] == -0.6961928009986877
    assert NF4.values[8] == 0.07958029955625534
    assert NF4.values[14] == 0.7229568362236023


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_logarithmic_tables_are_zero_and_signed_powers_of_two(bits: int) -> None:
    values = np.array(jc.quant.logarithmic(bits).values)
    assert len(values) == 2**bits - 1
    above = values[values > 0]
    np.testing.assert_array_equal(np.log2(above), np.arange(1 - len(above), 1))
    np.testing.assert_array_equal(values, [*-above[::-1], 0.0, *above])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_normal_quantiles_are_medians_of_equally_likely_parts(bits: int) -> None:
    values = np.array(jc.quant.normal_quantiles(bits).values)
    n = 2**bits - 1
    assert values[-1] == 1
    deviation = NORMAL.inv_cdf((n - 0.5) / n)
    likelihood = [NORMAL.cdf(v * deviation) for v in values]
    np.testing.assert_allclose(likelihood, (np.arange(n) + 0.5) / n, atol=1e-12)


def test_lloyd_max_has_the_levels_that_max_published() -> None:
    values = np.array(jc.quant.lloyd_max(3).values)
    levels = [0.0, 0.5606, 1.188, 2.033]  # Table I, N = 7
    np.testing.assert_allclose(values[3:] * 2.033, levels, atol=6e-4)
    np.testing.assert_array_equal(values, -values[::-1])


def test_lloyd_max_levels_are_the_means_of_their_cells() -> None:
    values = np.array(jc.quant.lloyd_max(4).values)
    x = np.linspace(-8, 8, 400_001)
    density = np.exp(-(x**2) / 2)

    def errors(deviation: float) -> np.ndarray:
        levels = values * deviation
        cell = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        means = np.bincount(cell, density * x) / np.bincount(cell, density)
        return np.abs(means - levels)

    best = min(errors(d).max() for d in np.linspace(2.6, 2.8, 41))
    assert best < 2e-3 < errors(2.5).max()


GRIDS = {
    "few": (-1.0, -0.25, 0.0, 0.5, 1.0),
    "without_zero": (-1.0, -0.5, 0.25, 2.0),
    "many": tuple((np.arange(-18, 19) / 16).tolist()),
}
X = np.linspace(-2.25, 2.25, 613).astype(np.float32)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_table_gives_the_nearest_entry_ties_to_the_lower(grid: str) -> None:
    element = Table(values=GRIDS[grid])
    values = np.float32(GRIDS[grid])
    x = np.concatenate([X, (values[1:] + values[:-1]) / 2])
    codes = encode(element, jnp.asarray(x), "nearest")
    distance = np.abs(x.astype(np.float64)[:, None] - np.float64(values))
    np.testing.assert_array_equal(codes, distance.argmin(1))
    np.testing.assert_array_equal(decode(element, codes), values[distance.argmin(1)])


@pytest.mark.parametrize("grid", ["few", "many"])
def test_a_table_toward_zero_takes_the_inner_neighbour(grid: str) -> None:
    element = Table(values=GRIDS[grid])
    values = np.float32(GRIDS[grid])
    found = np.asarray(decode(element, encode(element, jnp.asarray(X), "toward_zero")))
    up = np.where(X > 0, np.searchsorted(values, X, side="right") - 1, 0)
    down = np.where(X < 0, np.searchsorted(values, X), up)
    expected = np.where(X == 0, 0, values[np.minimum(down, len(values) - 1)])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "element",
    [Integer(bits=4), E2M1, E4M3, NF4, Table(values=GRIDS["many"])],
    ids=lambda element: element.label,
)
def test_stochastic_codes_take_each_neighbour_in_proportion(element: Any) -> None:
    """Noise spread evenly over [0, 1): the mean is the value, to one part in 512."""
    with jax.debug_nans(False):
        values = np.unique(
            decode(element, jnp.arange(2**element.bits, dtype=jnp.uint8))
        )
    values = np.unique(values[np.abs(values) <= element.largest]).astype(np.float64)
    x = np.random.default_rng(0).uniform(-1, 1, 64) * element.largest
    x = x.astype(np.float32)
    noise = (np.arange(512, dtype=np.float32) + 0.5) / 512
    x_all, noise_all = (jnp.asarray(a) for a in np.meshgrid(x, noise, indexing="ij"))
    found = decode(element, encode(element, x_all, "stochastic", noise_all))
    found = np.asarray(found, np.float64)
    place = np.clip(np.searchsorted(values, x, side="right"), 1, len(values) - 1)
    below, above = values[place - 1], values[place]
    assert ((found == below[:, None]) | (found == above[:, None])).all()
    gap = above - below
    np.testing.assert_array_less(np.abs(found.mean(1) - x) / gap, 1 / 500)


@floats
def test_no_noise_takes_a_float_beyond_its_largest(name: str) -> None:
    element, _ = FLOATS[name]
    x = jnp.float32([element.largest, 1e30])
    noise = jnp.float32([1 - 2**-23, 1 - 2**-23])
    codes = encode(element, x, "stochastic", noise)
    assert decode(element, codes).tolist() == [element.largest] * 2


def test_stochastic_rounding_leaves_integers_alone_whatever_the_noise() -> None:
    noise = jnp.float32(1 - 2**-23)  # The largest that jax.random.uniform returns.
    assert round_to_integer(jnp.float32(100), "stochastic", noise) == 100


def test_powers_and_logarithms_are_exact() -> None:
    exponent = np.arange(-126, 128)
    powers = np.ldexp(np.float32(1), exponent)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponent)), powers)
    np.testing.assert_array_equal(floor_log2(jnp.asarray(powers)), exponent)
    below = np.nextafter(powers[1:], np.float32(0))
    np.testing.assert_array_equal(floor_log2(jnp.asarray(below)), exponent[:-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], r"2 to 256 finite numbers; got an array of shape \(1,\)"),
        (np.arange(257), r"2 to 256 finite numbers; got an array of shape \(257,\)"),
        ([0.0, np.inf], "2 to 256 finite numbers"),
        ([0.0, np.nan], "2 to 256 finite numbers"),
        ([[0.0, 1.0]], r"2 to 256 finite numbers; got an array of shape \(1, 2\)"),
        ([1.0, 0.0], r"strictly ascending in float32.*Got \[1.0, 0.0\]"),
        ([0.0, 0.0, 1.0], "strictly ascending in float32"),
        ([1.0, 1.0 + 1e-12], "strictly ascending in float32"),
    ],
)
def test_bad_tables_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"table: values must be {message}"):
        jc.quant.table(values)


@pytest.mark.parametrize(
    ("values", "bits"), [((0.0, 1.0), 1), (GRIDS["few"], 3), (tuple(range(256)), 8)]
)
def test_a_table_takes_as_many_bits_as_it_has_entries(values: Any, bits: int) -> None:
    assert jc.quant.table(values).element.bits == bits
