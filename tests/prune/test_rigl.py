"""RigL against Algorithm 1 in loops over sorted lists, alone and in an optimizer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests.jitted import run
from tests.lift.programs import mesh
from tests.prune.regrowth import dropped, moved

KEY = jax.random.key(3)
rng = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def halves(*shape: int) -> np.ndarray:
    """Multiples of 1/2 from -2 to 2: many ties."""
    return (rng.integers(-4, 5, shape) / 2).astype(np.float32)


def test_what_grows_has_the_largest_gradient() -> None:
    fraction = jc.schedules.cosine(0.6, 0.0, begin=0, end=7)
    scheme = jc.prune.rigl(sparsity=0.7, key=KEY, fraction=fraction, every=2, until=7)
    start = {"w": jnp.asarray(draw(8, 6))}
    params, state = jax.jit(scheme.init)(start)
    update = jax.jit(lambda p, s, g: scheme.update(p, s, grads=g))
    kept = np.asarray(state.masks["w"][0])
    assert kept.sum() == 48 - 34
    changes = 0
    for t in range(1, 10):
        w, g, before = halves(8, 6), halves(8, 6), kept
        if t % 2 == 0 and t < 7:
            rate = 0.3 * (1 + np.cos(np.pi * t / 7))
            kept = moved(w, kept, np.abs(g), rate, again=True)
            changes += (kept != before).sum()
        params, state = update({"w": jnp.asarray(w)}, state, {"w": jnp.asarray(g)})
        np.testing.assert_array_equal(state.masks["w"][0], kept)
        np.testing.assert_array_equal(params["w"], np.where(kept & before, w, 0))
    assert changes > 8


SMALL = jc.prune.rigl(sparsity=0.5, key=KEY, fraction=0.25, every=1)
first = jax.jit(SMALL.init)
following = jax.jit(lambda p, s, g: SMALL.update(p, s, grads=g))


def test_a_weight_dropped_with_the_largest_gradient_stays_with_its_value() -> None:
    params, state = first({"w": draw(4, 4)})
    kept = np.asarray(state.masks["w"][0])
    w = np.where(kept, draw(4, 4), 0).astype(np.float32)
    low, _ = dropped(w, kept, 0.25)
    grads = np.zeros(16, np.float32)
    grads[low] = -5.0
    grads = {"w": jnp.asarray(grads.reshape(4, 4))}
    params, after = following({"w": jnp.asarray(w)}, state, grads)
    mask = np.asarray(after.masks["w"][0])
    assert mask.flat[low]
    assert np.asarray(params["w"]).flat[low] == w.flat[low] != 0
    assert (mask != kept).sum() in (0, 2)


def test_gradients_that_are_not_finite_grow_last() -> None:
    params, state = first({"w": draw(4, 4)})
    kept = np.asarray(state.masks["w"][0])
    free = np.flatnonzero(~kept)
    grads = np.zeros(16, np.float32)
    grads[free] = [np.inf, np.nan, 3.0, 2.0, 1.0, -np.inf, 0.5, 0.25]
    with jax.debug_nans(False):
        grads = {"w": jnp.asarray(grads.reshape(4, 4))}
        _, after = following(params, state, grads)
    grown = np.asarray(after.masks["w"][0]) & ~kept
    np.testing.assert_array_equal(np.flatnonzero(grown), free[[2, 3]])
    assert np.asarray(after.masks["w"][0]).sum() == 8


X = jnp.asarray(draw(32, 8))
TARGET = jnp.asarray(draw(32, 6))


def loss(w: Any, x: jax.Array) -> jax.Array:
    return ((x @ jc.materialize(w) - TARGET) ** 2).mean()


def test_the_view_has_the_dense_gradient() -> None:
    scheme = jc.prune.rigl(sparsity=0.6, key=KEY)

    def gradient(params: Any) -> Any:
        params, state = scheme.init(params)
        view = lambda p: loss(scheme.view(p, state)["w"], X)
        return params, state, jax.grad(view)(params)

    params, state, grad = run(gradient, {"w": draw(8, 6)})
    w = np.where(state.masks["w"][0], params["w"], 0)
    x, target = np.float64(X), np.float64(TARGET)
    expected = 2 * x.T @ (x @ w - target) / target.size
    np.testing.assert_allclose(grad["w"], expected, rtol=1e-4, atol=1e-6)


def test_an_optimizer_never_moves_what_is_pruned() -> None:
    """Adam's steps for pruned weights are dropped; what grows starts at zero."""
    scheme = jc.select({"w": jc.prune.rigl(sparsity=0.6, key=KEY, every=2)})
    with jax.numpy_dtype_promotion("standard"):
        tx = jc.optim.attach(optax.adam(0.05), scheme)
        params = {"w": draw(8, 6), "b": np.ones(6, np.float32)}
        opt = run(tx.init, params)

        def step(params: Any, opt: Any) -> tuple[Any, Any]:
            state = jc.optim.state(opt)
            view = lambda p: loss(scheme.view(p, state)["w"], X) + (p["b"] ** 2).sum()
            updates, opt = tx.update(jax.grad(view)(params), opt, params)
            return optax.apply_updates(params, updates), opt

        step = jax.jit(step)
        grown = 0
        for _ in range(6):
            before = np.asarray(jc.prune.masks(opt)["w"][0])
            params, opt = step(params, opt)
            kept = np.asarray(jc.prune.masks(opt)["w"][0])
            w = np.asarray(params["w"])
            np.testing.assert_array_equal(w != 0, kept & before)
            grown += (kept & ~before).sum()
        assert grown > 4


