"""Outlier channels kept dense: which, how exactly, and what that is good for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.lift import statistics
from tests.quant.wrapping import draw, run

W8A8 = q.int8(activations=q.dynamic(q.Integer(bits=8)))


def activations(k: int, large: tuple[int, ...]) -> jax.Array:
    """Normal rows of which some channels are a hundred times as large."""
    x = np.random.default_rng(0).normal(size=(64, k)).clip(-3, 3)
    x[:, list(large)] *= 100
    return jnp.asarray(x, jnp.float32)


def test_outliers_are_exact_and_the_rest_is_quantized_without_them() -> None:
    w = draw(0, 16, 4).astype(jnp.bfloat16)
    x = activations(16, (3, 9))

    def fn(w: jax.Array, x: jax.Array) -> Any:
        leaf = q.split_outliers_weight(w, q.int4(), statistics(x), capacity=4)
        rest = w.at[jnp.array([3, 9])].set(0)
        plain = q.quantize(rest, q.int4())
        return leaf, jc.materialize(leaf), jc.materialize(plain)

    leaf, dense, plain = run(fn, w, x)
    assert sorted(np.ravel(leaf.index)) == [3, 9, 16, 16]
    assert dense.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dense[jnp.array([3, 9])], w[jnp.array([3, 9])])
    others = np.setdiff1d(np.arange(16), [3, 9])
    np.testing.assert_array_equal(dense[others], plain[others])
    assert (np.asarray(leaf.rows, np.float32)[:, 2:] == 0).all()
    assert leaf.traits == (True, False, True)  # A mask would not reach dense channels.


def test_channels_beyond_the_capacity_are_quantized_the_largest_are_kept() -> None:
    def fn(w: jax.Array, x: jax.Array) -> Any:
        keep = lambda **options: q.split_outliers_weight(
            w, q.int4(), statistics(x), **options
        )
        leaves = keep(capacity=0.25), keep(capacity=8, threshold=None), keep(capacity=8)
        return [leaf.index[0] for leaf in leaves]

    x = jnp.array([[7.0, 0, 9, 1, 8, 6, 5, 2]])
    largest, every, limited = (i.tolist() for i in run(fn, draw(1, 8, 2), x))
    assert largest == [2, 4]
    # A channel that was never active is no outlier, and 6 does not exceed 6.
    assert every == [2, 4, 0, 5, 6, 7, 3, 8]
    assert limited == [2, 4, 0, 8, 8, 8, 8, 8]


def test_it_beats_quantized_activations_with_outliers() -> None:
    w, x = draw(1, 32, 8), activations(32, (5,))

    def fn(w: jax.Array, x: jax.Array) -> Any:
        leaf = q.split_outliers_weight(w, W8A8, statistics(x), capacity=1)
        product = jc.lift(lambda w, x: x @ w)
        return product(leaf, x), product(q.quantize(w, W8A8), x)

    exact = np.float64(x) @ np.float64(w)
    error, before = (np.square(y - exact).sum() for y in run(fn, w, x))
    assert error < before / 10


def test_static_activations_are_scaled_without_the_outliers() -> None:
    fmt = q.int8(activations=q.static(q.Integer(bits=8)))
    build = lambda w, x: q.split_outliers_weight(w, fmt, statistics(x), capacity=1)
    leaf = run(build, draw(2, 3, 2), jnp.array([[1.0, 100.0, -2.0]]))
    np.testing.assert_allclose(leaf.inner.activation_scale, 2 / 127, rtol=1e-6)


def test_each_entry_of_a_stack_has_its_own_outliers() -> None:
    x = jnp.stack([activations(8, (2,)), activations(8, (6,)), jnp.zeros((64, 8))])
    stats = statistics(x, weights=jnp.ones((3, 64)).at[2].set(0))
    w = draw(3, 3, 8, 2)
    build = lambda w, s: q.split_outliers_weight(w, q.int4(), s, axes=-2, capacity=1)
    leaf = run(build, w, stats)
    assert np.ravel(leaf.index).tolist() == [2, 6, 8]
    assert leaf.index.shape == (3, 1, 1)


def test_without_statistics_everything_is_quantized() -> None:
    build = lambda w: q.split_outliers_weight(w, q.int4(), None)
    leaf = jax.eval_shape(build, draw(4, 8, 2))
    assert isinstance(leaf, q.QuantizedArray)


@pytest.mark.parametrize("capacity", [0, 9, 1.2])
def test_a_capacity_out_of_range_is_refused(capacity: float) -> None:
    with pytest.raises(ValueError, match="capacity must be from 1 to the 8 inputs"):
        q.split_outliers_weight(draw(4, 8, 2), q.int4(), None, capacity=capacity)
