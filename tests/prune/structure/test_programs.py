"""What is removed from random programs is what zeros in its place leave out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune
from tests.jitted import run
from tests.prune.structure.programs import BATCH, PARTS, TIME, Builder


def some_units(graph: prune.Graph, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """A third of the units of every exact group; others for every layer."""
    units = {}
    for group in graph.removable:
        if group.inexact is not None:
            continue
        gone = np.zeros((group.layers, group.size), bool)
        for row in gone:
            row[rng.permutation(group.size)[: max(1, group.size // 3)]] = True
        units[group.number] = gone if group.layers > 1 else gone[0]
    return units


def check(fn: Any, params: Any, x: jax.Array, seed: int) -> prune.Graph:
    graph = prune.dependency_graph(fn, params, x)
    units = some_units(graph, np.random.default_rng(seed))
    removal = prune.Removal.of(graph, units)
    smaller = removal.take(params)
    both = lambda small, masked, x: (removal.smaller(fn)(small, x), fn(masked, x))
    found, expected = run(both, smaller, removal.mask(params), x)
    scale = float(jnp.abs(expected).max())
    assert scale > 1e-3
    np.testing.assert_allclose(found, expected, atol=2e-5 * scale, rtol=0)
    left = sum(w.size for w in jax.tree.leaves(smaller))
    assert left < sum(w.size for w in jax.tree.leaves(params))
    assert left == prune.Cost(graph)(units).parameters
    return graph


@pytest.mark.parametrize("seed", range(20))
def test_removed_equals_masked(seed: int) -> None:
    fn, params = Builder(seed).program(parts=4)
    x = np.random.default_rng(seed).normal(size=(BATCH, TIME, 3))
    check(fn, params, jnp.asarray(x, jnp.float32), seed)


def test_the_random_programs_have_every_part() -> None:
    met = set()
    for seed in range(20):
        builder = Builder(seed)
        builder.program(parts=4)
        met.update(builder.names)
    assert met == set(PARTS)
