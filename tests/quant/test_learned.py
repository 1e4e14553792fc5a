"""Learned steps: gradients by hand, what is stored, and what training gains."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.lift import statistics

UINT4 = q.Integer(bits=4, symmetric=False, narrow=False)
INT4 = q.Integer(bits=4, narrow=False)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def storage_order(w: np.ndarray, contract: tuple[int, ...]) -> np.ndarray:
    """``[outputs, inputs]`` of one weight."""
    contract = tuple(a % w.ndim for a in contract)
    out = [a for a in range(w.ndim) if a not in contract]
    moved = np.transpose(w, (*out, *contract))
    return moved.reshape(int(np.prod(moved.shape[: len(out)])), -1)


def lsq_by_hand(
    w: np.ndarray, steps: np.ndarray, g: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eq. 1 to 3 and 5, in loops: value, gradient of each weight and of each step.

    Args:
      w: ``[outputs, inputs]``.
      steps: ``[outputs, groups]``.
      g: Gradient of the loss by the value.
      top: Q_p, and -Q_n.
    """
    value, by_w, by_s = np.zeros_like(w), np.zeros_like(w), np.zeros_like(steps)
    size = w.shape[1] // steps.shape[1]
    for o in range(w.shape[0]):
        for k in range(w.shape[1]):
            s = steps[o, k // size]
            v = w[o, k] / s
            if v < -top:
                code, slope, inside = -top, -top, 0.0
            elif v > top:
                code, slope, inside = top, top, 0.0
            else:
                code = np.round(v)
                slope, inside = code - v, 1.0
            value[o, k] = code * s
            by_w[o, k] = g[o, k] * inside
            by_s[o, k // size] += g[o, k] * slope
    return value, by_w, by_s / np.sqrt(size * top)


@pytest.mark.parametrize(
    ("shape", "fmt", "contract"),
    [
        ((8, 3), q.int2(group_size=4), (-2,)),
        ((2, 2, 3, 4), q.int4(axes=(-4, -3, -2)), (-4, -3, -2)),
        ((4, 3, 2), q.int3(axes=(-1, -2)), (-1, -2)),
    ],
    ids=["groups", "convolution", "crossed"],
)
def test_gradients_are_those_of_the_paper(
    shape: tuple[int, ...], fmt: q.NumberFormat, contract: tuple[int, ...]
) -> None:
    if len(shape) == 3:  # No stack: the first axis is an output axis.
        fmt = fmt.replace(axes=jc.Axes(contract=contract))
    scheme = q.lsq(fmt)
    params, state = jax.jit(scheme.init)({"w": draw(*shape)})
    # Every step halved, so that some weights lie beyond the grid.
    params = {"w": params["w"].replace(step=params["w"].step * 0.5)}
    g = draw(*shape, seed=1)
    view = lambda p: jc.materialize(scheme.view(p, state))["w"]
    value, pull = jax.vjp(jax.jit(view), params)
    grads = pull(g)[0]["w"]

    used = np.asarray(jax.jit(scheme.compress)(params, state)["w"].scales(), np.float64)
    np.testing.assert_allclose(used, params["w"].step, rtol=2**-16)
    w, g = (
        storage_order(np.asarray(a, np.float64), contract) for a in (draw(*shape), g)
    )
    steps = used.reshape(w.shape[0], -1)
    expected = lsq_by_hand(w, steps, g, int(fmt.element.largest))
    assert (expected[1] == 0).any()
    assert (expected[1] != 0).any()
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    found = storage_order(np.asarray(value), contract)
    close(found, expected[0])
    by_w = storage_order(np.asarray(grads.latent), contract)
    close(by_w, expected[1])
    close(grads.step.reshape(steps.shape), expected[2])


def test_first_steps_are_the_paper_s_and_blank_channels_can_learn() -> None:
    w = draw(16, 3).at[:, 1].set(0.0)
    params, state = jax.jit(q.lsq(q.int3()).init)({"w": w})
    step = params["w"].step[:, 0]
    expected = 2 * np.abs(np.asarray(w)).mean(0) / np.sqrt(3)
    np.testing.assert_allclose(step[::2], expected[::2], rtol=1e-6)
    np.testing.assert_allclose(step[1], 2 / np.sqrt(16 * 3), rtol=1e-6)
    dense = jax.jit(q.lsq(q.int3()).compress)(params, state)["w"].materialize()
    assert not dense[:, 1].any()
    assert dense[:, 0].any()


def test_steps_of_the_range_are_the_format_s_own() -> None:
    fmt = q.int3(group_size=4)
    scheme = q.lsq(fmt, initial="range")
    packed = jax.jit(scheme.compress)(*jax.jit(scheme.init)({"w": draw(8, 3)}))["w"]
    plain = jax.jit(lambda w: q.quantize(w, fmt))(draw(8, 3))
    np.testing.assert_array_equal(packed.words, plain.words)
    np.testing.assert_array_equal(packed.scale, plain.scale)


def test_a_step_of_any_sign_and_size_has_a_defined_outcome() -> None:
    scheme = q.lsq(q.int3())
    params, state = jax.jit(scheme.init)({"w": draw(6, 2)})

    @jax.jit
    def seen(step: jax.Array) -> Any:
        changed = {"w": params["w"].replace(step=jnp.full((2, 1), step))}
        view = lambda p: jc.materialize(scheme.view(p, state))["w"]
        grads = jax.grad(lambda p: jnp.square(view(p) - 1).sum())(changed)["w"]
        stored = jc.materialize(scheme.compress(changed, state))["w"]
        return view(changed), stored, grads.latent, grads.step

    for step in (0.0, -0.3, 1e-30):
        view, stored, by_w, by_s = seen(jnp.float32(step))
        np.testing.assert_array_equal(view, stored)
        assert np.isfinite(by_w).all()
        assert np.isfinite(by_s).all()
        assert (np.asarray(by_s) != 0).any()
    negative, positive = seen(jnp.float32(-0.3)), seen(jnp.float32(0.3))
    for a, b, sign in zip(negative, positive, (1, 1, 1, -1), strict=True):
        np.testing.assert_allclose(a, sign * b, rtol=1e-6)


def test_roles_train_steps_without_decay_and_optimizers_move_them() -> None:
    scheme = jc.select(
        {"layer/w": q.lsq(q.int3(activations=q.static(UINT4)), activation_step=0.1)}
    )
    params, _ = jax.jit(scheme.init)({"layer": {"w": draw(6, 4), "b": jnp.zeros(4)}})
    leaf = params["layer"]["w"]
    decay = jc.weight_decay_mask(params)["layer"]["w"]
    assert (decay.inner.latent, decay.inner.step) == (True, False)
    assert (decay.step, decay.offset) == (False, False)
    trained, rest = jc.partition(params)
    assert jax.tree.leaves(rest) == []
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(leaf)) + 1
    apply = jc.lift(lambda p, x: x @ p["layer"]["w"] + p["layer"]["b"][None])
    x = jnp.abs(draw(5, 6, seed=2))

    def labels(tree: Any) -> Any:
        mask = jc.weight_decay_mask(tree)
        return jax.tree.map(lambda m: "weights" if m else "rest", mask)

    tx = optax.multi_transform(
        {"weights": optax.sgd(0.1), "rest": optax.sgd(0.5)}, labels
    )
    tx = jc.optim.attach(tx, scheme)
    opt_state = tx.init(params)

    def loss(p: Any, s: Any) -> jax.Array:
        return jnp.square(apply(scheme.view(p, s), x)).mean()

    @jax.jit
    def train(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(loss)(params, jc.optim.state(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    after = train(params, opt_state)[0]["layer"]["w"]
    for name in ("step", "offset"):
        before = getattr(leaf, name)
        assert getattr(after, name).shape == before.shape
    assert (np.asarray(after.inner.step) != np.asarray(leaf.inner.step)).all()
    assert float(after.step) != float(leaf.step)


def test_learned_steps_beat_fixed_ranges_at_two_bits() -> None:
    x = draw(128, 16)
    w = draw(16, 8, seed=3)
    y = x @ w

    def final(scheme: jc.Transform) -> float:
        params, state = jax.jit(scheme.init)({"w": w})
        tx = optax.adam(0.02)

        def loss(p: Any) -> jax.Array:
            out = x @ jc.materialize(scheme.view(p, state))["w"]
            return jnp.square(out - y).mean()

        def step(carry: Any, _: None) -> Any:
            p, s = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, s = tx.update(jax.grad(loss)(p), s, p)
            return (optax.apply_updates(p, updates), s), loss(p)

        @jax.jit
        def train(params: Any) -> Any:
            init = params, tx.init(params)
            return jax.lax.scan(step, init, None, length=100)[1][-20:].mean()

        return float(train(params))

    for fmt, ratio in ((q.int2(), 0.5), (q.int3(), 0.8)):
        assert final(q.lsq(fmt)) < ratio * final(q.weights(fmt))


def test_pruned_weights_stay_zero_under_learned_steps() -> None:
    scheme = jc.chain(jc.prune.magnitude(sparsity=0.5), q.lsq(q.int3()))

    @jax.jit
    def run(w: jax.Array) -> Any:
        params, state = scheme.init({"w": w})
        view = lambda p: jc.materialize(scheme.view(p, state))["w"]
        grads = jax.grad(lambda p: jnp.square(view(p) - 1.0).sum())(params)
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        params, state = scheme.update(moved, state)
        packed = scheme.compress(params, state)
        return state[0].masks["w"][0], grads, view(params), packed

    mask, grads, view, packed = run(draw(8, 6))
    assert not np.asarray(grads["w"].latent)[~mask].any()
    assert (np.asarray(grads["w"].step) != 0).all()
    assert packed["w"].method == "bitmask int3"
    dense = np.asarray(jax.jit(jc.materialize)(packed)["w"])
    assert not dense[~mask].any()
    np.testing.assert_array_equal(dense, view)


def activation_by_hand(
    x: np.ndarray, s: float, beta: float, low: int, high: int
) -> tuple[np.ndarray, ...]:
    """LSQ+ eq. 1 to 5, the offset a multiple of s: value, and its three slopes."""
    # Codes from a negative number on are symmetric, around a zero point of 0.
    zero = 0 if low < 0 else np.clip(low - np.round(beta / s), low, high)
    value, by_x, by_s, by_beta = (np.zeros_like(x) for _ in range(4))
    for i in np.ndindex(x.shape):
        v = x[i] / s + zero
        code = np.clip(np.round(x[i] / s) + zero, low, high)
        value[i] = (code - zero) * s
        if v < low:
            by_s[i], by_beta[i] = low, 1.0
        elif v > high:
            by_s[i], by_beta[i] = high, 1.0
        else:
            by_x[i], by_s[i] = 1.0, np.round(x[i] / s) - x[i] / s
    return value, by_x, by_s, by_beta


@pytest.mark.parametrize("element", [UINT4, INT4], ids=["uint4", "int4"])
def test_gradients_of_an_activation_range(element: q.Integer) -> None:
    fmt = q.int8(activations=q.static(element))
    x = draw(7, 6, seed=4)
    stats = {"w": statistics(0.6 * x)}
    scheme = q.lsq(fmt, stats=stats)
    params, state = jax.jit(scheme.init)({"w": draw(6, 3)})
    leaf = params["w"]
    g = draw(7, 6, seed=5)

    def prepared(p: Any, x: jax.Array) -> jax.Array:
        return scheme.view(p, state)["w"].prepare_activations(x)

    @jax.jit
    def both(params: Any, x: jax.Array) -> Any:
        value, pull = jax.vjp(prepared, params, x)
        return value, *pull(g)

    value, by_p, by_x = both(params, x)
    s = float(leaf.step)
    beta = 0.0 if leaf.offset is None else float(leaf.offset)
    hand = activation_by_hand(
        np.asarray(x, np.float64), s, beta, element.low, element.high
    )
    assert 0 < (hand[1] == 0).sum() < x.size / 2
    np.testing.assert_allclose(value, hand[0], atol=1e-5)
    weight = np.asarray(g, np.float64)
    np.testing.assert_allclose(by_x, weight * hand[1], atol=1e-6)
    factor = 1 / np.sqrt(6 * element.high)  # An entry's features; 7 is the batch.
    np.testing.assert_allclose(
        by_p["w"].step, factor * (weight * hand[2]).sum(), rtol=1e-3
    )
    if leaf.offset is not None:
        expected = factor * (weight * hand[3]).sum()
        np.testing.assert_allclose(by_p["w"].offset, expected, rtol=1e-4)
    assert (leaf.offset is None) == element.symmetric


def test_a_scanned_stack_trains_a_range_a_layer_and_stores_it() -> None:
    fmt = q.int4(axes=-2, activations=q.static(UINT4))
    x, w = draw(5, 8), draw(3, 8, 8, seed=1)
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    stats = jc.calibrate(fn, {"w": w}, [x])
    scheme = q.lsq(fmt, stats=stats)
    params, state = jax.jit(scheme.init)({"w": w})
    assert params["w"].step.shape == (3,)
    run = jc.lift(fn)

    @jax.jit
    def seen(params: Any) -> Any:
        loss = lambda p: jnp.square(run(scheme.view(p, state), x) - 0.3).sum()
        packed = scheme.compress(params, state)
        forms = scheme.view(params, state), packed
        outputs = [run(form, x) for form in forms]
        return jax.grad(loss)(params), outputs, jc.materialize(forms), packed

    grads, (output, stored), (view, dense), packed = seen(params)
    assert (np.asarray(grads["w"].step) != 0).all()
    assert (np.asarray(grads["w"].inner.latent) != 0).any()
    assert packed["w"].activation_scale.shape == (3, 1, 1)
    np.testing.assert_array_equal(output, stored)
    np.testing.assert_array_equal(view["w"], dense["w"])


def test_a_convolution_takes_its_gradients_through_the_range() -> None:
    fmt = q.int4(axes=(-4, -3, -2), activations=q.static(UINT4))
    scheme = q.lsq(fmt, activation_step=0.05, learn_offset=False)
    params, state = jax.jit(scheme.init)({"w": draw(3, 3, 2, 4)})
    assert params["w"].offset is None
    x = jnp.abs(draw(2, 5, 5, 2, seed=3))
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    run = jc.lift(conv)

    @jax.jit
    def seen(params: Any) -> Any:
        loss = lambda p: jnp.square(run(scheme.view(p, state), x)).sum()
        forms = scheme.view(params, state), scheme.compress(params, state)
        return jax.grad(loss)(params), [run(form, x) for form in forms]

    grads, (output, stored) = seen(params)
    assert float(grads["w"].step) != 0
    np.testing.assert_array_equal(output, stored)


STATIC = q.int4(activations=q.static(UINT4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.lsq(q.int4(symmetric=False)), "must be symmetric integers"),
        (lambda: q.lsq(q.mxfp4()), "must be symmetric integers"),
        (lambda: q.lsq(q.int4(rounding="toward_zero")), "must be 'nearest'"),
        (lambda: q.lsq(q.int4(), initial="max"), "initial must be"),  # pyright: ignore[reportArgumentType]
        (lambda: q.lsq(q.int4(), activation_step=1.0), "belong to static"),
        (lambda: q.lsq(STATIC), "need a range to start from"),
        (
            lambda: q.lsq(STATIC, stats={}).init({"w": draw(4, 4)}),
            "no statistics for 'w'",
        ),
        (
            lambda: q.lsq(STATIC, activation_step={"w": jnp.ones(2)}).init(
                {"w": draw(4, 4)}
            ),
            r"stack \(\), but its activations start from \(2,\)",
        ),
        (lambda: q.lsq(q.int4()).view({"w": draw(4, 4)}, ()), "no learned steps"),
        (
            lambda: q.lsq(STATIC, activation_step=1.0).view(
                q.lsq(q.int4()).init({"w": draw(4, 4)})[0], ()
            ),
            "no learned range",
        ),
        (lambda: jc.chain(q.lsq(q.int4()), q.int4()).init({"w": draw(4, 4)}), "undo"),
    ],
)
def test_what_cannot_be_learned_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
