"""SparseGPT against Algorithm 1 in float64, OBS against its paper, and refining."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.lift import Statistics, statistics
from jaxcompress.prune import (
    BitmaskArray,
    BlockSparseArray,
    NMArray,
    blocks,
    nm,
    obs_weight,
    sparsegpt_weight,
    wanda_weight,
)
from tests.jitted import run

K, R = 22, 4
DAMPING = 0.01


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs, some of them large, and a weight."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 8)) @ rng.normal(size=(8, K)) + rng.normal(size=(96, K))
    x[:, ::7] *= 4
    return x.astype(np.float32), rng.normal(size=(K, R)).astype(np.float32)


def seen(x: jax.Array) -> Statistics:
    return statistics(x, gram=True)


def second_moment(x: np.ndarray) -> np.ndarray:
    h = np.float64(x).T @ x / len(x)
    return h + DAMPING * np.diagonal(h).mean() * np.eye(len(h))


def loss(value: Any) -> np.ndarray:
    """Damped error of each output."""
    x, w = problem()
    e = np.float64(w) - np.asarray(value)
    return np.einsum("ko,kl,lo->o", e, second_moment(x), e)


def algorithm_1(block: int, *, count: Any = None, group: Any = None) -> np.ndarray:
    """Frantar & Alistarh, 2023, Algorithm 1: B = Bs = block, or Bs = m of N:M."""
    x, w = problem()
    upper = np.linalg.cholesky(np.linalg.inv(second_moment(x))).T
    w, pruned = w.astype(np.float64), np.zeros(w.shape, bool)
    for j in range(K):
        if group is None and j % block == 0:
            cut = slice(j, min(j + block, K))
            cost = (w[cut] / np.diagonal(upper)[cut, None]) ** 2
            order = np.argsort(cost, axis=None)[: count(cost.size)]
            pruned[cut] = np.isin(np.arange(cost.size), order).reshape(cost.shape)
        if group is not None and j % group[1] == 0:
            cut = slice(j, min(j + group[1], K))
            cost = (w[cut] / np.diagonal(upper)[cut, None]) ** 2
            for o in range(R):
                worst = np.argsort(cost[:, o])[: max(len(cost) - group[0], 0)]
                pruned[j + worst, o] = True
        error = np.where(pruned[j], w[j], 0) / upper[j, j]
        w[j:] -= upper[j, j:, None] * error
        w[j] = np.where(pruned[j], 0, w[j])
    return w


HALF = lambda n: int(np.floor(0.45 * n + 0.5))


@functools.cache
def pruned(sparsity: Any, refine: int, block: int = 6) -> Any:
    """The leaf, and what it holds."""
    x, w = problem()

    def solve(w: jax.Array, x: jax.Array) -> Any:
        leaf = sparsegpt_weight(w, sparsity, seen(x), block=block, refine=refine)
        return leaf, leaf.materialize()

    return run(solve, w, x)


PAIRS = nm(2, 4)


def test_the_paper() -> None:
    leaf, found = pruned(0.45, 0)
    assert isinstance(leaf, BitmaskArray)
    expected = algorithm_1(6, count=HALF)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert leaf.elements.size == K * R - (3 * HALF(6 * R) + HALF(4 * R))


def test_the_paper_with_groups() -> None:
    leaf, found = pruned(PAIRS, 0)
    assert isinstance(leaf, NMArray)
    expected = algorithm_1(6, group=(2, 4))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_refining_reaches_least_squares() -> None:
    x, w = problem()
    h = second_moment(x)
    (_, first), (_, last) = pruned(0.45, 0), pruned(0.45, 60)
    kept = np.asarray(first) != 0
    np.testing.assert_array_equal(np.asarray(last) != 0, kept)
    best = np.zeros_like(h[:, :R])
    for o in range(R):
        k = kept[:, o]
        best[k, o] = np.linalg.solve(h[np.ix_(k, k)], h[k] @ np.float64(w[:, o]))
    np.testing.assert_allclose(last, best, rtol=1e-3, atol=1e-3)
    assert (loss(last) <= loss(first) * (1 + 1e-5)).all()
    assert loss(last).sum() < 0.9 * loss(first).sum()


def test_better_on_outputs_worse_on_weights() -> None:
    x, w = problem()
    _, found = pruned(0.45, 0)
    plain = run(lambda w, x: wanda_weight(w, 0.45, seen(x)).materialize(), w, x)
    assert loss(found).sum() < 0.7 * loss(plain).sum()
    assert (
        np.square(w - np.asarray(found)).sum() > np.square(w - np.asarray(plain)).sum()
    )


def test_other_patterns_are_laid_over_first() -> None:
    x, w = problem()
    pattern = blocks(sparsity=0.5, shape=(2, 3), scope="row")
    leaf, dense = pruned(pattern, 60)
    assert isinstance(leaf, BlockSparseArray)
    inverse = np.linalg.inv(second_moment(x))
    cost = np.float64(w) ** 2 / np.diagonal(inverse)[:, None]
    dense = np.asarray(dense)
    for r in range(R // 2):
        sums = [cost[c : c + 3, 2 * r : 2 * r + 2].sum() for c in range(0, K, 3)]
        for place, c in enumerate(np.argsort(sums)):
            cut = dense[3 * c : 3 * c + 3, 2 * r : 2 * r + 2]
            assert (cut != 0).all() == (place >= 4)
            assert (cut == 0).all() == (place < 4)


def obs(column: np.ndarray, count: int, group: tuple[int, int]) -> np.ndarray:
    """Hassibi & Stork, 1992, eq. 5, with the inverse of what is left each time."""
    x, _ = problem()
    h, w, left = second_moment(x), column.astype(np.float64), list(range(K))
    for _ in range(count):
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        cost = w[left] ** 2 / (2 * np.diagonal(inverse))
        for n, k in enumerate(left):
            if sum(i // group[1] == k // group[1] for i in left) <= group[0]:
                cost[n] = np.inf
        q = int(np.argmin(cost))
        w[left] -= w[left[q]] / inverse[q, q] * inverse[:, q]
        w[left[q]] = 0
        del left[q]
    return w


@pytest.mark.parametrize(
    ("sparsity", "count", "group"), [(0.5, 11, (0, K)), (PAIRS, 10, (2, 4))]
)
def test_obs(sparsity: Any, count: int, group: tuple[int, int]) -> None:
    x, w = problem()
    found = run(lambda w, x: obs_weight(w, sparsity, seen(x)).materialize(), w, x)
    expected = np.stack([obs(w[:, o], count, group) for o in range(R)], 1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    if sparsity is PAIRS:
        assert loss(found).sum() < loss(pruned(PAIRS, 60)[1]).sum()


def test_inputs_that_are_always_zero_go_first() -> None:
    x, w = problem()
    silent = x * (np.arange(K) % 3 > 0)
    solve = lambda w, x: sparsegpt_weight(w, 0.36, seen(x)).materialize()
    found = np.asarray(run(solve, w, silent))
    assert (found[::3] == 0).all()
    assert (found == 0).sum() == round(0.36 * K * R)


def test_without_data_it_is_magnitude() -> None:
    _, w = problem()
    found = run(lambda w: sparsegpt_weight(w, 0.5, None).materialize(), w)
    limit = np.sort(np.abs(w), axis=None)[K * R // 2]
    np.testing.assert_array_equal(found, np.where(np.abs(w) >= limit, w, 0))


def model(p: Any, x: jax.Array) -> jax.Array:
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(step, x, p["layers"])[0] @ p["out"]


def test_the_sweep(tmp_path: Any) -> None:
    x, w = problem()
    x = x / 4
    layers = np.random.default_rng(3).normal(size=(2, K, K)).astype(np.float32) / 4
    params = {"layers": jnp.asarray(layers), "out": jnp.asarray(w)}
    rules = {"layers": 0.5, "out": PAIRS}
    lines: list[Any] = []
    options = {"rules": rules, "on_layer": lines.append, "work_dir": tmp_path}
    found = jc.prune.sparsegpt(model, params, [jnp.asarray(x)], **options)
    assert isinstance(found["layers"], BitmaskArray)
    assert isinstance(found["out"], NMArray)
    assert all(line.error < line.error_before for line in lines)
    jc.prune.sparsegpt(model, params, [jnp.asarray(x)], **options)
    assert [line.resumed for line in lines] == [False] * 3 + [True] * 3
    other = {**options, "work_dir": None, "reference": True}
    towards = jc.prune.sparsegpt(model, params, [jnp.asarray(x)], **other)

    def alone(w: jax.Array, x: jax.Array) -> jax.Array:
        return sparsegpt_weight(w, 0.5, seen(x)).materialize()

    first, dense = run(
        lambda w, x, both: (alone(w, x), jc.materialize(both)),
        layers[0],
        x,
        (found, towards),
    )
    np.testing.assert_allclose(dense[0]["layers"][0], first, atol=1e-6)

    def output(p: Any) -> np.ndarray:
        a = np.float64(x)
        for layer in p["layers"]:
            a = np.tanh(a @ np.asarray(layer))
        return a @ np.asarray(p["out"])

    off = [np.square(output(p) - output(params)).sum() for p in dense]
    assert off[1] < off[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must not be negative; got -1.0"),
        ({"block": 0}, "block must be positive; got 0"),
        ({"refine": -1}, "refine must not be negative; got -1"),
        ({"stats": jax.eval_shape(statistics, jnp.ones((2, K)))}, "have no gram"),
        ({"sparsity": 1.0}, r"in \[0, 1\); got 1.0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    _, w = problem()
    given = {"sparsity": 0.5, "stats": None} | options
    with pytest.raises(ValueError, match=message):
        sparsegpt_weight(jnp.asarray(w), **given)


def test_obs_refuses_other_patterns() -> None:
    pattern = blocks(sparsity=0.5, scope="row")
    with pytest.raises(ValueError, match=r"prune.nm\(n, m\); got blocks"):
        obs_weight(jnp.ones((4, 4)), pattern, None)  # pyright: ignore[reportArgumentType]
