"""Proximal steps against closed forms and problems solved to their optimum."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import prune

RNG = np.random.default_rng(0)
W = RNG.normal(size=(4, 3, 5)).astype(np.float32)
U = RNG.normal(size=(4, 3, 5)).astype(np.float32) * np.float32(0.1)


def soft(v: np.ndarray, t: float) -> np.ndarray:
    return np.where(v > t, v - t, np.where(v < -t, v + t, 0.0))


def shrunk(v: np.ndarray, t: float, axes: tuple[int, ...]) -> np.ndarray:
    """Block soft thresholding, one group after the other."""
    out = np.zeros_like(v)
    for group in itertools.product(*(range(v.shape[a]) for a in axes)):
        index: list[Any] = [slice(None)] * v.ndim
        for a, i in zip(axes, group, strict=True):
            index[a] = i
        part = v[tuple(index)]
        norm = np.sqrt((part**2).sum())
        if norm > t * np.sqrt(part.size):
            out[tuple(index)] = part * (1 - t * np.sqrt(part.size) / norm)
    return out


def stepped(tx: Any, w: Any, u: Any) -> Any:
    """Params after the first step of a transformation."""

    @jax.jit
    def step(w: Any, u: Any) -> Any:
        updates, _ = tx.update(u, tx.init(w), w)
        return optax.apply_updates(w, updates)

    return jax.tree.map(np.asarray, step(w, u))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_l1_step_is_a_soft_threshold_with_exact_zeros(dtype: Any) -> None:
    w, u = jnp.asarray(W, dtype), jnp.asarray(U, dtype)
    found = stepped(prune.proximal_l1(2.0, 0.25), w, u)
    expected = soft(np.asarray(w + u, np.float64), 0.5)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0.2 < (found == 0).mean() < 0.6
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        found.astype(np.float64), expected, rtol=eps, atol=3 * eps
    )


@pytest.mark.parametrize("axes", [(-1,), (0,), (0, 2), (-2, -1)])
def test_the_group_step_shrinks_structures_whole(axes: tuple[int, ...]) -> None:
    found = stepped(prune.proximal_group(1.6, 0.5, axes=axes), W, U)
    expected = shrunk(np.float64(W + U), 0.8, axes)
    np.testing.assert_array_equal(found == 0, expected == 0)
    assert 0 < (found == 0).mean() < 1
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_strength_follows_the_schedule_of_the_learning_rate() -> None:
    tx = prune.proximal_l1(1.0, jc.schedules.linear(0.5, 0.25, begin=0, end=1))
    w = jnp.array([2.0, -2.0])
    state, update = tx.init(w), jax.jit(tx.update)
    for expected in (1.5, 1.25):
        updates, state = update(jnp.zeros(2), state, w)
        w = optax.apply_updates(w, updates)
        assert w.tolist() == [expected, -expected]


def lasso(x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """Coordinate descent on 1/2 |xw - y|^2 + strength |w|_1, to convergence."""
    w = np.zeros(x.shape[1])
    for _ in range(2000):
        for j in range(w.size):
            rest = y - x @ w + x[:, j] * w[j]
            w[j] = soft(x[:, j] @ rest, strength) / (x[:, j] @ x[:, j])
    return w


def test_a_lasso_is_solved_to_its_optimum() -> None:
    x = RNG.normal(size=(40, 8)).astype(np.float32)
    y = (x @ [3, 0, 0, -2, 0.1, 0, 1, 0] + 0.3 * RNG.normal(size=40)).astype(np.float32)
    strength = 8.0
    rate = 1 / float(np.linalg.norm(x, 2) ** 2)
    tx = optax.chain(optax.sgd(rate), prune.proximal_l1(strength, rate))
    gradient = jax.grad(lambda w: 0.5 * jnp.square(x @ w - y).sum())

    @jax.jit
    def solve(w: jax.Array) -> jax.Array:
        def step(_: Any, carry: Any) -> Any:
            w, state = carry
            updates, state = tx.update(gradient(w), state, w)
            return optax.apply_updates(w, updates), state

        return jax.lax.fori_loop(0, 400, step, (w, tx.init(w)))[0]

    found = np.asarray(solve(jnp.ones(8)))
    expected = lasso(np.float64(x), np.float64(y), strength)
    assert 2 <= (expected == 0).sum() <= 6
    np.testing.assert_array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_biases_are_left_alone_under_optax_masked() -> None:
    params = {"w": jnp.full((2, 2), 0.25), "b": jnp.full((2,), 0.25)}
    for tx in (prune.proximal_l1(1.0, 0.5), prune.proximal_group(1.0, 0.5, axes=1)):
        chained = optax.chain(optax.sgd(0.5), optax.masked(tx, jc.weight_decay_mask))
        found = stepped(chained, params, jax.tree.map(jnp.zeros_like, params))
        assert not found["w"].any()
        np.testing.assert_array_equal(found["b"], params["b"])


def test_the_penalty_is_the_one_whose_step_it_is() -> None:
    """Optimality of the step: (v - w) / t is a subgradient of the penalty at w."""
    penalty = lambda p: prune.group_lasso(p, axes=-1)
    blank = np.concatenate([W, np.zeros_like(W[..., :1])], axis=-1)
    value, grad = jax.jit(jax.value_and_grad(penalty))({"a": W, "b": blank})
    norms = [np.linalg.norm(np.float64(W[..., i])) for i in range(5)]
    np.testing.assert_allclose(value, 2 * np.sqrt(12) * sum(norms), rtol=1e-6)
    assert not np.asarray(grad["b"])[..., -1].any()
    v = W - np.float32(0.1) * np.asarray(grad["a"])
    back = stepped(prune.proximal_group(1.0, 0.1, axes=-1), v, np.zeros_like(v))
    shrunk_twice = shrunk(np.float64(v), 0.1, (2,))
    np.testing.assert_allclose(back, shrunk_twice, rtol=1e-5, atol=1e-6)
    implicit = (np.float64(v) - shrunk_twice) / 0.1
    slope = jax.jit(jax.grad(penalty))({"a": shrunk_twice.astype(np.float32)})["a"]
    np.testing.assert_allclose(implicit, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.proximal_l1(-1.0, 0.1), r"proximal_l1: strength .* got -1\.0"),
        (
            lambda: prune.proximal_group(1.0, float("inf"), axes=0),
            "proximal_group: learning_rate .* got inf",
        ),
        (
            lambda: prune.proximal_l1(1.0, 0.1).update(W, prune.ProximalState(W)),
            "proximal_l1: update needs the parameters",
        ),
        (
            lambda: prune.group_lasso({"w": W, "b": {"c": W[0, 0]}}, axes=-2),
            r"group_lasso at 'b/c': axes .* got -2 for shape \(5,\)",
        ),
        (
            lambda: stepped(prune.proximal_group(1.0, 0.1, axes=3), {"w": W}, {"w": U}),
            r"proximal_group at 'w': axes .* got 3",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
