"""Rotations: the transform, what they do to outliers, and to statistics."""

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

KEY = jax.random.key(7)


def sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def twice(x: jax.Array, block: int) -> jax.Array:
    return q.hadamard(q.hadamard(x, block), block)


@pytest.mark.parametrize(("k", "block"), [(16, 16), (12, 4), (5, 1)])
def test_the_transform_is_its_matrix_and_its_own_inverse(k: int, block: int) -> None:
    x = draw(0, 3, k)
    found, back = run(lambda x: (q.hadamard(x, block), twice(x, block)), x)
    matrix = np.kron(np.eye(k // block), sylvester(block))
    np.testing.assert_allclose(found, np.float64(x) @ matrix, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [0, 3, 8])
def test_a_block_must_be_a_power_of_two_that_divides(block: int) -> None:
    with pytest.raises(ValueError, match="power of two that divides"):
        q.hadamard(draw(0, 12), block)


def outliers() -> jax.Array:
    """Normal weights, 64 x 32, of which one in a hundred is twenty times as large."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(64, 32))
    w[rng.uniform(size=w.shape) < 0.01] *= 20
    return jnp.asarray(w, jnp.float32)


def test_rotation_beats_rounding_where_weights_have_outliers() -> None:
    w = outliers()

    def both(w: jax.Array) -> Any:
        leaf = q.rotated_weight(w, q.int4(), None, key=KEY)
        return leaf, jc.materialize(leaf), q.quantize(w, q.int4()).materialize()

    leaf, rotated, plain = run(both, w)
    assert leaf.block == 64
    error, before = (float(jnp.square(a - w).sum()) for a in (rotated, plain))
    assert error < before / 2


def test_the_base_sees_the_rotated_weight_and_statistics() -> None:
    """Those of the rotated rows themselves, but for absmax, which is a bound."""
    w, x = draw(1, 2, 12, 3), draw(2, 2, 50, 12)
    seen = {}

    def base(w: jax.Array, fmt: q.NumberFormat, stats: Any, **options: Any) -> Any:
        seen.update(w=w, stats=stats)
        return q.quantize(w, fmt, **options)

    def fn(w: jax.Array, x: jax.Array) -> Any:
        leaf = q.rotated_weight(
            w, q.int8(), statistics(x, gram=True), key=KEY, axes=-2, base=base
        )
        return leaf.signs, dict(seen)

    signs, found = run(fn, w, x)
    signs, w = np.float64(signs), np.float64(w)
    h = np.kron(np.eye(3), sylvester(4))
    turned = (np.float64(x) * signs) @ h
    stats = found["stats"]
    np.testing.assert_allclose(
        found["w"],
        np.einsum("kj,ejo->eko", h, np.moveaxis(signs, 1, -1) * w),
        atol=1e-5,
    )
    gram = np.einsum("erk,erl->ekl", turned, turned)
    np.testing.assert_allclose(stats.gram, gram, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(stats.total, turned.sum(1), rtol=1e-4, atol=1e-3)
    squares = np.square(turned).sum(1)
    np.testing.assert_allclose(stats.total_square, squares, rtol=1e-4)
    assert (np.asarray(stats.absmax) >= np.abs(turned).max(1)).all()
    assert set(np.unique(signs)) == {-1, 1}


def test_without_a_gram_squares_are_their_mean_over_signs() -> None:
    def fn(w: jax.Array, x: jax.Array) -> Any:
        seen = []

        def base(w: jax.Array, fmt: q.NumberFormat, stats: Any, **options: Any) -> Any:
            seen.append(stats.total_square)
            return q.quantize(w, fmt, **options)

        q.rotated_weight(w, q.int8(), statistics(x), key=KEY, base=base)
        return seen[0]

    x = draw(3, 40, 4)
    mean = np.square(np.float64(x)).sum(0).mean()
    np.testing.assert_allclose(run(fn, draw(4, 4, 2), x), np.full(4, mean), rtol=1e-5)


def test_the_key_decides_the_signs_and_a_block_can_be_chosen() -> None:
    w = draw(5, 16, 2)

    def fn(w: jax.Array) -> Any:
        make = lambda key: q.rotated_weight(w, q.int8(), None, key=key, block=4)
        a, b, c = make(KEY), make(KEY), make(jax.random.key(8))
        return a, b.signs, c.signs, jc.materialize(a)

    a, again, other, dense = run(fn, w)
    assert a.block == 4
    np.testing.assert_array_equal(a.signs, again)
    assert (a.signs != other).any()
    np.testing.assert_allclose(dense, w, atol=0.1)


def test_an_odd_number_of_inputs_gets_signs_alone() -> None:
    def fn(w: jax.Array) -> Any:
        leaf = q.rotated_weight(w, q.int8(), None, key=KEY)
        return leaf, jc.materialize([leaf, q.quantize(w, q.int8())])

    leaf, (turned, plain) = run(fn, draw(6, 5, 2))
    assert leaf.block == 1
    np.testing.assert_array_equal(turned, plain)


def test_static_activations_are_refused() -> None:
    fmt = q.int8(activations=q.static(q.Integer(bits=8)))
    with pytest.raises(ValueError, match="use dynamic activations"):
        q.rotated_weight(draw(0, 4, 2), fmt, None, key=KEY)
