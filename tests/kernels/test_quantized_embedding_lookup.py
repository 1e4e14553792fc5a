"""Rows of quantized tables against float64 NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, packing
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_embedding_lookup import choose, quantized_embedding_lookup
from kernels_pallas.quantized_embedding_lookup.reference import (
    quantized_embedding_lookup as reference,
)
from kernels_pallas.target import Target

V, K = 11, 30
FORMATS = {
    "int4": (formats.INT4, 3, False),
    "uint3": (formats.UINT3, 2, True),
    "int8": (formats.INT8, 1, False),
    "nf4": (formats.NF4, 5, False),
    "fp8": (formats.FP8_E4M3, 1, False),
}


def decoded(codes: np.ndarray, fmt: formats.Format) -> np.ndarray:
    """Values of codes in float64."""
    if isinstance(fmt, formats.Table):
        return np.array(fmt.values)[codes]
    if isinstance(fmt, formats.Float8):
        return codes.view(jnp.float8_e4m3fn).astype(float)
    signed = codes.astype(int)
    return signed - 2**fmt.bits * (fmt.signed & (signed >> (fmt.bits - 1)))


def table(name: str, *, seed: int = 0) -> tuple[Weight, np.ndarray, np.ndarray]:
    """A weight, its dense float64 table, and that before scales."""
    fmt, groups, shifted = FORMATS[name]
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**fmt.bits, (V, K), np.uint8)
    codes = np.where(codes % 128 == 127, 1, codes) if name == "fp8" else codes
    scale = rng.uniform(0.5, 2.0, (V, groups)).astype(np.float32)
    zero = rng.uniform(0.0, 7.0, (V, groups)).astype(np.float32) if shifted else None
    weight = Weight(
        packing.pack(jnp.asarray(codes), bits=fmt.bits),
        jnp.asarray(scale),
        None if zero is None else jnp.asarray(zero),
    )
    spread = lambda a: np.repeat(a.astype(float), K // groups, axis=1)
    unit = decoded(codes, fmt) - (0.0 if zero is None else spread(zero))
    return weight, unit * spread(scale), unit


IDS = np.array([[3, 0, 10], [3, 7, 3]], np.int32)


def looked_up(ids: Any, weight: Weight, name: str, **options: Any) -> jax.Array:
    run = functools.partial(
        quantized_embedding_lookup, fmt=FORMATS[name][0], k=K, **options
    )
    return jax.jit(run)(jnp.asarray(ids), weight)


def agrees(y: Any, wanted: np.ndarray) -> None:
    """A table's value, the difference and the product are each rounded once."""
    error = abs(np.asarray(y, float) - wanted)
    assert (error <= 3 * 2.0**-24 * abs(wanted)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_agree_with_float64(name: str) -> None:
    weight, dense, _ = table(name)
    found = looked_up(IDS, weight, name)
    assert found.shape == (*IDS.shape, K)
    assert found.dtype == jnp.float32
    agrees(found, dense[IDS])


def test_the_dtype_of_the_result() -> None:
    weight, dense, _ = table("int8")
    half = weight._replace(scale=weight.scale.astype(jnp.bfloat16))
    assert looked_up(IDS, half, "int8").dtype == jnp.bfloat16
    found = np.asarray(looked_up(IDS, weight, "int8", dtype=jnp.bfloat16), float)
    assert (abs(found - dense[IDS]) <= 2.0**-7 * abs(dense[IDS])).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_ids_outside_are_clipped(dtype: Any) -> None:
    weight, dense, _ = table("int8")
    ids = np.array([0, 10, 11, 200], dtype)
    agrees(looked_up(ids, weight, "int8"), dense[np.minimum(ids, 10)])


def test_negative_ids_are_clipped_or_count_from_the_end() -> None:
    weight, dense, _ = table("int8")
    ids = np.array([-1, -11, 4])
    agrees(looked_up(ids, weight, "int8", mode="clip"), dense[[0, 0, 4]])
    agrees(looked_up(ids, weight, "int8", mode="fill"), dense[[10, 0, 4]])


@pytest.mark.parametrize("name", ["uint3", "nf4"])
def test_ids_outside_are_filled_by_nan(name: str) -> None:
    weight, dense, _ = table(name)
    ids = np.array([11, 2, -12])
    plain = jax.jit(lambda i, w: reference(i, w, FORMATS[name][0], k=K, mode="fill"))
    with jax.debug_nans(False):
        found = np.asarray(looked_up(ids, weight, name, mode="fill"))
        wanted = np.asarray(plain(ids, weight))
    assert np.isnan(found[::2]).all()
    agrees(found[1], dense[2])
    np.testing.assert_array_equal(found, wanted)


def test_a_stack() -> None:
    parts = [table("uint3", seed=seed) for seed in (1, 2)]
    weight = jax.tree.map(lambda *a: np.stack(a), *(p[0] for p in parts))
    found = looked_up(np.stack([IDS, IDS[::-1]]), weight, "uint3")
    assert found.shape == (2, *IDS.shape, K)
    agrees(found[0], parts[0][1][IDS])
    agrees(found[1], parts[1][1][IDS[::-1]])


@pytest.mark.parametrize("mode", ["clip", "fill"])
def test_gradients_add_up_over_tokens(mode: Any) -> None:
    weight, _, unit = table("uint3")
    ids = np.array([3, 0, 10, 3, 3, 9])
    dy = np.random.default_rng(5).standard_normal((6, K)).astype(np.float32)
    run = lambda w: quantized_embedding_lookup(
        jnp.asarray(ids), w, formats.UINT3, k=K, mode=mode
    )
    words, dscale, dzero = jax.jit(lambda w: jax.vjp(run, w)[1](jnp.asarray(dy))[0])(
        weight
    )
    assert words.dtype == jax.dtypes.float0
    grouped = lambda a: a.reshape(*a.shape[:-1], 2, -1).sum(-1)
    scale = np.asarray(weight.scale, float)
    wanted, size = np.zeros((2, V, 2)), np.zeros((2, V, 2))
    for i, d in zip(ids, dy.astype(float), strict=True):
        wanted[0, i] += grouped(d * unit[i])
        wanted[1, i] -= grouped(d) * scale[i]
        size[0, i] += grouped(abs(d * unit[i]))
        size[1, i] += grouped(abs(d)) * scale[i]
    limit = size * (6 * K + 3) * 2.0**-24
    for found, a, b in zip((dscale, dzero), wanted, limit, strict=True):
        assert (abs(np.asarray(found, float) - a) <= b).all()


def test_an_id_that_is_clipped_gives_its_gradient_to_the_row_it_read() -> None:
    weight, _, unit = table("int8")
    run = lambda scale: quantized_embedding_lookup(
        jnp.array([99]), weight._replace(scale=scale), formats.INT8, k=K
    ).sum()
    found = np.asarray(jax.jit(jax.grad(run))(weight.scale))
    assert abs(found[10, 0] - unit[10].sum()) <= abs(unit[10]).sum() * K * 2.0**-24
    assert not found[:10].any()


def test_only_the_rows_read_become_floats() -> None:
    rows, k = 50_000, 64
    weight = Weight(
        jax.ShapeDtypeStruct((rows, k // 2), jnp.uint8),
        jax.ShapeDtypeStruct((rows, 1), jnp.float32),
    )
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    run = jax.jit(lambda i, w: quantized_embedding_lookup(i, w, formats.INT4, k=k))
    memory = run.lower(ids, weight).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < rows


def test_choose() -> None:
    choice = choose(formats.INT4, target=Target("tpu", "TPU v5e"))
    assert choice.kernel == "xla"
    assert "int4" in choice.how


BAD: dict[str, tuple[type[Exception], str, Any, dict[str, Any]]] = {
    "ids": (
        TypeError,
        "ids must be integers",
        lambda i, w: (i.astype(jnp.float32), w),
        {},
    ),
    "words": (
        TypeError,
        "words must be uint8",
        lambda i, w: (i, w._replace(words=w.words.astype(jnp.int32))),
        {},
    ),
    "mode": (ValueError, "mode must be", lambda i, w: (i, w), {"mode": "wrap"}),
    "groups": (ValueError, "divides the 32", lambda i, w: (i, w), {"k": 32}),
    "k": (ValueError, "words must be", lambda i, w: (i, w), {"k": 60}),
    "zero": (
        ValueError,
        "zero must be",
        lambda i, w: (i, w._replace(zero=w.scale[:, :1])),
        {},
    ),
    "stack": (
        ValueError,
        "ids must begin with",
        lambda i, w: (i, jax.tree.map(lambda a: jnp.stack([a] * 3), w)),
        {},
    ),
}


@pytest.mark.parametrize(
    ("error", "message", "change", "options"), BAD.values(), ids=BAD
)
def test_what_is_refused(
    error: type[Exception], message: str, change: Any, options: dict[str, Any]
) -> None:
    ids, weight = change(jnp.asarray(IDS), table("int4")[0])
    with pytest.raises(error, match=f"quantized_embedding_lookup.*{message}"):
        quantized_embedding_lookup(ids, weight, formats.INT4, **{"k": K, **options})
