"""`attach`: constraints inside optimizers, and whatever optimizers stand inside."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxcompress as jc

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
PARAMS = {"bias": jnp.zeros(4), "kernel": W}
KERNEL = "kernel"


def pruning(sparsity: Any) -> jc.Transform:
    return jc.select({KERNEL: jc.prune.magnitude(sparsity=sparsity)})


def loss(params: Any) -> jax.Array:
    y = X @ params["kernel"] + jnp.broadcast_to(params["bias"], Y.shape)
    return ((y - Y) ** 2).mean()


@functools.partial(jax.jit, static_argnums=0)
def step(tx: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """A plain step: it knows nothing of `attach`."""
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def train(tx: Any, steps: int) -> tuple[Any, Any]:
    # Adam and MultiSteps divide floats by integers.
    with jax.numpy_dtype_promotion("standard"):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(steps):
            params, state = step(tx, params, state)
    return params, state


def zeros(params: Any) -> int:
    return int((params["kernel"] == 0).sum())


def mask(opt_state: Any) -> np.ndarray:
    (selected,) = jc.optim.state(opt_state)
    return np.asarray(selected.state.masks[KERNEL][0])


def count(opt_state: Any) -> int:
    return int(jc.optim.state(opt_state)[0].state.step)


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)],
    ids=["adam", "sgd", "adamw"],
)
def test_parameters_plus_updates_are_exactly_zero_where_pruned(tx: Any) -> None:
    params, state = train(jc.optim.attach(tx, pruning(0.75)), 3)
    assert zeros(params) == 18
    np.testing.assert_array_equal(params["kernel"] != 0, mask(state))
    assert (np.asarray(params["bias"]) != 0).all()


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_a_scheme_that_changes_nothing_leaves_the_trajectory(tx: Any) -> None:
    plain, plain_state = train(tx, 3)
    held, state = train(jc.optim.attach(tx, jc.identity()), 3)
    jax.tree.map(np.testing.assert_array_equal, held, plain)
    jax.tree.map(np.testing.assert_array_equal, state.inner, plain_state)


def test_a_step_is_the_optimizers_own_where_weights_are_kept() -> None:
    tx = jc.optim.attach(optax.sgd(0.1), pruning(0.5))
    state = tx.init(PARAMS)
    grads = jax.grad(loss)(PARAMS)
    updates, _ = jax.jit(tx.update)(grads, state, PARAMS)
    stepped = -0.1 * np.asarray(grads["kernel"])
    expected = np.where(mask(state), stepped, -np.asarray(W))
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
    assert zeros(optax.apply_updates(PARAMS, updates)) == 12


def test_gradual_masks_come_from_the_weights_as_moved() -> None:
    schedule = jc.schedules.one_shot(0.5, at=1)
    tx = jc.optim.attach(optax.sgd(1.0), pruning(schedule))
    state = tx.init(PARAMS)
    assert mask(state).all()
    # A step that turns the order of magnitudes round.
    moved = 10.0 - jnp.abs(W)
    grads = {"bias": jnp.zeros(4), "kernel": W - moved}
    _, state = jax.jit(tx.update)(grads, state, PARAMS)
    largest = np.sort(np.abs(W), axis=None)[12]
    np.testing.assert_array_equal(mask(state), np.abs(W) < largest)


def test_a_clipped_chain_is_the_chain_of_the_clipped_optimizer() -> None:
    clip, sgd, scheme = optax.clip(0.05), optax.sgd(0.5, momentum=0.9), pruning(0.5)
    outside, state = train(optax.chain(clip, jc.optim.attach(sgd, scheme)), 3)
    inside, _ = train(jc.optim.attach(optax.chain(clip, sgd), scheme), 3)
    jax.tree.map(np.testing.assert_array_equal, outside, inside)
    assert zeros(outside) == 12
    np.testing.assert_array_equal(outside["kernel"] != 0, mask(state))


def test_multi_steps_counts_real_steps_and_changes_masks_only_then() -> None:
    schedule = jc.schedules.linear(0.0, 0.5, begin=0, end=2)
    tx = optax.MultiSteps(
        jc.optim.attach(optax.sgd(0.1), pruning(schedule)), every_k_schedule=3
    )
    seen = []
    for steps in range(1, 7):
        params, state = train(tx, steps)
        seen.append((count(state), int((~mask(state)).sum()), zeros(params)))
    assert seen == [(0, 0, 0)] * 2 + [(1, 6, 6)] * 3 + [(2, 12, 12)]


def test_inside_a_linen_train_state() -> None:
    tx = jc.optim.attach(optax.sgd(0.1), pruning(0.5))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    expected, _ = train(tx, 2)
    advance = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))
    for _ in range(2):
        state = advance(state)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    np.testing.assert_array_equal(state.params["kernel"] != 0, mask(state))


class Linear(nnx.Module):
    def __init__(self) -> None:
        self.kernel = nnx.Param(PARAMS["kernel"])
        self.bias = nnx.Param(PARAMS["bias"])


def test_inside_an_nnx_optimizer() -> None:
    scheme = pruning(0.5)
    tx = jc.optim.attach(optax.sgd(0.1), scheme)
    model = Linear()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def advance(model: Linear, optimizer: nnx.Optimizer) -> None:
        own = lambda m: loss({"kernel": m.kernel[...], "bias": m.bias[...]})
        optimizer.update(model, nnx.grad(own)(model))

    for _ in range(2):
        advance(model, optimizer)
    expected, _ = train(tx, 2)
    np.testing.assert_array_equal(model.kernel[...], expected["kernel"])
    assert count(optimizer) == 2
    params = nnx.state(model, nnx.Param)
    view = jc.materialize(scheme.view(params, jc.optim.state(optimizer)))
    np.testing.assert_array_equal(view["kernel"][...], expected["kernel"])


def test_steps_can_be_scanned() -> None:
    schedule = jc.schedules.cubic(0.0, 0.75, begin=0, end=3)
    tx = jc.optim.attach(optax.sgd(0.1, momentum=0.9), pruning(schedule))
    traces = []

    def body(carry: Any, _: None) -> tuple[Any, jax.Array]:
        traces.append(None)
        params, state = step(tx, *carry)
        return (params, state), (params["kernel"] == 0).sum()

    run = jax.jit(lambda c: jax.lax.scan(body, c, length=4))
    (params, state), pruned = run((PARAMS, tx.init(PARAMS)))
    expected, expected_state = train(tx, 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (params, state.inner),
        (expected, expected_state.inner),
    )
    np.testing.assert_array_equal(mask(state), mask(expected_state))
    assert pruned.tolist() == [13, 17, 18, 18]
    traced = len(traces)
    run((params, state))
    assert len(traces) == traced


def test_the_scheme_gets_the_gradients_and_the_optimizer_its_extra_arguments() -> None:
    seen: dict[str, Any] = {}

    def record(params: Any, state: Any, *, grads: Any = None) -> tuple[Any, Any]:
        seen["grads"] = grads
        return params, state

    def scale(updates: Any, state: Any, params: Any = None, *, value: float) -> Any:
        seen["value"] = value
        return jax.tree.map(lambda u: 2.0 * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), scale)
    tx = jc.optim.attach(inner, jc.identity()._replace(update=record))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=7.0)
    assert seen == {"grads": PARAMS, "value": 7.0}
    np.testing.assert_array_equal(updates["kernel"], 2 * np.asarray(W))


def test_update_without_params_is_an_error() -> None:
    tx = jc.optim.attach(optax.sgd(0.1), jc.identity())
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_a_scheme_that_adds_leaves_must_have_seen_the_params() -> None:
    add = lambda params: ({"step": jnp.ones(()), **params}, ())
    tx = jc.optim.attach(optax.sgd(0.1), jc.identity()._replace(init=add))
    with pytest.raises(ValueError, match=r"params, _ = scheme\.init\(params\) first"):
        tx.init(PARAMS)
    ready, _ = add(PARAMS)
    assert tx.init(ready).scheme == ()


def test_state_is_found_once_or_not_at_all() -> None:
    tx = jc.optim.attach(optax.sgd(0.1), jc.identity())
    with pytest.raises(ValueError, match="found 0"):
        jc.optim.state(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="found 2"):
        jc.optim.state(optax.chain(tx, tx).init(PARAMS))
    nested = optax.chain(optax.clip(1.0), optax.chain(tx, optax.identity()))
    assert jc.optim.state(nested.init(PARAMS)) == ()
