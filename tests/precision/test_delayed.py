"""Delayed scaling: its history against a ring of maxima, its gradients, `observe`."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.precision import (
    MIXED_BF16,
    delayed_scaling,
    loss_scaling,
    observe,
)
from jaxcompress.quant import E4M3, E5M2, Integer
from tests.lift.programs import mesh

RNG = np.random.default_rng(0)
LARGEST = 448.0, 448.0, 57344.0  # Of x, w and gradients.


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


W, X, G = normal(6, 3), normal(5, 6), normal(5, 3)
WINDOW = 3


@jax.jit
def products(params: Any, x: jax.Array, g: jax.Array) -> Any:
    y, pull = jax.vjp(jc.lift(lambda p, x: x @ p["w"]), params, x)
    return y, *pull(g)


def step(tx: Any, params: Any, x: jax.Array, g: jax.Array) -> Any:
    """A product and its gradients, for a given incoming gradient; then an update."""
    y, grads, dx = products(params, x, g)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), (y, dx, grads["w"].w, updates)


SGD = observe(optax.sgd(0.5))


def oracle_scale(maxima: Any, largest: float) -> float:
    top = max(maxima, default=0.0)
    return 2.0 ** math.ceil(math.log2(top / largest)) if top > 0 else 1.0


def test_scales_are_those_of_a_ring_of_maxima() -> None:
    params = delayed_scaling({"w": W}, window=WINDOW)
    rings: list[Any] = [collections.deque(maxlen=WINDOW) for _ in LARGEST]
    for _ in range(8):
        x, g = (a * 2.0 ** RNG.uniform(-12, 12) for a in (X, G))
        seen = [float(np.abs(a).max()) for a in (x, params["w"].w, g)]
        before = params["w"].w
        params, (_, _, dw, _) = step(SGD, params, x, g)
        np.testing.assert_allclose(params["w"].w, before - 0.5 * dw, rtol=1e-6)
        for ring, top in zip(rings, seen, strict=True):
            ring.append(top)
        expected = [oracle_scale(r, m) for r, m in zip(rings, LARGEST, strict=True)]
        assert params["w"].scales().tolist() == expected
    ages = np.asarray(params["w"].ages)
    assert set(np.unique(ages)) <= {0.0, 1.0, 2.0, 3.0}


def settled(steps: int = 1) -> Any:
    params = delayed_scaling({"w": W}, window=WINDOW)
    for _ in range(steps):
        params, _ = step(observe(optax.sgd(0.0)), params, X, G)
    return params


def test_a_margin_is_powers_of_two_to_spare() -> None:
    leaf = settled()["w"]
    spare = leaf.replace(margin=2).scales()
    np.testing.assert_array_equal(spare, 4 * leaf.scales())


def test_errors_stay_within_those_of_the_operands() -> None:
    """After one step the scales fit, and rounding is that of the formats."""
    params = settled()
    _, (y, dx, dw, _) = step(SGD, params, X, G)
    scale = np.asarray(params["w"].scales(), np.float64)
    x, w, g = (np.asarray(a, np.float64) for a in (X, W, G))
    ex, ew = (np.abs(a) / 16 + s * 2.0**-10 for a, s in ((x, scale[0]), (w, scale[1])))
    eg = np.abs(g) / 8 + scale[2] * 2.0**-17

    def within(got: Any, a: Any, ea: Any, b: Any, eb: Any) -> None:
        limit = np.abs(a) @ eb + ea @ np.abs(b) + ea @ eb + 1e-5 * np.abs(a) @ np.abs(b)
        assert (np.abs(got - a @ b) <= limit).all()
        assert (np.abs(got - a @ b) > 0).any()

    within(y, x, ex, w, ew)
    within(dx, g, eg, w.T, ew.T)
    within(dw, x.T, ex.T, g, eg)


def test_what_exceeds_the_range_saturates_until_it_is_seen() -> None:
    params = settled()
    limit = 448.0 * params["w"].scales()[0]
    y, big = (step(SGD, params, x, G)[1][0] for x in (X, X * 64))
    assert np.isfinite(big).all()
    assert np.abs(big).max() <= float(limit) * 6 * np.abs(W).max() * 1.1
    params, _ = step(observe(optax.sgd(0.0)), params, X * 64, G)
    after = step(SGD, params, X * 64, G)[1][0]
    np.testing.assert_allclose(after, 64 * np.asarray(y), rtol=1e-5)


def test_infinities_stay_visible_and_are_not_recorded() -> None:
    params = settled()
    tx = observe(optax.sgd(0.0))
    with jax.debug_nans(False):  # inf * 0, in sgd.
        moved, (_, dx, dw, _) = step(tx, params, X, G.at[0, 0].set(jnp.inf))
    assert not np.isfinite(dx).any()
    assert not np.isfinite(dw).any()
    quiet, _ = step(tx, params, X, jnp.zeros_like(G))
    np.testing.assert_array_equal(moved["w"].ages, quiet["w"].ages)
    y = step(tx, params, X.at[0, 0].set(jnp.inf), jnp.zeros_like(G))[1][0]
    assert not np.isfinite(y).any()


def test_zeros_are_exact_and_record_nothing() -> None:
    params = delayed_scaling({"w": jnp.zeros((6, 3))}, window=WINDOW)
    moved, (y, dx, dw, _) = step(SGD, params, jnp.zeros((5, 6)), jnp.zeros((5, 3)))
    assert not any(np.asarray(a).any() for a in (y, dx, dw))
    assert moved["w"].scales().tolist() == [1.0, 1.0, 1.0]


def test_the_optimizer_sees_weights_alone() -> None:
    """Clipping and moments are those of training without histories."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9), optax.sgd(0.1))
    params = settled()
    with jax.numpy_dtype_promotion("standard"):
        _, (_, _, dw, updates) = step(observe(tx), params, X, G)
        expected, _ = jax.jit(tx.update)({"w": dw}, tx.init({"w": W}), {"w": W})
    np.testing.assert_allclose(updates["w"].w, expected["w"], rtol=1e-6)
    with pytest.raises(ValueError, match=r"precision\.observe: update needs"):
        observe(tx).update(params, observe(tx).init(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: loss_scaling(observe(tx), initial=4.0),
        lambda tx: observe(loss_scaling(tx, initial=4.0)),
        lambda tx: optax.MultiSteps(observe(tx), 1).gradient_transformation(),
        lambda tx: optax.chain(optax.scale(0.25), observe(tx)),
    ],
    ids=["scaling outside", "scaling inside", "mini-steps", "chain"],
)
def test_histories_survive_what_stands_around_them(wrap: Any) -> None:
    params = settled()
    with jax.numpy_dtype_promotion("standard"):
        moved, _ = step(wrap(optax.sgd(0.0)), params, X * 16, G)
    expected, _ = step(observe(optax.sgd(0.0)), params, X * 16, G)
    np.testing.assert_array_equal(moved["w"].ages, expected["w"].ages)
    assert moved["w"].scales()[0] == 16 * params["w"].scales()[0]


