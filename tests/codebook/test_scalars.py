"""k-means of scalars: the optimum by dynamic programming, and Lloyd's algorithm."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jaxcompress.codebook import _optimal, optimal_entries
from jaxcompress.codebook._scalars import INITS, cluster_scalars, nearest


def error(x: np.ndarray, entries: np.ndarray) -> float:
    """Squared distances to the nearest entry."""
    x, entries = x.astype(np.float64).ravel(), entries.astype(np.float64)
    return float((np.abs(x[:, None] - entries[None]).min(1) ** 2).sum())


def least_error(x: np.ndarray, clusters: int) -> float:
    """Of all ways to cut the sorted values in runs."""
    x = np.sort(x.astype(np.float64))
    best = np.inf
    for cuts in itertools.combinations(range(1, len(x)), clusters - 1):
        bounds = [0, *cuts, len(x)]
        runs = [x[i:j] for i, j in itertools.pairwise(bounds)]
        best = min(best, sum(((r - r.mean()) ** 2).sum() for r in runs))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_no_clusters_are_better_than_the_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 12))
    k = int(rng.integers(1, min(n, 6) + 1))
    x = rng.normal(size=n) * 10.0 ** rng.integers(-3, 4)
    if seed % 3 == 0:
        x = np.round(x, 1)
    best = least_error(x, min(k, len(np.unique(x))))
    slack = 1e-12 * float(np.abs(x).max()) ** 2
    assert error(x, optimal_entries(x, k)) <= best * (1 + 1e-6) + slack


def test_optimal_beats_scikit_learn_on_what_misleads_it() -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(c, 0.01, 40) for c in (0, 1, 1.1, 5, 5.05, 9)])
    means: Any = KMeans
    theirs = means(6, n_init=1, random_state=0, init="random").fit(x[:, None])
    ours = error(x, optimal_entries(x, 6))
    assert ours < 0.9 * theirs.inertia_
    many = means(6, n_init=20, random_state=0).fit(x[:, None]).inertia_
    assert ours <= many * (1 + 1e-6)


def test_more_values_than_are_tried_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(2).normal(size=2000)
    exact = error(x, optimal_entries(x, 8))
    monkeypatch.setattr(_optimal, "EXACT", 256)
    grouped = error(x, optimal_entries(x, 8))
    assert exact <= grouped <= 1.02 * exact


def test_few_distinct_values_are_their_own_entries() -> None:
    x = np.array([2.0, -1.0, 2.0, 7.0], np.float32)
    assert optimal_entries(x, 5).tolist() == [-1.0, 2.0, 7.0, 7.0, 7.0]
    assert optimal_entries(np.zeros(0), 2).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="1 values that are not"):
        optimal_entries(np.array([np.inf]), 2)


def lloyd(x: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm in loops."""
    entries = start.astype(np.float64)
    for _ in range(500):
        codes = np.abs(x[:, None] - entries[None]).argmin(1)
        new = [x[codes == i].mean() if (codes == i).any() else e
               for i, e in enumerate(entries)]  # fmt: skip
        if np.allclose(new, entries, rtol=0, atol=0):
            break
        entries = np.array(new)
    return entries


def find(x: np.ndarray, init: str, entries: int = 8, seed: int = 0) -> np.ndarray:
    return np.asarray(_find(jnp.asarray(x), init, entries, seed))


_find = jax.jit(
    lambda x, init, entries, seed: cluster_scalars(
        x, entries=entries, init=init, iterations=300, key=jax.random.key(seed)
    ),
    static_argnums=(1, 2),
)


def test_linear_and_density_end_where_plain_lloyd_does() -> None:
    x = np.random.default_rng(3).normal(size=5000).astype(np.float32)
    ends = np.linspace(x.min(), x.max(), 8)
    np.testing.assert_allclose(find(x, "linear"), lloyd(x, ends), atol=2e-3)
    quantiles = np.quantile(x, (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(find(x, "density"), lloyd(x, quantiles), atol=2e-3)


@pytest.mark.parametrize("init", INITS)
def test_each_start_comes_close_to_the_optimum_and_none_below(init: str) -> None:
    x = np.random.default_rng(4).normal(size=5000).astype(np.float32)
    least = error(x, optimal_entries(x, 8))
    found = error(x, find(x, init))
    assert least * (1 - 1e-5) <= found <= (1.0001 if init == "optimal" else 1.1) * least


def test_zeros_take_no_part() -> None:
    x = np.random.default_rng(5).normal(size=3000).astype(np.float32)
    with_zeros = np.concatenate([x, np.zeros(10_000, np.float32)])
    np.testing.assert_allclose(find(with_zeros, "density"), find(x, "density"))
    assert not find(np.zeros(30, np.float32), "linear").any()


def test_an_entry_without_values_moves_to_the_farthest() -> None:
    x = np.concatenate([np.linspace(1, 2, 50), [100.0]]).astype(np.float32)
    found = find(x, "linear", entries=4)
    assert len(np.unique(found)) == 4
    assert error(x, found) < 0.5


def test_up_to_e_distinct_values_are_kept_to_the_bit() -> None:
    values = np.array([0.1, 0.2, 0.30000001, 77.7, -3.3e-5], np.float32)
    x = np.random.default_rng(6).choice(values, 400)
    assert find(x, "linear").tolist()[:5] == sorted(values.tolist())
    with_zero = np.append(x, np.float32(0))
    assert find(with_zero, "linear").tolist()[:6] == sorted([0.0, *values.tolist()])
    assert find(with_zero, "linear", entries=5).tolist() == sorted(values.tolist())


def test_sums_of_many_values_are_exact() -> None:
    """More than a block, all in one cluster, far from zero."""
    x = (1000 + np.random.default_rng(7).uniform(size=20_000)).astype(np.float32)
    mean = x.astype(np.float64).mean()
    np.testing.assert_allclose(find(x, "density", entries=1), mean, rtol=3e-7)


def test_nearest_of_two_the_lower_of_equals_the_first() -> None:
    entries = jnp.array([3.0, 1.0, 3.0, 5.0])
    w = jnp.array([2.0, 3.0, 4.0, 9.0, -1.0])
    assert nearest(w, entries).tolist() == [1, 0, 0, 3, 1]
