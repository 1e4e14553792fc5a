"""`lowest` against a stable sort, on one device and on eight."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcompress.prune import lowest, rank

SHAPES = ((4, 5), (3,), (2, 2, 3))
TOTAL = sum(int(np.prod(s)) for s in SHAPES)
EXTREMES = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)


def oracle(ranks: list[np.ndarray], count: int) -> list[np.ndarray]:
    """The first `count` of a stable sort, ties in order of array and position."""
    flat = np.concatenate([r.ravel() for r in ranks])
    marked = np.zeros(flat.size, bool)
    marked[np.argsort(flat, kind="stable")[:count]] = True
    parts = np.split(marked, np.cumsum([r.size for r in ranks])[:-1])
    return [m.reshape(r.shape) for m, r in zip(parts, ranks, strict=True)]


together = jax.jit(lowest)
by_layer = jax.jit(lambda r, count: lowest([r], count, stack=1)[0])


@hypothesis.given(
    pool=st.sampled_from([EXTREMES, EXTREMES[:2], np.arange(2**20, dtype=np.uint32)]),
    count=st.sampled_from([0, 1, 7, TOTAL // 2, TOTAL - 1, TOTAL]),
    seed=st.integers(0, 99),
)
def test_several_arrays_taken_together(pool: np.ndarray, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = [rng.choice(pool, shape) for shape in SHAPES]
    marked = together([jnp.asarray(r) for r in ranks], jnp.int32(count))
    for found, expected in zip(marked, oracle(ranks, count), strict=True):
        np.testing.assert_array_equal(found, expected)


@hypothesis.given(
    counts=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_a_stack_is_ranked_entry_by_entry(counts: list[int], seed: int) -> None:
    ranks = np.random.default_rng(seed).choice(EXTREMES, (3, 4, 3))
    marked = by_layer(jnp.asarray(ranks), jnp.array(counts, jnp.int32))
    expected = [oracle([r], n)[0] for r, n in zip(ranks, counts, strict=True)]
    np.testing.assert_array_equal(marked, expected)


def test_one_count_serves_every_entry_of_a_stack() -> None:
    ranks = np.random.default_rng(0).choice(EXTREMES, (3, 4, 3))
    marked = by_layer(jnp.asarray(ranks), jnp.int32(5))
    np.testing.assert_array_equal(marked, [oracle([r], 5)[0] for r in ranks])


def test_ranks_are_in_the_order_of_scores() -> None:
    scores = np.float32([-np.inf, -6e4, -1e-3, -1e-38, 0.0, 1e-38, 0.5, 6e4, np.inf])
    ranks = np.asarray(rank(jnp.asarray(scores))).astype(np.int64)
    assert (np.diff(ranks) > 0).all()
    assert int(rank(jnp.float32(-0.0))) == int(rank(jnp.float32(0.0)))


SPECS = [P("a", None), P(None, "b"), P("a", "b"), P(("a", "b"), None)]


def sharded(spec: P) -> jax.Array:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    w = np.random.default_rng(0).integers(-9, 10, (16, 32)).astype(np.float32)
    return jax.device_put(w, NamedSharding(mesh, spec))


def halve(w: jax.Array) -> jax.Array:
    return lowest([rank(jnp.abs(w))], jnp.int32(w.size // 2))[0]


def gathered(fn: Callable[..., Any], w: jax.Array) -> list[tuple[str, int]]:
    """Type and size of every result of an all-gather in the compiled program."""
    text = jax.jit(fn).lower(w).compile().as_text()
    found = re.findall(r"(\w+)\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    return [(t, int(np.prod([int(n) for n in s.split(",")]))) for t, s in found]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sharding_changes_nothing(spec: P) -> None:
    w = sharded(spec)
    expected = oracle([np.abs(np.asarray(w))], w.size // 2)[0]
    marked = jax.jit(halve)(w)
    assert len(w.sharding.device_set) == 8
    np.testing.assert_array_equal(marked, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_nothing_of_the_size_of_the_weights_is_gathered(spec: P) -> None:
    w = sharded(spec)
    assert max((size for _, size in gathered(halve, w)), default=0) < w.size


def test_a_sort_would_gather_the_weights() -> None:
    w = sharded(P("a", "b"))
    assert ("f32", w.size) in gathered(lambda w: jnp.sort(w, axis=None), w)
