"""Wanda against loops, and through the sweep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.lift import statistics
from jaxcompress.prune import BitmaskArray, NMArray, nm, scores, wanda_weight
from tests.jitted import run

K, R = 12, 5


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, some of them large, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, K)).astype(np.float32)
    x[:, ::5] *= 6
    return x, rng.normal(size=(K, R)).astype(np.float32)


def pruned(w: np.ndarray, sparsity: Any, x: Any, **options: Any) -> Any:
    """The leaf, and what it holds."""

    def solve(w: jax.Array, x: Any) -> Any:
        stats = None if x is None else statistics(x)
        leaf = wanda_weight(w, sparsity, stats, **options)
        return leaf, leaf.materialize()

    return run(solve, w, x)


def expected(x: np.ndarray, w: np.ndarray, count: int) -> np.ndarray:
    """Sun et al., 2023, eq. 1: in each output the `count` lowest go."""
    out = w.copy()
    for o in range(w.shape[1]):
        metric = [
            abs(float(w[i, o])) * np.linalg.norm(np.float64(x[:, i])) for i in range(K)
        ]
        for i in np.argsort(metric)[:count]:
            out[i, o] = 0
    return out


def test_the_paper() -> None:
    x, w = problem()
    leaf, found = pruned(w, 0.4, x)
    assert isinstance(leaf, BitmaskArray)
    np.testing.assert_array_equal(found, expected(x, w, 5))
    assert leaf.elements.shape == (R * 7,)


def test_inputs_matter() -> None:
    x, w = problem()
    _, blind = pruned(w, 0.4, None)
    np.testing.assert_array_equal(blind, expected(np.ones_like(x), w, 5))
    lost = lambda q: np.linalg.norm(x @ (w - np.asarray(q)))
    assert lost(expected(x, w, 5)) < 0.7 * lost(blind)


def test_patterns_compare_their_groups() -> None:
    x, w = problem()
    leaf, found = pruned(w, nm(2, 4), x)
    assert isinstance(leaf, NMArray)
    metric = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    kept = np.zeros(w.shape, bool)
    for start, o in np.ndindex(K // 4, R):
        group = slice(4 * start, 4 * start + 4)
        best = np.argsort(metric[group, o])[2:]
        kept[4 * start + best, o] = True
    np.testing.assert_array_equal(found, np.where(kept, w, 0))


def test_stack_entries_without_rows_go_by_magnitude() -> None:
    x, w = problem()

    def solve(w: jax.Array, x: jax.Array) -> jax.Array:
        both = jax.tree.map(lambda a: jnp.stack([a, jnp.zeros_like(a)]), statistics(x))
        stack = jnp.stack([w, w])
        return wanda_weight(stack, 0.4, both, axes=-2).materialize()

    found = run(solve, w, x)
    np.testing.assert_array_equal(found[0], expected(x, w, 5))
    np.testing.assert_array_equal(found[1], expected(np.ones_like(x), w, 5))


def model(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["a"]) @ p["b"]


def test_the_sweep_sees_pruned_inputs() -> None:
    x, w = problem()
    b = np.random.default_rng(1).normal(size=(R, K)).astype(np.float32)
    params = {"a": jnp.asarray(w), "b": jnp.asarray(b)}
    rules = {"a": 0.4, "b": nm(1, 2)}
    found = jc.prune.wanda(model, params, [jnp.asarray(x)], rules=rules)
    dense = run(jc.materialize, found)
    np.testing.assert_array_equal(dense["a"], expected(x, w, 5))
    _, alone = pruned(b, nm(1, 2), np.tanh(x @ np.asarray(dense["a"])))
    np.testing.assert_array_equal(dense["b"], alone)


def test_another_score() -> None:
    x, w = problem()

    def magnitude(w: jax.Array, second_moment: jax.Array, *, axes: Any) -> jax.Array:
        assert second_moment.shape == (K,)
        return scores.magnitude(w)

    _, found = pruned(w, 0.4, x, score=magnitude)
    np.testing.assert_array_equal(found, expected(np.ones_like(x), w, 5))


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, r"prune.wanda: sparsity .* \[0, 1\); got 1.0"),
        (jc.schedules.linear(0.0, 0.5, begin=0, end=2), "has no steps; got a schedule"),
        (
            jc.prune.blocks(sparsity=jc.schedules.linear(0.0, 0.5, begin=0, end=2)),
            "has no steps; got blocks",
        ),
    ],
)
def test_what_is_refused(sparsity: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanda_weight(jnp.ones((4, 4)), sparsity, None)
