"""Budgets of the HashedNets' table, and the front of all families."""

import jax
import numpy as np
import pytest

import jaxcompress as jc
from experiments.hashing import mnist_run
from experiments.pareto import stories_run


@pytest.mark.parametrize("method", mnist_run.METHODS)
def test_every_net_has_the_same_budget(method: str) -> None:
    layers, scheme = mnist_run.compressed(method, 3, 64, 0)
    scheme = scheme or jc.identity()
    packed = jax.jit(lambda p: scheme.compress(*scheme.init(p)))(layers)
    # Whole units, and whole ranks below the budget.
    close = {"dense": 0.06, "low rank": 0.1}.get(method, 1e-3)
    assert mnist_run.weights_of(packed) == pytest.approx(
        mnist_run.budget(3, 64), rel=close
    )


def test_no_point_beats_one_of_the_front() -> None:
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in rng.random((50, 2)).round(1)]
    front = stories_run.front(points)
    beats = lambda a, b: a[0] <= b[0] and a[1] <= b[1] and a != b
    assert set(front) == {p for p in points if not any(beats(q, p) for q in points)}
    assert len(front) == len(set(front))
