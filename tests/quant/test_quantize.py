"""Every number format against its definition in float64; zeros and rounding."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcompress import quant as q
from jaxcompress.quant._rounding import round_scale
from tests.quant.oracles import (
    FORMATS,
    KEY,
    both,
    dense,
    heavy,
    reaching,
    significant,
    sixteen_bits,
)


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


# -- quantizing twice, and the ends of the ranges


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
