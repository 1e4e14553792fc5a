"""k-means of vectors against plain loops, and its guarantees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.cluster import KMeans

import jaxcompress as jc
from jaxcompress.codebook import cluster
from jaxcompress.codebook._lloyd import exact_sums, in_order, toward_means
from tests.lift.programs import mesh

KEY = jax.random.key(0)


def blobs(n: int = 600, centres: int = 8, spread: float = 0.05) -> np.ndarray:
    rng = np.random.default_rng(3)
    middle = rng.normal(size=(centres, 3))
    return (
        middle[rng.integers(centres, size=n)] + spread * rng.normal(size=(n, 3))
    ).astype(np.float32)


def test_codes_are_of_the_nearest_centroid_and_centroids_are_means() -> None:
    x = blobs().astype(np.float64)
    found = cluster(jnp.asarray(x, jnp.float32), entries=8, key=KEY, tolerance=0.0)
    entries = np.asarray(found.entries, np.float64)
    distance = ((x[:, None] - entries[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(found.codes, distance.argmin(1))
    np.testing.assert_allclose(found.error, distance.min(1), rtol=1e-4, atol=1e-6)
    for e in range(8):
        np.testing.assert_allclose(
            entries[e], x[distance.argmin(1) == e].mean(0), atol=1e-6
        )


def test_the_objective_is_that_of_scikit_learn() -> None:
    x = np.random.default_rng(0).normal(size=(1500, 2)).astype(np.float32)
    ours = min(
        float(cluster(jnp.asarray(x), entries=16, key=jax.random.key(i)).error.sum())
        for i in range(4)
    )
    theirs = KMeans(16, n_init=4, random_state=0).fit(x).inertia_
    assert ours <= 1.02 * theirs


def test_weights_count_as_repetitions_do() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(60, 2)).astype(np.float32)
    counts = rng.integers(1, 5, size=60)
    weights = jnp.asarray(np.repeat(counts[:, None], 2, 1), jnp.float32)
    table = jnp.asarray(x[:4])
    codes = rng.integers(0, 4, size=60)
    weighted, _ = toward_means(
        table, jnp.asarray(codes), jnp.asarray(x) - table[codes], weights
    )
    repeated = np.repeat(x, counts, 0).astype(np.float64)
    by = np.repeat(codes, counts)
    means = [repeated[by == e].mean(0) for e in range(4)]
    np.testing.assert_allclose(weighted, means, atol=1e-6)


def test_important_vectors_are_nearer_to_their_centroids() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(400, 2)), jnp.float32)
    weights = jnp.where(jnp.arange(400)[:, None] < 40, 100.0, 1.0) * jnp.ones((1, 2))
    plain = cluster(x, entries=8, key=KEY)
    weighted = cluster(x, entries=8, key=KEY, weights=weights)
    error = lambda c: jnp.square(x - c.entries[c.codes])[:40].sum()
    assert error(weighted) < 0.9 * error(plain)


def test_few_different_vectors_come_back_to_the_bit() -> None:
    rng = np.random.default_rng(2)
    different = rng.normal(size=(5, 3)).astype(np.float32)
    x = jnp.asarray(different[rng.integers(5, size=200)])
    found = cluster(x, entries=8, key=KEY)
    np.testing.assert_array_equal(found.entries[found.codes], x)
    rows = np.asarray(found.entries)
    np.testing.assert_array_equal(rows[5:], rows[4:5].repeat(3, 0))
    np.testing.assert_array_equal(rows[:5], rows[:5][np.lexsort(rows[:5].T[::-1])])


def test_a_sample_for_the_seeds_finds_what_all_vectors_do() -> None:
    x = jnp.asarray(blobs(2000, 4, 0.01))
    found = cluster(x, entries=4, key=KEY)
    assert float(found.error.mean()) < 1e-3


def test_a_centroid_without_vectors_moves_to_one_far_off() -> None:
    from jaxcompress.codebook._lloyd import Points, _moved

    x = jnp.array([[0.0], [0.1], [9.0], [9.1]])
    table = jnp.array([[0.0], [50.0]])
    moved = _moved(Points(x, None), table)
    assert float(moved[1, 0]) in (9.0, pytest.approx(9.1))


def test_sums_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(4)
    x = (
        rng.normal(size=(5000, 2)) * 10.0 ** rng.integers(-3, 3, size=(5000, 1))
    ).astype(np.float32)
    codes = rng.integers(0, 3, size=5000)
    order = rng.permutation(5000)
    a = exact_sums(jnp.asarray(x), jnp.asarray(codes), 3)
    b = exact_sums(jnp.asarray(x[order]), jnp.asarray(codes[order]), 3)
    np.testing.assert_array_equal(a, b)
    plain = [x[codes == e].astype(np.float64).sum(0) for e in range(3)]
    np.testing.assert_allclose(a, plain, rtol=1e-5, atol=1e-3)


def test_eight_devices_find_the_same_bits() -> None:
    x = jnp.asarray(blobs(640))
    placed = jax.device_put(x, NamedSharding(mesh(), P("d")))
    found = jax.jit(lambda x: cluster(x, entries=8, key=KEY))(placed)
    for a, b in zip(found, cluster(x, entries=8, key=KEY), strict=True):
        np.testing.assert_array_equal(a, b)


def test_order_keeps_codes_with_their_entries() -> None:
    table = jnp.array([[3.0], [1.0], [7.0], [2.0]])
    codes = jnp.array([0, 3, 3, 1])
    entries, moved = in_order(table, codes)
    assert entries[:, 0].tolist() == [1.0, 2.0, 3.0, 3.0]
    np.testing.assert_array_equal(entries[moved], table[codes])


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"entries": 0}, "entries must be positive; got 0"),
        ({"x": jnp.zeros(3)}, "vectors, dimensions"),
        ({"x": jnp.zeros((3, 2), jnp.int32)}, "must be floats"),
        ({"weights": jnp.ones((3, 1))}, "weights must have the shape of x"),
    ],
)
def test_errors_name_the_rule(change: dict, rule: str) -> None:
    given = {"x": jnp.zeros((3, 2)), "entries": 2, "key": KEY} | change
    with pytest.raises(ValueError, match=rule):
        jc.codebook.cluster(given.pop("x"), **given)
