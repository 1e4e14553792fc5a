"""Every code of every format against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats as f
from tests.kernels.weights import FORMATS, value


@pytest.mark.parametrize("name", FORMATS)
def test_decode_is_exact_for_every_code(name: str) -> None:
    fmt = FORMATS[name]
    size = len(fmt.values) if isinstance(fmt, f.Table) else 2**fmt.bits
    codes = np.arange(size, dtype=np.uint8)
    with jax.debug_nans(False):
        found = np.asarray(fmt.decode(jnp.asarray(codes)))
    assert found.dtype == np.float32
    expected = [value(fmt, int(c)) for c in codes]
    np.testing.assert_array_equal(found, np.float32(expected))


def test_a_large_table_is_looked_up() -> None:
    values = tuple(np.random.default_rng(0).normal(size=200).tolist())
    codes = np.random.default_rng(1).integers(0, 200, size=50).astype(np.uint8)
    found = f.Table(values=values).decode(jnp.asarray(codes))
    np.testing.assert_array_equal(found, np.float32(values)[codes])


@pytest.mark.parametrize("fmt", [f.INT3, f.UINT3, f.NF4])
def test_bits_above_the_formats_are_ignored(fmt: f.Format) -> None:
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    high = codes | np.uint8(1 << fmt.bits)
    np.testing.assert_array_equal(
        fmt.decode(jnp.asarray(high)), fmt.decode(jnp.asarray(codes))
    )
