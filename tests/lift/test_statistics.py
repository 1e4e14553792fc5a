"""Histograms, ranges and averages, and that merging them is merging the rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.lift import Statistics, histogram_edges, statistics
from jaxcompress.lift._histogram import SAMPLE, sample_rows
from tests.lift.programs import mesh, normal


def wide(seed: int, *shape: int) -> np.ndarray:
    """Both signs, magnitudes from beyond the first bin to beyond the last, zeros."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-40, 28, shape)
    return np.where(rng.uniform(size=shape) < 0.1, 0.0, x).astype(np.float32)


def counted(x: np.ndarray) -> np.ndarray:
    """By NumPy; what lies beyond counts in the last bins."""
    edges = histogram_edges()
    inside = np.clip(x.ravel(), edges[0], np.nextafter(edges[-1], 0))
    # A bin holds its end nearer to zero: on the negative side, its upper one.
    up, down = inside[inside >= 0], -inside[inside < 0]
    side = edges[len(edges) // 2 :]
    found = [np.histogram(a, side)[0] for a in (down, up)]
    return np.concatenate([found[0][::-1], found[1]])


def assert_equal(a: Statistics, b: Statistics, rtol: float = 1e-6) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


seen = jax.jit(functools.partial(statistics, histogram=True))


def test_the_histogram_counts_every_entry_of_every_stack_entry() -> None:
    x = wide(0, 2, 40, 12)
    x[0, :7, 0] = [1.0, -1.0, 1.0625, -1.0625, 2.0**-32, 2.0**24, -0.0]
    stats = seen(jnp.asarray(x))
    for i in range(2):
        np.testing.assert_array_equal(stats.counts[i], counted(x[i]))
    np.testing.assert_array_equal(stats.low, x.min((1, 2)))
    np.testing.assert_array_equal(stats.high, x.max((1, 2)))
    np.testing.assert_array_equal(stats.absmax, np.abs(x).max(1))


def test_rows_left_out_count_nowhere() -> None:
    x = wide(1, 20, 6)
    kept = np.arange(20) % 3 > 0
    stats = seen(jnp.asarray(x), weights=jnp.asarray(kept, jnp.float32))
    np.testing.assert_array_equal(stats.counts, counted(x[kept]))
    np.testing.assert_allclose(stats.high, max(x[kept].max(), 0))


def test_of_many_rows_a_sample_of_every_phase() -> None:
    for rows, wanted in ((4096, 64), (1000, 999), (6, 4)):
        kept = sample_rows(rows, wanted)
        assert kept is not None
        assert len(set(kept.tolist())) == wanted
        assert rows // wanted < 3 or len(set((kept % 8).tolist())) == 8
        assert np.diff(np.sort(kept)).max() <= 3 * rows / wanted
    assert sample_rows(8, 8) is None
    x = jnp.ones((4, SAMPLE // 4 + 1, 1)) * jnp.arange(1.0, 5.0)[:, None, None]
    counts = np.asarray(seen(x).counts)
    assert counts.sum(-1).tolist() == [SAMPLE // 4] * 4
    assert (np.count_nonzero(counts, -1) == 1).all()


def with_averages(x: np.ndarray) -> Statistics:
    return seen(jnp.asarray(x)).start_averages()


def test_merging_is_associative_and_is_of_all_rows() -> None:
    parts = [normal(i, n, 5) for i, n in enumerate((3, 7, 2))]
    a, b, c = (with_averages(np.asarray(x)) for x in parts)
    assert_equal(a.merge(b).merge(c), a.merge(b.merge(c)), rtol=1e-5)
    assert_equal(a.merge(b), b.merge(a))
    whole = seen(jnp.concatenate(parts))
    merged = a.merge(b).merge(c)
    bare = dataclasses.replace(merged, average_low=None, average_high=None)
    assert_equal(bare, whole, rtol=1e-4)
    lows = np.array([float(s.low) for s in (a, b, c)])  # type: ignore[arg-type]
    np.testing.assert_allclose(
        merged.average_low, np.average(lows, weights=[3, 7, 2]), 1e-6
    )
    assert a.merge(dataclasses.replace(b, counts=None)).counts is None


def test_folding_a_stack_is_merging_its_entries() -> None:
    x = np.asarray(normal(3, 3, 4, 5))
    stacked = with_averages(x)
    one = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(3)]
    assert_equal(stacked.fold(), one[0].merge(one[1]).merge(one[2]), rtol=1e-5)


def test_an_average_passes_over_batches_without_rows() -> None:
    x = np.stack([wide(i, 4, 3) for i in range(2)])
    weights = jnp.asarray([[1.0] * 4, [0.0] * 4])
    first = statistics(jnp.asarray(x), weights=weights).start_averages()
    second = statistics(jnp.asarray(3 * x), weights=weights[::-1])
    found = first.follow(second, 0.9)
    # The first entry saw rows in the first batch alone, the second in the second.
    np.testing.assert_array_equal(
        found.average_high, [max(x[0].max(), 0), max(3 * x[1].max(), 0)]
    )


def conv(p: Any, x: jax.Array, strides: tuple[int, int], **options: Any) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        p["w"],
        strides,
        options.pop("padding", "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **options,
    )


@pytest.mark.parametrize(
    ("strides", "options"),
    [
        ((1, 1), {}),
        ((2, 1), {"rhs_dilation": (2, 1), "feature_group_count": 2}),
        ((1, 2), {"lhs_dilation": (2, 1), "padding": ((-1, 2), (0, 1))}),
    ],
)
def test_a_convolution_without_patches_agrees_with_its_patches(
    strides: tuple[int, int], options: dict[str, Any]
) -> None:
    groups = options.get("feature_group_count", 1)
    x, w = normal(0, 2, 6, 5, 4), normal(1, 3, 2, 4 // groups, 6)
    fn = lambda p, x: conv(p, x, strides, **dict(options))
    plain, patches = (
        jc.calibrate(fn, {"w": w}, [x], gram=gram, histogram=True)["w"]
        for gram in (False, True)
    )
    for name in ("count", "absmax", "total", "total_square"):
        np.testing.assert_allclose(
            getattr(plain, name), getattr(patches, name), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(plain.counts, counted(np.asarray(x)))
    assert float(plain.high) == float(x.max())  # type: ignore[arg-type]


def test_scanned_layers_and_sharded_batches() -> None:
    params = {"w": normal(0, 3, 8, 8)}
    fn = lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    x = normal(1, 16, 8)
    placed = jax.device_put(x, NamedSharding(mesh(), P("d")))
    one, many = (
        jc.calibrate(fn, params, [a, a], histogram=True)["w"] for a in (x, placed)
    )
    assert one.counts is not None
    assert one.counts.sum(-1).tolist() == [2 * 16 * 8] * 3
    np.testing.assert_array_equal(one.counts, many.counts)
    np.testing.assert_array_equal(one.counts[0], 2 * counted(np.asarray(x)))
    np.testing.assert_allclose(one.low, many.low, rtol=1e-6)
