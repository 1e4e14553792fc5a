"""Bounds on the error of every family of formats."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress import quant as q
from tests.quant.oracles import FORMATS, both, dense

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
