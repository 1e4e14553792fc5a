"""PACT: the clip's gradient by hand, its training, its storage."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import quant as q


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_hand(x: np.ndarray, alpha: float, bits: int) -> tuple[np.ndarray, ...]:
    """Eq. 1 to 3 in loops: value, slope by x, slope by alpha."""
    value, by_x, by_alpha = (np.zeros_like(x) for _ in range(3))
    levels = 2**bits - 1
    for i in np.ndindex(x.shape):
        y = 0.5 * (abs(x[i]) - abs(x[i] - alpha) + alpha)
        value[i] = np.round(y * levels / alpha) * alpha / levels
        by_x[i] = float(0 < x[i] < alpha)
        by_alpha[i] = float(x[i] >= alpha)
    return value, by_x, by_alpha


def test_values_and_gradients_are_those_of_the_paper() -> None:
    scheme = q.pact(q.int4(), bits=3, alpha={"w": 0.9})
    params, state = scheme.init({"w": draw(6, 3)})
    x, g = draw(5, 6, seed=1), draw(5, 6, seed=2)

    def prepared(p: Any, x: jax.Array) -> jax.Array:
        return scheme.view(p, state)["w"].prepare_activations(x)

    @jax.jit
    def both(params: Any, x: jax.Array) -> Any:
        value, pull = jax.vjp(prepared, params, x)
        return value, *pull(g)

    value, by_p, by_x = both(params, x)
    hand = by_hand(np.asarray(x, np.float64), float(np.float32(0.9)), 3)
    weight = np.asarray(g, np.float64)
    assert hand[2].any()
    np.testing.assert_allclose(value, hand[0], atol=1e-6)
    np.testing.assert_allclose(by_x, weight * hand[1], atol=1e-6)
    np.testing.assert_allclose(by_p["w"].step, (weight * hand[2]).sum(), rtol=1e-5)


def test_the_clip_learns_and_is_stored() -> None:
    """Outputs of a layer of one clip teach that clip to another."""
    w, x = draw(8, 8), 1.5 * draw(16, 8, seed=1)
    run = jc.lift(lambda p, x: x @ p["w"])
    scheme = q.pact(q.lsq(q.int8()), bits=8, alpha=1.5)
    params, state = jax.jit(scheme.init)({"w": w})
    target = jnp.clip(x, 0.0, 0.7) @ w

    def loss(p: Any) -> jax.Array:
        error = jnp.square(run(scheme.view(p, state), x) - target).mean()
        return error + 1e-4 * q.clip_penalty(p)

    @jax.jit
    def train(params: Any) -> Any:
        def step(_: Any, p: Any) -> Any:
            leaf, g = p["w"], jax.grad(loss)(p)["w"]
            return {"w": leaf.replace(step=leaf.step - 0.05 * g.step)}

        after = jax.lax.fori_loop(0, 60, step, params)
        forms = scheme.view(after, state), scheme.compress(after, state)
        return after, forms[1], [run(form, x) for form in forms]

    after, packed, (output, stored) = train(params)
    np.testing.assert_allclose(after["w"].step, 0.7, atol=0.05)
    scale = packed["w"].activation_scale
    np.testing.assert_allclose(scale, after["w"].step.reshape(1, 1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(output, stored)


def test_the_penalty_counts_clips_alone() -> None:
    params = {
        "a": q.pact(q.int4(), alpha=2.0).init({"w": draw(4, 2)})[0],
        "b": q.lsq(
            q.int4(activations=q.static(q.Integer(bits=8))), activation_step=9.0
        ).init({"w": draw(4, 2)})[0],
        "c": draw(3),
    }
    assert float(q.clip_penalty(params)) == 4.0
    assert float(q.clip_penalty(params["c"])) == 0.0


def test_an_attached_optimizer_takes_the_params_of_init() -> None:
    scheme = q.pact(q.dorefa(bits=2), bits=2, alpha=1.0)
    params, _ = scheme.init({"w": draw(4, 2)})
    tx = jc.optim.attach(optax.sgd(0.1), scheme)
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    np.testing.assert_allclose(updates["w"].step, -0.1)
    np.testing.assert_allclose(updates["w"].inner, -0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.pact(q.int4(), bits=9), "bits must be 2 to 8"),
        (lambda: q.pact(q.int4(), alpha={}).init({"w": draw(4, 2)}), "none for 'w'"),
        (lambda: q.pact(jc.presets.W8A8).init({"w": draw(4, 2)}), "activations alone"),
        (lambda: q.pact(jc.identity()).init({"w": draw(4, 2)}), "quantizes 0"),
        (lambda: q.pact(q.int4()).init({"w": draw(2, 4, 2)}), "contracting axes"),
    ],
)
def test_what_has_no_clip_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
