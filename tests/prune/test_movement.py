"""Movement and Taylor pruning against loops over training steps, in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import prune
from tests.lift.programs import mesh

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 4)).astype(np.float32)
X = RNG.normal(size=(12, 6)).astype(np.float32)
Y = (X @ RNG.normal(size=(6, 4)) * 2).astype(np.float32)
RATE, STEPS = 0.02, 9
GROWING = jc.schedules.linear(0.0, 0.6, begin=0, end=6)


def loss(w: Any) -> jax.Array:
    return jnp.square(X @ w - Y).sum() / 12


def slope(w: np.ndarray) -> np.ndarray:
    return 2 * np.float64(X).T @ (np.float64(X) @ w - Y) / 12


def highest(score: np.ndarray, sparsity: float) -> np.ndarray:
    mask = np.ones(score.size, bool)
    gone = int(np.floor(sparsity * score.size + 0.5))
    mask[np.argsort(score, axis=None, kind="stable")[:gone]] = False
    return mask.reshape(score.shape)


def trained(scheme: jc.Transform) -> list[tuple[np.ndarray, np.ndarray, Any]]:
    """Params, masks and memory after each step of SGD with the transform attached."""
    tx = jc.optim.attach(optax.sgd(RATE), scheme)
    params = {"w": jnp.asarray(W)}
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        view = lambda p: jc.materialize(scheme.view(p, state.scheme))["w"]
        grads = jax.grad(lambda p: loss(view(p)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for _ in range(STEPS):
        params, state = step(params, state)
        mask = np.asarray(state.scheme.masks["w"][0])
        history.append((np.asarray(params["w"]), mask, state.scheme.memory))
    return history


@pytest.mark.parametrize(("every", "alpha"), [(1, 1.0), (3, "falling")])
def test_movement_prunes_what_moves_towards_zero(every: int, alpha: Any) -> None:
    falling = jc.schedules.linear(1.0, 0.1, begin=0, end=4)
    rate = falling if alpha == "falling" else alpha
    scheme = prune.movement(sparsity=GROWING, every=every, learning_rate=rate)
    w, score, kept = W.astype(np.float64), np.zeros(W.shape), np.ones(W.shape, bool)
    back = 0
    for t, (found, mask, memory) in enumerate(trained(scheme)):
        grad = slope(w * kept)
        now = np.interp(t, [0, 4], [1.0, 0.1]) if alpha == "falling" else alpha
        score = score - now * grad * w
        w = np.where(kept, w - RATE * grad, w)
        if (t + 1) % every == 0:
            after = highest(score, float(np.interp(t + 1, [0, 6], [0, 0.6])))
            back += (after & ~kept).sum()
            kept = after
        np.testing.assert_array_equal(mask, kept, err_msg=str(t))
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory.scores["w"][0], score, rtol=1e-4, atol=1e-4)
    assert kept.sum() == 10
    assert (kept != highest(np.abs(w), 0.6)).any()
    assert every > 1 or back > 0


def test_what_is_pruned_keeps_its_value_and_the_view_is_zero() -> None:
    scheme = prune.movement(sparsity=0.5)
    params, state = scheme.init({"w": jnp.array([[1.0, -4.0, 3.0, 2.0]])})
    assert state.masks["w"][0].tolist() == [[False, True, True, False]]
    grads = {"w": jnp.array([[-9.0, 1.0, 1.0, 0.0]])}
    moved = jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)
    params, state = jax.jit(scheme.update)(moved, state, grads=grads)
    assert params["w"].tolist() == [[1.0, -4.5, 2.5, 2.0]]
    assert state.memory.scores["w"][0].tolist() == [[9.0, 4.0, -3.0, 0.0]]
    view = scheme.view(params, state)["w"].materialize()
    assert view.tolist() == [[1.0, -4.5, 0.0, 0.0]]
    grad = jax.grad(lambda p: (scheme.view(p, state)["w"].materialize()).sum())(params)
    assert grad["w"].tolist() == [[1.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("every", [1, 2])
def test_taylor_prunes_by_a_moving_average(every: int) -> None:
    scheme = prune.taylor(sparsity=GROWING, decay=0.7, every=every)
    w, kept, average = W.astype(np.float64), np.ones(W.shape, bool), np.zeros(W.shape)
    for t, (found, mask, memory) in enumerate(trained(scheme)):
        grad = slope(w * kept) * kept
        w = w - RATE * grad
        average = 0.7 * average + 0.3 * (grad * w) ** 2
        if (t + 1) % every == 0:
            alive = np.where(kept, average, -1.0)
            kept &= highest(alive, float(np.interp(t + 1, [0, 6], [0, 0.6])))
        w = w * kept
        np.testing.assert_array_equal(mask, kept, err_msg=str(t))
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory["w"][0], average, rtol=1e-3, atol=1e-4)
    assert kept.sum() == 10
    assert (kept != highest(np.abs(W), 0.6)).any()


def test_eight_devices_choose_the_same_masks() -> None:
    scheme = prune.movement(sparsity=0.5)
    rng = np.random.default_rng(1)
    draw = lambda: {"w": jnp.asarray(rng.integers(-3, 4, (16, 8)), jnp.float32)}
    params, grads = draw(), draw()  # Many ties.
    run = jax.jit(lambda p, g: scheme.update(*scheme.init(p), grads=g)[1].masks["w"][0])
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh(), P("d")))
    np.testing.assert_array_equal(run(place(params), place(grads)), run(params, grads))


def test_gradients_are_asked_for_by_name() -> None:
    for scheme in (prune.movement(sparsity=0.5), prune.taylor(sparsity=GROWING)):
        params, state = jax.jit(scheme.init)({"w": jnp.asarray(W)})
        with pytest.raises(ValueError, match=r"update needs the gradients .* 'w'"):
            scheme.update(params, state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prune.taylor(sparsity=0.5),  # type: ignore[arg-type]
            r"prune\.taylor: sparsity must be a schedule, .* got 0\.5",
        ),
        (lambda: prune.taylor(sparsity=GROWING, decay=1.0), r"decay .* got 1\.0"),
        (lambda: prune.taylor(sparsity=GROWING, every=0), r"taylor: every .* got 0"),
        (lambda: prune.movement(sparsity=1.5), r"movement: sparsity .* got 1\.5"),
        (lambda: prune.movement(sparsity=0.5, every=0), r"movement: every .* got 0"),
    ],
)
def test_options_out_of_range_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
