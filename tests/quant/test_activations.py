"""Fake-quantized activations against their definition in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.quant._activations import fake_quantize_activations

INT8, UINT8 = q.Integer(bits=8), q.Integer(bits=8, symmetric=False, narrow=False)
INT4 = q.Integer(bits=4)
quantize = jax.jit(q.quantize, static_argnames="fmt")
prepare = jax.jit(
    lambda leaf, x, axes: leaf.prepare_activations(x, axes), static_argnums=2
)
fake = jax.jit(fake_quantize_activations, static_argnames=("activations", "axes"))


def tokens() -> np.ndarray:
    """Rows of very different magnitudes, one of them zero, one positive."""
    x = np.random.default_rng(0).normal(size=(4, 3, 8)) + 0.5
    x *= np.exp2([-9, 0, 5, 12])[:, None, None]
    x[0, 0] = 0
    x[1, 1] = np.abs(x[1, 1])
    return x.astype(np.float32)


def safe(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1)


def symmetric(x: np.ndarray, axes: Any, top: int) -> np.ndarray:
    scale = np.abs(x).max(axes, keepdims=True) / top
    return np.rint(x / safe(scale)) * scale


def asymmetric(x: np.ndarray, axes: Any) -> np.ndarray:
    low = np.minimum(x.min(axes, keepdims=True), 0)
    high = np.maximum(x.max(axes, keepdims=True), 0)
    scale = (high - low) / 255
    zero = -np.rint(low / safe(scale))
    return (np.clip(np.rint(x / safe(scale)) + zero, 0, 255) - zero) * scale


def cast(x: np.ndarray, axes: Any, dtype: Any) -> np.ndarray:
    top = float(ml_dtypes.finfo(dtype).max)
    scale = np.abs(x).max(axes, keepdims=True) / top
    scaled = np.clip(x / safe(scale), -top, top).astype(dtype)
    return scaled.astype(np.float64) * scale


DEFINITIONS = {
    "int8": (INT8, lambda x, axes: symmetric(x, axes, 127)),
    "int4": (INT4, lambda x, axes: symmetric(x, axes, 7)),
    "uint8": (UINT8, asymmetric),
    "fp8_e4m3": (q.E4M3, lambda x, axes: cast(x, axes, ml_dtypes.float8_e4m3fn)),
    "fp8_e5m2": (q.E5M2, lambda x, axes: cast(x, axes, ml_dtypes.float8_e5m2)),
}


@pytest.mark.parametrize("axes", [(-1,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_token_has_a_scale_of_its_own(name: str, axes: tuple[int, ...]) -> None:
    element, oracle = DEFINITIONS[name]
    x = tokens()
    found = fake(x, q.dynamic(element), axes=axes)
    np.testing.assert_allclose(found, oracle(np.float64(x), axes), rtol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_tensor_has_one_scale(name: str) -> None:
    element, oracle = DEFINITIONS[name]
    x = tokens()
    found = fake(x, q.dynamic(element, per="tensor"), axes=(-1,))
    np.testing.assert_allclose(found, oracle(np.float64(x), None), rtol=1e-6)


def test_a_small_token_needs_its_own_scale_beside_large_ones() -> None:
    x = tokens()
    small = x[1]
    error = lambda per: np.abs(
        np.asarray(fake(x, q.dynamic(INT8, per=per), axes=(-1,)))[1] - small
    )
    assert error("token").max() < np.abs(small).max() / 250
    np.testing.assert_array_equal(error("tensor"), np.abs(small))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_dynamic_activations_have_an_identity_gradient(name: str) -> None:
    element, _ = DEFINITIONS[name]
    x = tokens()
    _, pull_back = jax.vjp(lambda x: fake(x, q.dynamic(element), axes=(-1,)), x)
    np.testing.assert_array_equal(pull_back(x[::-1])[0], x[::-1])


@pytest.mark.parametrize(
    ("element", "scale", "zero", "low", "high"),
    [
        (INT8, 0.25, None, -127, 127),
        (INT4, 0.25, None, -7, 7),
        (UINT8, 0.25, 3.0, -3, 252),
        (q.E4M3, 2.0**-8, None, -448, 448),
    ],
    ids=["int8", "int4", "uint8", "fp8_e4m3"],
)
def test_static_activations_are_clipped_with_no_gradient_beyond(
    element: Any, scale: float, zero: float | None, low: int, high: int
) -> None:
    steps = np.float32([low - 9, low - 0.6, low, 0, 1, high, high + 0.6, high + 9])
    x = steps * np.float32(scale)
    run = lambda x: fake(
        x,
        q.static(element),
        axes=(0,),
        scale=jnp.float32([scale]),
        zero=None if zero is None else jnp.float32([zero]),
    )
    found, pull_back = jax.vjp(run, x)
    np.testing.assert_array_equal(found, np.clip(steps, low, high) * scale)
    inside = (steps >= low) & (steps <= high)
    np.testing.assert_array_equal(pull_back(np.ones_like(x))[0], inside)


def test_activations_keep_their_dtype() -> None:
    x = tokens().astype(jnp.bfloat16)
    found = fake(x, q.dynamic(INT8), axes=(-1,))
    assert found.dtype == jnp.bfloat16
    exact = symmetric(np.float64(x), -1, 127)
    np.testing.assert_allclose(np.float64(found), exact, rtol=2**-8)


W = np.ones((8, 6), np.float32)


def test_a_leaf_prepares_activations_as_its_format_says() -> None:
    x = jnp.asarray(tokens())
    plain = quantize(W, q.int8())
    assert plain.prepare_activations(x) is x
    assert not plain.traits.own_matmul
    leaf = quantize(W, q.int8(activations=q.dynamic(INT8)))
    assert leaf.traits.own_matmul
    along = {(-1,): -1, (1,): 1}
    for axes, expected in along.items():
        np.testing.assert_allclose(
            prepare(leaf, x, axes),
            symmetric(np.float64(x), expected, 127),
            rtol=1e-6,
        )


def test_a_leaf_applies_its_calibrated_scale_and_zero_point() -> None:
    x = jnp.asarray(tokens())
    fmt = q.int8(activations=q.static(UINT8))
    leaf = quantize(W, fmt, activation_scale=0.5, activation_zero=100.0)
    expected = np.clip(np.rint(np.float64(x) / 0.5), -100, 155) * 0.5
    np.testing.assert_array_equal(prepare(leaf, x, (-1,)), expected)


def test_asymmetric_static_activations_need_a_zero_point() -> None:
    fmt = q.int8(activations=q.static(UINT8))
    with pytest.raises(ValueError, match="activation_zero"):
        quantize(W, fmt, activation_scale=0.5)


def test_a_scale_for_each_layer_needs_the_stack_sliced() -> None:
    fmt = q.int8(activations=q.static(INT8), axes=-2)
    stack = quantize(np.stack([W, W]), fmt, activation_scale=jnp.array([0.5, 2.0]))
    x = jnp.asarray(tokens())
    with pytest.raises(ValueError, match=r"shape \(2, 1, 1\), need the stack sliced"):
        stack.prepare_activations(x)
    layer = jax.tree.map(lambda a: a[1], stack)
    expected = np.clip(np.rint(np.float64(x) / 2), -127, 127) * 2
    np.testing.assert_array_equal(prepare(layer, x, (-1,)), expected)


@pytest.mark.parametrize("element", [INT8, UINT8], ids=["int8 dot", "fake-quantized"])
@pytest.mark.parametrize("subscripts", ["eti,eio->eto", "tei,eio->teo", "eio,tei->eot"])
def test_batched_experts_have_a_scale_each(element: Any, subscripts: str) -> None:
    fmt = q.int8(activations=q.static(element), axes=-2)
    scales, zeros = np.array([0.05, 0.5, 0.02]), np.array([100.0, 90.0, 128.0])
    w = np.random.default_rng(4).normal(size=(3, *W.shape)).astype(np.float32)
    x = np.random.default_rng(5).normal(size=(3, 4, len(W))).astype(np.float32)
    zero = {} if element.symmetric else {"activation_zero": jnp.float32(zeros)}
    low, high = (-127, 127) if element.symmetric else (-zeros, 255 - zeros)
    low, high = (np.reshape(np.broadcast_to(a, 3), (3, 1, 1)) for a in (low, high))
    s = scales[:, None, None]
    first = subscripts.split(",")[0]
    given = x if first == "eti" else x.swapaxes(0, 1)

    def run(w: jax.Array, x: jax.Array) -> Any:
        leaf = quantize(w, fmt, activation_scale=jnp.float32(scales), **zero)
        operands = lambda w, x: (w, x) if first == "eio" else (x, w)
        dot = jc.lift(lambda w, x: jnp.einsum(subscripts, *operands(w, x)))
        out, pull = jax.vjp(lambda x: dot(leaf, x), x)
        return out, pull(jnp.ones_like(out))[0], leaf.materialize()

    out, gradient, dense = jax.jit(run)(w, given)
    rounded = np.clip(np.rint(np.float64(x) / s), low, high)
    expected = np.einsum("eti,eio->eto", rounded * s, np.float64(dense))
    order = {"eto": (0, 1, 2), "teo": (1, 0, 2), "eot": (0, 2, 1)}
    found = np.transpose(expected, order[subscripts[-3:]])
    np.testing.assert_allclose(out, found, rtol=1e-4, atol=1e-4)
    inside = (x / s >= low) & (x / s <= high)
    slopes = inside * np.asarray(dense).sum(-1)[:, None]
    slopes = slopes if first == "eti" else slopes.swapaxes(0, 1)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-3, atol=1e-3)


def test_a_scheme_is_per_token_or_per_tensor() -> None:
    with pytest.raises(ValueError, match="per must be 'token' or 'tensor'; got 'row'"):
        q.dynamic(INT8, per="row")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("activations", "label"),
    [
        (q.dynamic(INT8), "int8 activations per token"),
        (q.dynamic(q.E4M3, per="tensor"), "fp8_e4m3 activations per tensor"),
        (q.static(UINT8), "uint8 activations static"),
    ],
)
def test_labels_of_activations(activations: q.Activations, label: str) -> None:
    assert activations.label == label
