"""`loss_scaling`: the schedule of the scale, skipped steps, and composition."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import precision
from jaxcompress.precision import loss_scale, loss_scaling
from tests.lift.programs import mesh

PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
LIMITS: dict[str, Any] = {"minimum": 0.5, "maximum": 64.0}


def oracle(
    finite: list[bool], initial: float, period: int | None, factor: float
) -> list[tuple[float, int, int]]:
    """Scale, good steps and skipped steps after each step, from the definition."""
    scale, good, skipped, history = initial, 0, 0, []
    for ok in finite:
        if ok:
            good += 1
            if period is not None and good == period:
                scale, good = min(scale * factor, LIMITS["maximum"]), 0
        else:
            skipped, good = skipped + 1, 0
            if period is not None:
                scale = max(scale / factor, LIMITS["minimum"])
        history.append((scale, good, skipped))
    return history


@functools.cache
def runner(period: int | None, factor: float) -> Any:
    tx = loss_scaling(
        optax.sgd(0.25, momentum=0.5), initial=8.0, period=period, factor=factor,
        **LIMITS,
    )  # fmt: skip

    def step(carry: Any, bad: jax.Array) -> Any:
        params, state = carry
        value = loss_scale(state).value
        grads = jax.tree.map(lambda p: jnp.ones_like(p) * value, params)
        grads["b"] = jnp.where(bad, jnp.inf, grads["b"])
        updates, new = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), new), loss_scale(new)

    scan = jax.jit(lambda bad: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), bad))
    return scan, tx


@hypothesis.given(
    st.lists(st.booleans(), min_size=24, max_size=24),
    st.sampled_from([(3, 2.0), (1, 4.0), (None, 2.0)]),
)
def test_the_scale_follows_its_definition(finite: list[bool], option: Any) -> None:
    run, _ = runner(*option)
    (params, _), scales = run(~np.asarray(finite))
    got = list(zip(*(np.asarray(a).tolist() for a in scales), strict=True))
    assert got == oracle(finite, 8.0, *option)
    momentum = moved = 0.0  # Only good steps move, by the unscaled gradient, 1.
    for ok in finite:
        if ok:
            momentum = 0.5 * momentum + 1.0
            moved += 0.25 * momentum
    np.testing.assert_allclose(params["b"], 0.5 - moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("inner", "bad"),
    [(optax.adam(0.1), jnp.inf), (optax.sgd(0.1, momentum=0.9), -jnp.inf)],
)
def test_a_skipped_step_leaves_everything_as_it_was(inner: Any, bad: Any) -> None:
    tx = loss_scaling(inner, initial=4.0)
    with jax.numpy_dtype_promotion("standard"):  # Adam divides floats by integers.
        update = jax.jit(tx.update)
        _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
        grads = {"a": jnp.array([1.0, bad]), "b": jnp.array(1.0)}
        updates, new = update(grads, state, PARAMS)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, new.inner, state.inner)
    assert (new.scale.value, new.scale.skipped) == (2.0, 1)


def test_a_nan_is_skipped_too() -> None:
    tx = loss_scaling(optax.sgd(0.1), initial=4.0)
    with jax.debug_nans(False):
        grads = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.array(1.0)}
        updates, new = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    assert new.scale.skipped == 1


def test_float16_gradients_that_vanish_are_saved() -> None:
    """The reason for the method: 2^-26 is below float16's least number, 2^-24."""
    w = jnp.ones((), jnp.float16)
    loss = lambda w: (w * jnp.float16(2.0**-13)).astype(jnp.float32) * 2.0**-13
    assert jax.grad(loss)(w) == 0.0
    tx = loss_scaling(optax.sgd(1.0), initial=2.0**15)
    state = tx.init(w)
    grad = jax.grad(lambda w: loss_scale(state).scale(loss(w)))(w)
    assert grad.dtype == jnp.float16
    assert state.scale.unscale(grad) == 2.0**-26
    assert state.scale.unscale(grad).dtype == jnp.float32


def problem(params: Any, x: jax.Array) -> jax.Array:
    return jnp.square(params["a"] * x - 1.0).sum() + params["b"] ** 2


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(tx: Any, scaled: bool, params: Any, state: Any, x: jax.Array) -> Any:
    scale = loss_scale(state).scale if scaled else lambda loss: loss
    grads = jax.grad(lambda p: scale(problem(p, x)))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def train(tx: Any, xs: jax.Array, scaled: bool) -> tuple[Any, Any]:
    params = PARAMS
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        for x in xs:
            params, state = step(tx, scaled, params, state, x)
    return params, state


