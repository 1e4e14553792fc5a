"""Projectors against NumPy, and as part of a student's params."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

d = jc.distill
RNG = np.random.default_rng(9)
X = RNG.normal(size=(2, 5, 4)).astype(np.float32)
KEY = jax.random.key(2)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def drawn(projector: jc.distill.Projector) -> Any:
    """Params of the right shapes, none of them what it starts as."""
    shapes = jax.eval_shape(projector.init, KEY)
    return jax.tree.map(lambda a: RNG.normal(size=a.shape).astype(a.dtype), shapes)


def layer_norm(y: np.ndarray, params: Any) -> np.ndarray:
    gap = y - y.mean(-1, keepdims=True)
    scaled = gap / np.sqrt(np.square(gap).mean(-1, keepdims=True) + 1e-6)
    return scaled * params["scale"] + params["bias"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(norm: bool, bias: bool) -> None:
    projector = d.linear_projector(4, 3, bias=bias, layer_norm=norm)
    params = drawn(projector)
    assert ("bias" in params["linear"]) == bias
    assert ("norm" in params) == norm
    p = wide(params)
    expected = X @ p["linear"]["kernel"] + p["linear"].get("bias", 0.0)
    if norm:
        expected = layer_norm(expected, p["norm"])
    found = jax.jit(projector.apply)(params, X)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [None, (6, 5), ()])
def test_mlp(hidden: Any) -> None:
    projector = d.mlp_projector(X, 3, hidden=hidden, activation=jnp.tanh)
    params = drawn(projector)
    sizes = [4, *((3,) if hidden is None else hidden), 3]
    p, expected = wide(params), X.astype(np.float64)
    for i in range(len(sizes) - 1):
        layer = p[f"linear_{i}"]
        assert layer["kernel"].shape == (sizes[i], sizes[i + 1])
        expected = expected @ layer["kernel"] + layer["bias"]
        expected = np.tanh(expected) if i < len(sizes) - 2 else expected
    found = jax.jit(projector.apply)(params, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_mlp_normalizes_its_result_on_request() -> None:
    projector = d.mlp_projector(4, 3, layer_norm=True)
    params = jax.jit(projector.init)(KEY)
    y = np.asarray(jax.jit(projector.apply)(params, X))
    np.testing.assert_allclose(y.mean(-1), np.zeros((2, 5)), atol=1e-5)


def test_convolution_slides_a_window_over_a_larger_map() -> None:
    student = RNG.normal(size=(2, 4, 5, 2)).astype(np.float32)
    teacher = jax.ShapeDtypeStruct((7, 3, 3, 4), jnp.float32)
    projector = d.convolution_projector(student, teacher)
    params = drawn(projector)
    kernel, bias = (wide(params)["convolution"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (2, 3, 2, 4)
    expected = np.zeros((2, 3, 3, 4))
    for n, i, j in np.ndindex(2, 3, 3):
        window = student[n, i : i + 2, j : j + 3]
        expected[n, i, j] = np.tensordot(window, kernel, 3) + bias
    found = jax.jit(projector.apply)(params, student)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    stacked = jax.jit(projector.apply)(params, student[None])
    np.testing.assert_allclose(stacked[0], found, rtol=1e-5)


def test_params_start_the_same_for_the_same_key_at_the_scale_of_their_inputs() -> None:
    init = jax.jit(d.linear_projector(256, 64).init)
    kernel = np.asarray(init(KEY)["linear"]["kernel"])
    np.testing.assert_array_equal(kernel, init(KEY)["linear"]["kernel"])
    assert (kernel != init(jax.random.key(3))["linear"]["kernel"]).any()
    np.testing.assert_allclose(kernel.std(), 1 / 16, rtol=0.03)


def test_half_precision_features_give_float32() -> None:
    projector = d.mlp_projector(4, 3)
    params = drawn(projector)
    half = jax.jit(projector.apply)(params, jnp.asarray(X, jnp.bfloat16))
    full = jax.jit(projector.apply)(params, X)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, rtol=0.05, atol=0.05)


def test_a_projector_is_trained_among_the_params_of_the_student() -> None:
    """The hint loss of a student and its projector reaches a linear teacher."""
    teacher = X @ RNG.normal(size=(4, 6)).astype(np.float32)
    projector = d.linear_projector(3, teacher)
    first = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    params = {"student": first, "projector": jax.jit(projector.init)(KEY)}
    trainable, rest = jc.partition(params)
    assert len(jax.tree.leaves(trainable)) == 3
    assert not jax.tree.leaves(rest)

    def loss(params: Any) -> jax.Array:
        features = jnp.matmul(X.reshape(-1, 4), params["student"])
        projected = projector.apply(params["projector"], features)
        return d.hint(projected, teacher.reshape(-1, 6)).mean()

    def step(params: Any, _: None) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads), value

    trained, values = jax.jit(lambda p: jax.lax.scan(step, p, None, length=200))(params)
    assert values[-1] < 0.3 * values[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.linear_projector(0, 3), r"linear_projector: student .* got 0"),
        (lambda: d.linear_projector(3, jnp.zeros(())), r"teacher .* got 0"),
        (lambda: d.mlp_projector(3, 3, hidden=(2, -1)), r"hidden .* got -1"),
        (
            lambda: d.convolution_projector(
                jnp.zeros((1, 4, 4, 2)), jnp.zeros((1, 4, 5, 2))
            ),
            r"convolution_projector: .* \(1, 4, 5, 2\)",
        ),
        (
            lambda: d.convolution_projector(jnp.zeros((4, 2)), jnp.zeros((4, 2))),
            r"maps \[\.\.\., height, width, channels\]",
        ),
    ],
)
def test_sizes_that_make_no_projector_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_features_of_another_size_are_refused() -> None:
    projector = d.linear_projector(3, 2)
    with pytest.raises(ValueError, match=r"apply got .* \(4,\), .* for size \(3,\)"):
        projector.apply(drawn(projector), X)