def test_gradients_can_be_masked_for_the_optimizer() -> None:
    scheme = jc.select({"w": jc.prune.rigl(sparsity=0.6, key=KEY)})
    params = {"w": jnp.asarray(draw(8, 6)), "b": jnp.ones(6)}
    _, state = jax.jit(scheme.init)(params)
    grads = {"w": jnp.asarray(draw(8, 6)), "b": jnp.full(6, 2.0)}
    found = jc.prune.mask_gradients(grads, state)
    (kept,) = jc.prune.masks(state)["w"]
    np.testing.assert_array_equal(found["w"], np.where(kept, grads["w"], 0))
    assert found["b"] is grads["b"]


@pytest.mark.parametrize("grads", [None, {"b": jnp.ones(6)}], ids=["none", "missing"])
def test_an_update_without_gradients_is_refused(grads: Any) -> None:
    scheme = jc.select({"w": jc.prune.rigl(sparsity=0.6, key=KEY)})
    params = {"w": jnp.asarray(draw(8, 6)), "b": jnp.ones(6)}
    params, state = jax.eval_shape(scheme.init, params)
    with pytest.raises(ValueError, match=r"prune\.rigl: update needs .* none for 'w'"):
        jax.eval_shape(functools.partial(scheme.update, grads=grads), params, state)


def test_masks_are_the_same_on_eight_devices() -> None:
    scheme = jc.prune.rigl(sparsity=0.8, key=KEY, fraction=0.5, every=1)

    def twice(w: jax.Array, g: jax.Array) -> jax.Array:
        def step(carry: Any, sign: jax.Array) -> tuple[Any, None]:
            return scheme.update(*carry, grads={"w": g + sign * w}), None

        signs = jnp.array([1.0, -1.0])
        (_, state), _ = jax.lax.scan(step, scheme.init({"w": w}), signs)
        return state.masks["w"][0]

    w, g = jnp.asarray(halves(32, 16)), jnp.asarray(halves(32, 16))
    spread = NamedSharding(mesh(), P(None, "d"))
    placed = jax.device_put(w, spread), jax.device_put(g, spread)
    found = jax.jit(twice)(*placed)
    np.testing.assert_array_equal(found, jax.jit(twice)(w, g))