XS = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)
WRAPPINGS = {
    "chain and attach": lambda tx, scaling: scaling(
        optax.chain(optax.clip_by_global_norm(0.1), jc.optim.attach(tx, jc.identity()))
    ),
    "mini-steps": lambda tx, scaling: scaling(
        optax.MultiSteps(tx, 2).gradient_transformation()
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_finite_training_is_unchanged_by_the_scale(wrapping: Any) -> None:
    tx = optax.sgd(0.1, momentum=0.9)
    scaling = functools.partial(loss_scaling, initial=2.0**10, period=2)
    plain, _ = train(wrapping(tx, lambda tx: tx), XS, scaled=False)
    params, state = train(wrapping(tx, scaling), XS, scaled=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, plain
    )
    assert loss_scale(state).value > 2.0**10


def test_an_overflow_among_mini_steps_costs_only_its_own() -> None:
    tx = WRAPPINGS["mini-steps"](optax.sgd(0.1), loss_scaling)
    params, state = train(tx, XS[:5].at[0].set(jnp.inf), scaled=True)
    assert loss_scale(state).skipped == 1
    assert state.inner.gradient_step == 2
    expected, _ = train(tx, XS[1:5], scaled=True)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_inside_a_train_state() -> None:
    tx = loss_scaling(optax.sgd(0.1), initial=16.0, period=2)
    state = TrainState.create(apply_fn=problem, params=PARAMS, tx=tx)

    @jax.jit
    def step(state: TrainState, x: jax.Array) -> TrainState:
        own = lambda p: loss_scale(state).scale(state.apply_fn(p, x))
        return state.apply_gradients(grads=jax.grad(own)(state.params))

    for x in XS[:3]:
        state = step(state, x)
    plain, _ = train(optax.sgd(0.1), XS[:3], scaled=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, plain
    )
    assert loss_scale(state).value == 32.0


class Model(nnx.Module):
    def __init__(self) -> None:
        self.a, self.b = nnx.Param(PARAMS["a"]), nnx.Param(PARAMS["b"])


def test_inside_an_nnx_optimizer() -> None:
    model = Model()
    tx = loss_scaling(optax.sgd(0.1), initial=16.0, period=2)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        scale = loss_scale(optimizer)
        own = lambda m: scale.scale(problem({"a": m.a[...], "b": m.b[...]}, x))
        optimizer.update(model, nnx.grad(own)(model))

    for x in XS[:3]:
        step(model, optimizer, x)
    plain, _ = train(optax.sgd(0.1), XS[:3], scaled=False)
    np.testing.assert_allclose(model.a[...], plain["a"], rtol=1e-6)
    assert loss_scale(optimizer).value == 32.0


def test_one_device_that_overflows_stops_all() -> None:
    """Under jit by itself; under `shard_map` by the named axis."""
    devices = mesh()
    grads = {"w": jnp.ones(16).at[13].set(jnp.inf)}
    tx = loss_scaling(optax.sgd(1.0), axis_name="d")
    state = tx.init(grads)
    sharded = jax.shard_map(
        lambda g, s: tx.update(g, s),
        mesh=devices,
        in_specs=(P("d"), P()),
        out_specs=(P("d"), P()),
    )
    updates, new = jax.jit(sharded)(grads, state)
    assert not updates["w"].any()
    assert new.scale.skipped == 1

    tx = loss_scaling(optax.sgd(1.0))
    placed = jax.device_put(grads, NamedSharding(devices, P("d")))
    updates, new = jax.jit(tx.update)(placed, state)
    assert not updates["w"].any()
    assert new.scale.skipped == 1


def test_integer_leaves_pass() -> None:
    scale = precision.LossScale.of(4.0)
    out = scale.unscale({"i": jnp.arange(3), "w": jnp.ones(2, jnp.bfloat16)})
    assert out["i"].dtype == jnp.int32
    assert out["w"].dtype == jnp.float32
    np.testing.assert_array_equal(out["w"], [0.25, 0.25])


def test_it_compiles_once() -> None:
    tx, traces = loss_scaling(optax.sgd(0.1), period=1), []

    @jax.jit
    def step(grads: Any, state: Any) -> Any:
        traces.append(None)
        return tx.update(grads, state)

    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = step(PARAMS, state)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"initial": 0.5}, "minimum <= initial"),
        ({"initial": 2.0**30}, "initial <= maximum"),
        ({"minimum": 0.0}, "0 < minimum"),
        ({"period": 0}, "period must be positive"),
        ({"factor": 1.0}, "factor must be above 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"loss_scaling: .*{named}"):
        loss_scaling(optax.sgd(0.1), **options)


def test_a_state_without_a_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_scale: .* found 0"):
        loss_scale(optax.adam(0.1).init(PARAMS))
