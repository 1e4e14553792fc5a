"""`int8_matmul` and `fp8_matmul`: exact sums, every form alike, gradients, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, layouts
from kernels_pallas.layouts import Weight
from kernels_pallas.scaled_matmul import (
    fp8_matmul,
    int8_matmul,
    quantize_rows,
    reference,
    tpu,
    xla,
)
from kernels_pallas.target import Target
from tests.kernels.weights import FORMATS, random_weight

N, K = 13, 256
SIGNED = ("int8", "int4", "int3", "int2")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_codes(seed: int, m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, size=(m, k)).astype(np.int8)
    return codes, rng.uniform(0.1, 1.0, size=(m, 1)).astype(np.float32)


def exact(codes: np.ndarray, scale: np.ndarray, dense: np.ndarray) -> np.ndarray:
    return (codes.astype(np.float64) * scale) @ dense.T


@pytest.mark.parametrize("name", SIGNED)
def test_every_form_agrees_with_float64(name: str) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    assert isinstance(fmt, formats.Integer)
    made = [random_weight(rng, fmt, N, K, groups) for groups in (1, 2)]
    inputs = [random_codes(m, m, K) for m in (1, 17)]

    repack = lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.TPU)
    packed = [jax.jit(repack)(w) for w, _ in made]

    @jax.jit
    def run(inputs: Any, weights: Any, packed: Any) -> Any:
        pairs = list(zip(inputs, weights, strict=True))
        return (
            [reference.scaled_matmul(*x, w, fmt) for x, w in pairs],
            [xla.scaled_matmul(*x, w, fmt) for x, w in pairs],
            [
                tpu.scaled_matmul(*x, w, fmt, interpret=True)[:, :N]
                for x, w in zip(inputs, packed, strict=True)
            ],
        )

    for form in run(inputs, [w for w, _ in made], packed):
        for y, x, (_, dense) in zip(form, inputs, made, strict=True):
            # Two scales multiply, two groups add; the sums themselves are exact.
            size = np.abs(x[0].astype(np.float64) * x[1]) @ np.abs(dense.T)
            error = np.abs(np.asarray(y, np.float64) - exact(*x, dense))
            assert (error <= size * 6 * 2.0**-24).all()


def test_sums_are_exact_beyond_what_float32_holds() -> None:
    k = 2**11
    codes = np.full((2, k), 127, np.int8)
    codes[1, ::2] = 126
    weight = Weight(jnp.full((3, k), 127, jnp.uint8), jnp.ones((3, 1)))
    y = int8_matmul(codes, weight, formats.INT8, x_scale=jnp.ones((2, 1)))
    assert y[0].tolist() == [127 * 127 * k] * 3
    assert y[1].tolist() == [(127 + 126) * 127 * k // 2] * 3


def test_rows_are_rounded_to_their_own_scale_or_the_given_one() -> None:
    x = normal(1, 4, 16) * np.array([[1.0], [1e-6], [1e6], [0.0]], np.float32)
    codes, scale = quantize_rows(x, formats.INT8)
    error = np.abs(np.asarray(codes, np.float64) * scale - x)
    assert (error <= np.abs(x).max(-1, keepdims=True) / 254 * (1 + 1e-6)).all()
    assert np.abs(np.asarray(codes)[:3]).max(-1).tolist() == [127] * 3
    assert not np.asarray(codes)[3].any()
    given, wide = quantize_rows(x[:1], formats.INT8, jnp.float32(0.01))
    assert np.abs(given).max() == 127
    np.testing.assert_array_equal(wide, [[np.float32(0.01)]])


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_agrees_with_float64(name: str) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(9)
    assert isinstance(fmt, formats.Float8)
    made = [random_weight(rng, fmt, N, K, groups) for groups in (1, 2)]
    xs = [normal(m, m, K) for m in (1, 17)]
    repack = lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.TPU)
    packed = [jax.jit(repack)(w) for w, _ in made]

    @jax.jit
    def run(xs: Any, weights: Any, packed: Any) -> Any:
        codes = [quantize_rows(x, fmt) for x in xs]
        pairs = list(zip(codes, weights, strict=True))
        return codes, (
            [reference.scaled_matmul(*x, w, fmt) for x, w in pairs],
            [xla.scaled_matmul(*x, w, fmt) for x, w in pairs],
            [
                tpu.scaled_matmul(*x, w, fmt, interpret=True)[:, :N]
                for x, w in zip(codes, packed, strict=True)
            ],
            [fp8_matmul(x, w, fmt) for x, w in zip(xs, weights, strict=True)],
        )

    codes, forms = run(xs, [w for w, _ in made], packed)
    for (code, scale), x in zip(codes, xs, strict=True):
        step = 2.0 ** -(3 if name == "fp8_e4m3" else 2)
        error = np.abs(np.asarray(code, np.float64) * np.asarray(scale) - x)
        tiny = np.asarray(scale, np.float64) * 2.0**-9
        assert (error <= np.abs(x) * step / 2 * (1 + 1e-6) + tiny).all()
    for form in forms:
        for y, x, (_, dense) in zip(form, codes, made, strict=True):
            pair = (np.asarray(x[0], np.float64), np.asarray(x[1], np.float64))
            size = np.abs(pair[0] * pair[1]) @ np.abs(dense.T)
            error = np.abs(np.asarray(y, np.float64) - exact(*pair, dense))
            assert (error <= size * (K + 6) * 2.0**-24).all()


def test_gradients_are_straight_through_and_stop_where_a_scale_clips() -> None:
    fmt = formats.INT4
    weight, dense = random_weight(np.random.default_rng(2), fmt, N, K, 2)
    x, dy = normal(3, 5, K), normal(4, 5, N)
    static = jnp.float32(0.01)

    @jax.jit
    def run(x: Any, weight: Weight, static: Any) -> Any:
        dynamic = lambda x: (int8_matmul(x, weight, fmt) * dy).sum()
        clipped = lambda x, scale, s: (
            int8_matmul(x, weight._replace(scale=s), fmt, x_scale=scale) * dy
        ).sum()
        found = jax.grad(clipped, (0, 1, 2))(x, static, weight.scale)
        return jax.grad(dynamic)(x), found

    straight, (dx, dscale, dw) = run(x, weight, static)
    wanted = dy.astype(np.float64) @ dense
    atol = 1e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(straight, wanted, atol=atol)
    inside = np.abs(x) <= 127 * np.float32(0.01)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_allclose(dx, np.where(inside, wanted, 0), atol=atol)
    q = np.clip(np.round(x / np.float32(0.01)), -127, 127).astype(np.float64)
    np.testing.assert_allclose(dscale, (q * wanted).sum(), rtol=1e-4)
    values = dense / np.repeat(np.asarray(weight.scale, np.float64), K // 2, 1)
    by_weight = (dy.T.astype(np.float64) @ (q * 0.01)) * values
    np.testing.assert_allclose(dw, by_weight.reshape(N, 2, -1).sum(-1), rtol=1e-3)


def test_stacks_and_dtypes() -> None:
    fmt, rng = formats.INT8, np.random.default_rng(5)
    made = [random_weight(rng, fmt, N, K, 1) for _ in range(2)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(w for w, _ in made))
    x = jnp.asarray(normal(6, 2, 3, K), jnp.bfloat16)
    y = jax.jit(lambda x, w: int8_matmul(x, w, fmt))(x, stack)
    assert y.dtype == jnp.bfloat16
    for part, row, (weight, _) in zip(y, x, made, strict=True):
        alone = int8_matmul(row, weight, fmt, dtype=jnp.float32)
        np.testing.assert_array_equal(part, alone.astype(jnp.bfloat16))


def test_the_int8_dot_reaches_the_compilers_fast_path() -> None:
    shape = jax.ShapeDtypeStruct
    weight = Weight(shape((256, 256), jnp.uint8), shape((256, 1), jnp.float32))
    run = jax.jit(lambda x, w: int8_matmul(x, w, formats.INT8))
    text = run.lower(shape((1, 256), jnp.float32), weight).compile().as_text()
    assert "__ynn_fusion" in text
    assert "s32[2,256]" in text


WEIGHT = random_weight(np.random.default_rng(7), formats.INT4, N, K, 1)[0]
X = normal(8, 2, K)
WRONG = {
    "unsigned": (X, WEIGHT, formats.UINT4, {}, "signed integers without zero points"),
    "zero points": (
        X,
        WEIGHT._replace(zero=WEIGHT.scale),
        formats.INT4,
        {},
        "zero present",
    ),
    "codes without a scale": (
        X.astype(np.int8),
        WEIGHT,
        formats.INT4,
        {},
        "x_scale must be given with codes",
    ),
    "other integers": (
        X.astype(np.int32),
        WEIGHT,
        formats.INT4,
        {},
        "x must be float32, .* or int8; got int32",
    ),
    "other inputs": (X[:, :9], WEIGHT, formats.INT4, {}, "13, 5.* for 13 outputs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_named(case: str) -> None:
    x, weight, fmt, options, message = WRONG[case]
    with pytest.raises((TypeError, ValueError), match=message):
        int8_matmul(x, weight, fmt, **options)


def test_a_layout_without_a_kernel_is_refused() -> None:
    packed = layouts.repack(WEIGHT, formats.INT4, n=N, k=K, to=layouts.GPU)
    h200 = Target("gpu", "NVIDIA H200")
    with pytest.raises(ValueError, match=r"layout must be portable.*got 'gpu'"):
        int8_matmul(X, packed, formats.INT4, n=N, layout=layouts.GPU, target=h200)


def test_fp8_refuses_other_formats() -> None:
    with pytest.raises(ValueError, match=r"fp8_matmul: fmt must be fp8.*got int4"):
        fp8_matmul(X, WEIGHT, formats.INT4)
