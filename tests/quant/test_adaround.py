"""AdaRound: neighbours on the grid, chosen for the outputs."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import quant as q
from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics, statistics
from jaxcompress.quant._adaround import adaround_weight
from tests.quant.wrapping import materialize, quantize

K, R = 8, 5
UNSIGNED = q.int2(group_size=4, symmetric=False)
TABLE = q.table((-1.0, -0.3, 0.0, 0.4, 1.0))
SHORT: dict[str, Any] = {"iterations": 400, "candidates": 1}


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 2)) @ rng.normal(size=(2, K)) + rng.normal(size=(64, K))
    return x.astype(np.float32), rng.normal(size=(K, R)).astype(np.float32)


moments = jax.jit(functools.partial(statistics, gram=True))
learned = jax.jit(
    functools.partial(adaround_weight, **SHORT),
    static_argnames=("fmt", "axes", "regularization"),
)


def seen(x: np.ndarray) -> Statistics:
    return moments(jnp.asarray(x))


def dense(leaf: Any) -> np.ndarray:
    return np.asarray(materialize(leaf))


def losses(x: np.ndarray, w: np.ndarray, value: np.ndarray) -> np.ndarray:
    """``|X (w - q)|^2`` of each output."""
    return np.square(np.float64(x) @ (np.float64(w) - value)).sum(0)


def points(leaf: q.QuantizedArray, k: int, o: int) -> np.ndarray:
    """All values that weight k, o may take."""
    group = k // (K // leaf.scale.shape[-1])
    scale = float(leaf.scales()[o, group])
    if leaf.zero_point is None:
        return np.float32(TABLE.element.values) * np.float32(scale)
    return (np.arange(4) - float(leaf.zero_point[o, group])) * scale


@pytest.mark.parametrize(
    ("fmt", "regularization", "bound"),
    [(UNSIGNED, 0.02, 1.2), (TABLE, 0.2, 1.5)],
    ids=["integers", "table"],
)
def test_neighbours_nearly_as_good_as_the_best_of_all(
    fmt: q.NumberFormat, regularization: float, bound: float
) -> None:
    x, w = problem()
    leaf = learned(jnp.asarray(w), fmt, seen(x), regularization=regularization)
    value, rounded = dense(leaf), dense(quantize(jnp.asarray(w), fmt))
    assert (losses(x, w, value) <= losses(x, w, rounded) * (1 + 1e-4)).all()
    assert losses(x, w, value).sum() < 0.8 * losses(x, w, rounded).sum()
    best = 0.0
    for o in range(R):
        pairs = []
        for k in range(K):
            grid = points(leaf, k, o)
            i = np.clip(np.searchsorted(grid, w[k, o]) - 1, 0, len(grid) - 2)
            pairs.append(grid[i : i + 2])
            assert np.abs(pairs[-1] - value[k, o]).min() < 1e-5
        every = np.array(list(itertools.product(*pairs))).T  # [K, 2^K]
        best += np.square(np.float64(x) @ (w[:, o, None] - every)).sum(0).min()
    assert losses(x, w, value).sum() < bound * best


def test_a_jitted_stack_is_its_entries() -> None:
    (x, w), (y, v) = problem(), problem(1)
    stats = jax.tree.map(lambda a, b: jnp.stack([a, b]), seen(x), seen(0 * y))
    axes = Axes(contract=(-2,), stack=1)
    both = dense(learned(np.stack([w, v]), UNSIGNED, stats, axes=axes))
    # Outside jit, as the sweep calls it.
    one = adaround_weight(jnp.asarray(w), UNSIGNED, seen(x), **SHORT)
    np.testing.assert_allclose(both[0], dense(one), rtol=1e-5, atol=1e-6)
    rounded = dense(quantize(jnp.asarray(v), UNSIGNED))  # No data: rounding.
    np.testing.assert_allclose(both[1], rounded, rtol=1e-4, atol=1e-6)


def test_without_data_it_is_rounding_and_zeros_stay() -> None:
    x, w = problem()
    w = w.copy()
    w[:, 0] = 0
    rounded = dense(quantize(jnp.asarray(w), UNSIGNED))
    value = dense(learned(jnp.asarray(w), UNSIGNED, None))
    np.testing.assert_allclose(value, rounded, rtol=1e-4, atol=1e-6)
    x = x.copy()
    x[:, 3] = 0
    leaf = learned(jnp.asarray(w), UNSIGNED, seen(x))
    assert not dense(leaf)[:, 0].any()
    np.testing.assert_allclose(dense(leaf)[3], rounded[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be positive; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
        ({"regularization": -1.0}, "regularization must not be negative; got -1.0"),
        ({"stats": statistics(jnp.ones((2, K)))}, "'kernel' have no gram"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    x, w = problem()
    given = {"stats": seen(x), **options}
    stats = given.pop("stats")
    with pytest.raises(ValueError, match=message):
        adaround_weight(jnp.asarray(w), UNSIGNED, stats, path="kernel", **given)
