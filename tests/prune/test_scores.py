"""Scores against loops written from the papers, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.prune import scores
from tests.quant.wrapping import run

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 5)).astype(np.float32)
G = RNG.normal(size=(6, 5)).astype(np.float32)


def lamp_of(w: np.ndarray) -> np.ndarray:
    """Equation 3, over the ascending order of a stable sort."""
    flat = w.astype(np.float64).ravel()
    order = np.argsort(np.abs(flat), kind="stable")
    found = np.zeros_like(flat)
    for u in range(flat.size):
        above = sum(flat[order[v]] ** 2 for v in range(u, flat.size))
        found[order[u]] = flat[order[u]] ** 2 / above if above else 0.0
    return found.reshape(w.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_pointwise_scores(dtype: Any) -> None:
    w, g = jnp.asarray(W, dtype), jnp.asarray(G, dtype)
    exact_w, exact_g = (np.asarray(a, np.float64) for a in (w, g))
    found = {
        "magnitude": (scores.magnitude(w), np.abs(exact_w)),
        "snip": (scores.snip(w, g), np.abs(exact_w * exact_g)),
        "grasp": (scores.grasp(w, g), exact_w * exact_g),
        "taylor": (scores.taylor(w, g), (exact_w * exact_g) ** 2),
        "batch_norm_scale": (scores.batch_norm_scale(w[0]), np.abs(exact_w[0])),
    }
    for name, (score, expected) in found.items():
        assert score.dtype == jnp.float32, name
        np.testing.assert_allclose(score, expected, rtol=3e-7, err_msg=name)


def test_grasp_keeps_the_weights_whose_removal_costs_the_most_gradient() -> None:
    """Brute force: the gradient's norm without each weight, of a quadratic."""
    root = RNG.normal(size=(8, 8))
    hessian = root @ root.T / 8
    linear = RNG.normal(size=8)
    w = RNG.normal(size=8) * 1e-3  # Small, so that the first order decides.
    norm = lambda w: np.sum((hessian @ w - linear) ** 2)
    left = [norm(np.where(np.arange(8) == i, 0.0, w)) for i in range(8)]
    assert min(left) < norm(w) < max(left)  # Some removals help, some hurt.
    grad = hessian @ w - linear
    score = scores.grasp(jnp.asarray(w, "float32"), jnp.asarray(hessian @ grad, "f4"))
    # Removed first: where the most gradient is left.
    np.testing.assert_array_equal(np.argsort(score), np.argsort(left)[::-1])


@pytest.mark.parametrize("ties", [False, True])
def test_lamp(ties: bool) -> None:
    w = np.round(W) if ties else W
    found = run(scores.lamp, jnp.asarray(w))
    np.testing.assert_allclose(found, lamp_of(w), rtol=1e-6)