def ages_after(fn: Any, params: Any, *args: Any) -> Any:
    tx = observe(optax.sgd(0.0))

    @jax.jit
    def run(params: Any) -> Any:
        grads = jax.grad(lambda p: jc.lift(fn)(p, *args).sum())(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return run(params)


def test_a_weight_used_twice_records_the_larger() -> None:
    """What several passes saw arrives as a sum, and a sum of maxima is none."""
    params = delayed_scaling({"w": jnp.eye(4)})

    def loop(p: Any, x: jax.Array) -> jax.Array:
        body = lambda x, _: (4.0 * (x @ p["w"]), None)
        return jax.lax.scan(body, x, length=4)[0]

    moved = ages_after(loop, params, jnp.full((1, 4), 1.75))  # Up to 64 * 1.75.
    assert moved["w"].scales()[0] == 0.25


STACK = jnp.stack([s * jnp.eye(4) for s in (448.0, 448.0 * 8, 448.0 * 2)])


@pytest.mark.parametrize(
    ("stack", "expected"), [(1, [1.0, 8.0, 2.0]), (0, 8.0)], ids=["own", "shared"]
)
def test_scanned_weights_keep_their_own_or_one_history(
    stack: int, expected: Any
) -> None:
    params = delayed_scaling({"w": STACK}, stack=stack)

    def scan(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, w: (c + x @ w, None), x, p["w"])[0]

    moved = ages_after(MIXED_BF16.apply(scan), params, jnp.ones((2, 4)))
    assert moved["w"].scales()[..., 1].tolist() == expected


def test_a_batched_product_of_a_stack_shares_what_is_seen() -> None:
    params = delayed_scaling({"w": STACK}, stack=1)
    fn = lambda p, x: jnp.einsum("bi,eio->ebo", x, p["w"])
    moved = ages_after(fn, params, jnp.ones((2, 4)))
    assert moved["w"].scales()[:, 1].tolist() == [8.0, 8.0, 8.0]


def test_a_weight_on_the_left_and_no_second_trace() -> None:
    params, traces = settled(), []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        traces.append(None)
        return jnp.einsum("io,bi->ob", p["w"], x)

    run = jax.jit(jc.lift(fn))
    y = run(params, X)
    np.testing.assert_array_equal(y, products(params, X, G)[0].T)
    run(settled(steps=2), X)
    assert len(traces) == 1


def test_roles_dtypes_and_specs() -> None:
    params = delayed_scaling({"b": jnp.zeros(3), "w": W}, where="w")
    trainable, _ = jc.partition(params)
    assert trainable["w"].ages is not None
    decayed = jc.weight_decay_mask(params)["w"]
    assert (decayed.w, decayed.ages) == (True, False)
    cast = jc.precision.cast(params, jnp.bfloat16)["w"]
    assert (cast.w.dtype, cast.ages.dtype) == (jnp.bfloat16, jnp.float32)
    assert jc.materialize(params)["w"] is W
    assert params["w"].method == "fp8_e4m3 matmul, fp8_e5m2 gradient"
    specs = jc.shardings({"w": params["w"]}, {"w": P("d", None)}, mesh())["w"]
    assert specs.w == P("d", None)
    assert specs.ages == P(None, None)
    (bare,) = jax.tree.leaves(
        observe(optax.trace(0.9)).init({"w": params["w"]}), is_leaf=jc.is_leaf
    )
    with pytest.raises(ValueError, match="has no ages"):
        bare.scales()


def test_what_is_seen_is_the_same_on_many_devices() -> None:
    devices, params = mesh(), settled()
    put = lambda a: jax.device_put(a, NamedSharding(devices, P("d")))
    x, g = jnp.tile(X, (8, 1)).at[17].mul(64.0), jnp.tile(G, (8, 1))
    (y, grads, _), (y1, grads1, _) = (
        products(params, f(x), f(g)) for f in (put, np.asarray)
    )
    np.testing.assert_array_equal(grads["w"].ages, grads1["w"].ages)
    np.testing.assert_allclose(y, y1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"forward": Integer(bits=8)}, "forward must be quant.E4M3"),
        ({"backward": None}, "backward must be quant.E4M3"),
        ({"window": 0}, "window must be positive"),
        ({"margin": -1}, "margin not negative"),
        ({"stack": 2}, "stack must be below the rank of 'w'"),
        ({"where": "x"}, "rule 'x' matches nothing"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"delayed_scaling: .*{named}"):
        delayed_scaling({"w": W}, **{"forward": E4M3, "backward": E5M2, **options})
