"""Scores from the gradients of a loss, against derivatives worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 3))
BATCHES = [(RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))) for _ in range(3)]
as_f32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
PARAMS = {"layer": {"w": jnp.asarray(W, jnp.float32)}, "count": jnp.array(3)}


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Squares whose scale is an integer parameter that is not trained."""
    error = x @ params["layer"]["w"] - y
    return params["count"].astype(jnp.float32) * jnp.square(error).sum() / x.shape[0]


def gradient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 2 * 3 * x.T @ (x @ W - y) / 5


def hessian_times(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 2 * 3 * x.T @ (x @ v) / 5


def expected(kind: str) -> np.ndarray:
    grads = [gradient(x, y) for x, y in BATCHES]
    mean = sum(grads) / 3
    if kind == "taylor":
        return sum((g * W) ** 2 for g in grads) / 3
    if kind == "snip":
        return np.abs(mean * W)
    return W * sum(hessian_times(x, mean) for x, _ in BATCHES) / 3


@pytest.mark.parametrize("kind", ["snip", "grasp", "taylor"])
def test_scores_of_a_quadratic(kind: Any) -> None:
    """The batches come once, from a generator."""
    traces = []

    def counted(*args: Any) -> jax.Array:
        traces.append(None)
        return loss(*args)

    batches = (as_f32(batch) for batch in BATCHES)
    found = prune.saliency(kind, counted, PARAMS, batches)
    assert found["layer"]["w"].dtype == jnp.float32
    np.testing.assert_allclose(found["layer"]["w"], expected(kind), rtol=2e-5)
    assert found["count"] is None
    assert len(traces) == (2 if kind == "grasp" else 1)


def test_signs_cancel_between_batches_for_snip_and_not_for_taylor() -> None:
    product = lambda p, x: (x * p["w"]).sum()
    batches = [jnp.array([1.0, 1.0]), jnp.array([-1.0, 1.0])]
    params = {"w": jnp.array([2.0, 1.0])}
    assert prune.saliency("snip", product, params, batches)["w"].tolist() == [0.0, 1.0]
    found = prune.saliency("taylor", product, params, batches)["w"]
    assert found.tolist() == [4.0, 1.0]


def test_weights_of_low_precision_are_scored_in_float32() -> None:
    params = {"w": jnp.array([[1.0, 2.0]], jnp.bfloat16)}
    square = lambda p, x: jnp.square(x * p["w"]).sum().astype(jnp.float32)
    batches = [jnp.full((1, 1), x, jnp.bfloat16) for x in (1.0, 2.0)]
    found = prune.saliency("grasp", square, params, batches)["w"]
    # Mean slope 5 w, mean curvature 5: w H g = 25 w^2.
    assert found.dtype == jnp.float32
    assert found.tolist() == [[25.0, 100.0]]


def test_the_weights_to_prune_are_those_of_lowest_score() -> None:
    found = prune.saliency("snip", loss, PARAMS, [as_f32(b) for b in BATCHES])
    scheme = jc.select({"**/w": prune.by_scores(found, sparsity=0.25)})
    _, state = jax.jit(scheme.init)(PARAMS)
    (mask,) = state[0].state.masks["layer/w"]
    order = np.argsort(expected("snip"), axis=None)
    np.testing.assert_array_equal(np.sort(order[:3]), np.flatnonzero(~np.asarray(mask)))


def test_saliency_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"kind must be .* got 'fisher'"):
        prune.saliency("fisher", loss, PARAMS, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches is empty"):
        prune.saliency("snip", loss, PARAMS, [])