def test_lamp_takes_the_layers_of_a_stack_apart_at_any_scale() -> None:
    stack = np.stack([W, np.zeros_like(W), W * np.float32(2.0**-90)])
    found = run(lambda w: scores.lamp(w, stack=1), jnp.asarray(stack))
    expected = [lamp_of(W), np.zeros_like(W), lamp_of(W)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_lamp_is_in_the_order_of_magnitude_where_weights_are_nearly_equal() -> None:
    w = (1 + np.arange(4096) * 2.0**-23).astype(np.float32)
    shuffled = np.random.default_rng(1).permutation(w)
    found = np.asarray(jax.jit(scores.lamp)(jnp.asarray(shuffled)))
    assert (np.diff(found[np.argsort(shuffled)]) >= 0).all()


SITES = {
    "matrix": ((6, 5), None),
    "stack": ((2, 6, 5), None),
    "convolution": ((2, 3, 4, 5), jc.Axes(contract=(-4, -3, -2))),
    "heads": ((3, 4, 5), jc.Axes(contract=(-1, -3))),
    "stacked_transpose": ((2, 5, 6), jc.Axes(contract=(-1,), stack=1)),
}


@pytest.mark.parametrize("site", SITES)
def test_wanda(site: str) -> None:
    shape, axes = SITES[site]
    roles = axes or jc.Axes(contract=(-2,), stack=len(shape) - 2)
    rng = np.random.default_rng(2)
    w = rng.normal(size=shape).astype(np.float32)
    inputs = int(np.prod([shape[a] for a in roles.contract]))
    moment = rng.uniform(size=(*shape[: roles.stack], inputs)).astype(np.float32)
    expected = np.zeros(shape)
    for index in itertools.product(*map(range, shape)):
        place = 0
        for a in roles.contract:
            place = place * shape[a] + index[a]
        x = np.float64(moment[(*index[: roles.stack], place)])
        expected[index] = abs(np.float64(w[index])) * np.sqrt(x)
    of = lambda w, moment: scores.wanda(w, moment, axes=axes)
    found = run(of, jnp.asarray(w), jnp.asarray(moment))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_wanda_takes_what_calibrate_finds() -> None:
    x = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    w = jnp.array([[1.0, -2.0], [3.0, 0.5]])
    stats = jc.calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    found = scores.wanda(w, stats["w"].second_moment)
    expected = np.abs(w) * np.sqrt([[12.5], [0.5]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
def test_structure_norm(order: Any) -> None:
    w = np.random.default_rng(3).normal(size=(3, 4, 2)).astype(np.float32)
    choices = [0, -1, (0, 2), (-1, -3), (0, 1, 2)]
    of = lambda w, **how: [
        scores.structure_norm(w, axes=axes, order=order, **how) for axes in choices
    ]
    both = run(lambda w: (of(w), of(w, keepdims=True)), jnp.asarray(w))
    for axes, found, broad in zip(choices, *both, strict=True):
        kept = sorted({a % 3 for a in np.atleast_1d(axes).tolist()})
        expected = np.zeros([w.shape[a] for a in kept])
        for index in np.ndindex(w.shape):
            place = tuple(index[a] for a in kept)
            expected[place] += abs(np.float64(w[index])) ** order
        np.testing.assert_allclose(found, expected ** (1 / order), rtol=1e-6)
        sizes = tuple(n if a in kept else 1 for a, n in enumerate(w.shape))
        np.testing.assert_array_equal(broad, np.reshape(found, sizes))


@pytest.mark.parametrize("power", [-120, 120])
def test_norms_of_extreme_weights_do_not_vanish_or_overflow(power: int) -> None:
    w = jnp.array([[3.0, 0.0], [4.0, 0.0]]) * 2.0**power
    found = scores.structure_norm(w, axes=-1)
    np.testing.assert_array_equal(found, [5 * 2.0**power, 0])


def test_geometric_median() -> None:
    w = np.random.default_rng(4).normal(size=(3, 4, 5)).astype(np.float32)
    axes = (0, 1, -1)
    of = lambda w: [scores.geometric_median(w, axis=axis) for axis in axes]
    for axis, found in zip(axes, run(of, jnp.asarray(w)), strict=True):
        flat = np.moveaxis(w.astype(np.float64), axis, 0).reshape(w.shape[axis], -1)
        expected = [sum(np.linalg.norm(a - b) for b in flat) for a in flat]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_geometric_median_prunes_the_replaceable_where_norms_do_not() -> None:
    """Nearly equal large filters are redundant; a small one apart is not."""
    w = jnp.array([[4.0, 4.0, 4.1, -1.0], [4.0, 4.1, 4.0, 0.5]])
    assert int(jnp.argmin(scores.structure_norm(w, axes=-1))) == 3
    assert int(jnp.argmax(scores.geometric_median(w, axis=-1))) == 3


def test_filters_nearly_equal_keep_their_distances() -> None:
    """A Gram matrix would lose them by cancellation."""
    w = jnp.array([[1000.0, 1000.0 + 2.0**-10, 1000.0]])
    found = scores.geometric_median(w, axis=-1)
    np.testing.assert_array_equal(found, np.array([1, 2, 1]) * 2.0**-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.snip(W, G[:1]), r"scores\.snip: grad must be .* got \(1, 5\)"),
        (lambda: scores.taylor(W, G.T), r"scores\.taylor: grad must be"),
        (lambda: scores.grasp(W, G.T), r"scores\.grasp: hessian_grad must be"),
        (
            lambda: scores.wanda(W, jnp.ones(5)),
            r"scores\.wanda: second_moment .* \(6,\) for w .*\(6, 5\); got \(5,\)",
        ),
        (
            lambda: scores.structure_norm(W, axes=-1, order=3),  # type: ignore[arg-type]
            r"structure_norm: order must be 1 or 2; got 3",
        ),
        (lambda: scores.structure_norm(W, axes=2), r"structure_norm: axes .* got 2"),
        (lambda: scores.structure_norm(W, axes=(0, -2)), r"distinct .* \(0, -2\)"),
        (lambda: scores.structure_norm(W, axes=()), r"distinct .* got \(\)"),
        (lambda: scores.geometric_median(W, axis=-3), r"geometric_median: .* got -3"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
