"""One vector of buckets for several weights: who holds it, what is fitted, training."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import hashing as h
from tests.hashing.oracle import places
from tests.hashing.test_array import draw
from tests.jitted import run

KEY = jax.random.key(0)
AXES = {"layers": jc.Axes(contract=(-2,), stack=1)}


def weights() -> dict[str, jax.Array]:
    return {"a": draw(0, 12, 10), "b": draw(1, 6, 8), "layers": draw(2, 2, 8, 8)}


def scheme(**options: Any) -> jc.Transform:
    return jc.select({"*": h.shared(ratio=8.0, seed=3, **options)}, axes=AXES)


def parts(w: dict[str, jax.Array], count: int) -> Any:
    """Place and sign of every weight, layers after one another."""
    for path, value in w.items():
        stored = np.float64(value).swapaxes(-1, -2).reshape(-1, value.shape[-2])
        hashing = h.Hashing(seed=3 ^ zlib.crc32(path.encode()))
        yield path, stored, *places(hashing, count, *stored.shape)


def test_the_vector_is_held_once_and_fitted_to_all() -> None:
    w, count = weights(), (120 + 48 + 128) // 8
    params, state = scheme().init(w)
    assert [a.shape for a in jax.tree.leaves(params["a"])] == [(count,), ()]
    assert [a.shape for a in jax.tree.leaves(params["b"])] == [()]
    assert [a.shape for a in jax.tree.leaves(params["layers"])] == [(2,)]
    total, load = np.zeros(count), np.zeros(count)
    for _, stored, at, sign in parts(w, count):
        np.add.at(total, at, sign * stored)
        np.add.at(load, at, 1)
    buckets = np.asarray(params["a"].buckets)
    np.testing.assert_allclose(buckets, total / np.maximum(load, 1), atol=1e-6)
    dense = run(lambda p, s: jc.materialize(scheme().view(p, s)), params, state)
    for path, stored, at, sign in parts(w, count):
        found = np.asarray(dense[path]).swapaxes(-1, -2).reshape(stored.shape)
        np.testing.assert_array_equal(found, np.float32(sign) * buckets[at])
    packed = scheme().compress(params, state)
    assert packed["a"].buckets is packed["b"].buckets is params["a"].buckets


def test_layers_of_a_stack_differ_and_can_be_scanned() -> None:
    params, state = scheme(key=KEY).init(weights())
    body = lambda x, w: (jnp.tanh(x @ w), None)
    model = jc.lift(lambda p, x: jax.lax.scan(body, x, p["layers"])[0])
    view = scheme(key=KEY).view(params, state)
    dense, y = run(lambda v, x: (jc.materialize(v), model(v, x)), view, draw(4, 3, 8))
    assert (dense["layers"][0] != dense["layers"][1]).any()
    x = draw(4, 3, 8)
    for w in dense["layers"]:
        x = jnp.tanh(x @ w)
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_layers_begin_at_whole_blocks() -> None:
    """As a kernel that makes whole blocks needs."""
    transform = jc.select({"*": h.shared(ratio=4.0, block=(3, 2))}, axes=AXES)
    w = {"layers": draw(2, 2, 8, 8)}
    view = transform.view(*transform.init(w))["layers"]
    assert view.first.tolist() == [0, 9]
    again = transform.view(*transform.init({"layers": view.materialize()}))["layers"]
    np.testing.assert_array_equal(again.buckets, view.buckets)
    layer = jax.tree.map(lambda a: a[1], view)
    at, sign = places(view.hashing, 32, 8, 8, row=9)
    wanted = (sign * np.float32(layer.buckets)[at]).T
    x = draw(5, 3, 8)
    dense, y = run(lambda w, x: (w.materialize(), jc.lift(jnp.matmul)(x, w)), layer, x)
    np.testing.assert_array_equal(dense, wanted)
    np.testing.assert_allclose(y, x @ wanted, atol=1e-5)


def test_drawn_weights_keep_their_own_variance() -> None:
    w = {"a": 0.1 * draw(0, 64, 64), "b": 2 * draw(1, 64, 64)}
    transform = h.shared(ratio=8.0, key=KEY)
    dense = run(lambda w: jc.materialize(transform.view(*transform.init(w))), w)
    for path, value in w.items():
        size = np.square(dense[path]).mean()
        assert size == pytest.approx(np.square(value).mean(), rel=0.15)


def test_gradients_of_all_weights_meet_in_the_vector() -> None:
    transform, w = scheme(key=KEY), weights()
    params, state = transform.init(w)
    far = {path: draw(7, *value.shape) for path, value in w.items()}

    def loss(params: Any) -> jax.Array:
        dense = jc.materialize(transform.view(params, state))
        return sum(((dense[path] * far[path]).sum() for path in w), jnp.float32(0))

    grads = run(jax.grad(loss), params)
    wanted = np.zeros(37)
    for path, stored, at, sign in parts(far, 37):
        scale = np.float64(params[path].scale).reshape(-1, 1)
        rows = np.repeat(scale, len(stored) // len(scale), axis=0)
        np.add.at(wanted, at, sign * stored * rows)
    np.testing.assert_allclose(grads["a"].buckets, wanted, rtol=1e-4, atol=1e-4)
    moved, _ = transform.update(params, state, grads=grads)
    assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_a_rule_acts_on_the_vector_once() -> None:
    transform = scheme(rule=jc.quant.int4())
    params, state = transform.init(weights())
    view, packed = run(
        lambda p, s: (transform.view(p, s), transform.compress(p, s)), params, state
    )
    dense = run(jc.materialize, {"view": view, "packed": packed})
    for path in view:
        np.testing.assert_array_equal(dense["view"][path], dense["packed"][path])
        assert len(np.unique(np.abs(dense["packed"][path]))) <= 8
    again, _ = transform.init(params)
    assert again["a"].buckets is params["a"].buckets


def test_what_is_refused() -> None:
    w = {"a": draw(0, 16, 16), "b": draw(1, 16, 16)}
    with pytest.raises(jc.OrderError, match="several weights share"):
        jc.chain(h.shared(ratio=8.0), jc.quant.int8()).init(w)
    with pytest.raises(jc.OrderError, match="hash first"):
        jc.chain(h.hashed(ratio=8.0), h.shared(ratio=8.0)).init(w)
    with pytest.raises(ValueError, match="not be wider than the inputs of 'b', 4"):
        h.shared(ratio=8.0, block=(1, 8)).init({"a": w["a"], "b": draw(0, 4, 16)})
    with pytest.raises(ValueError, match="give ratio="):
        h.shared().init(w)
