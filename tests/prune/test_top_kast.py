"""Top-KAST and straight-through: sets against a sorted list, params that stay dense."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.jitted import run

rng = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    """Multiples of 1/4: some ties."""
    return (rng.integers(-9, 10, shape) / 4).astype(np.float32)


def top(w: np.ndarray, kept: int) -> np.ndarray:
    """The largest; of equal ones the last."""
    order = sorted(range(w.size), key=lambda i: (abs(float(w.flat[i])), i))
    mask = np.zeros(w.size, bool)
    mask[order[w.size - kept :]] = True
    return mask.reshape(w.shape)


SCHEMES = {
    "top_kast": jc.prune.top_kast(sparsity=0.75, backward_sparsity=0.4, every=2),
    "straight_through": jc.prune.straight_through(sparsity=0.75, every=2),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_sets_are_chosen_anew_from_dense_weights(name: str) -> None:
    scheme = SCHEMES[name]
    w = draw(8, 5)
    start = {"w": jnp.asarray(w)}
    params, state = jax.jit(scheme.init)(start)
    target = jnp.asarray(draw(8, 5) + 0.125)

    def look(params: Any, state: Any) -> tuple[jax.Array, jax.Array]:
        value = lambda p: scheme.view(p, state)["w"].materialize()
        loss = lambda p: ((value(p) - target) ** 2).sum()
        return value(params), jax.grad(loss)(params)["w"]

    look = jax.jit(look)
    update = jax.jit(scheme.update)
    came_back = 0
    forward = top(w, 10)
    backward = top(w, 24) if name == "top_kast" else np.ones_like(forward)
    for t in range(1, 6):
        value, grad = look(params, state)
        seen = np.where(forward, w, 0)
        np.testing.assert_array_equal(value, seen)
        np.testing.assert_allclose(
            grad, np.where(backward, 2 * (seen - np.asarray(target)), 0), rtol=1e-5
        )
        w, before = draw(8, 5), forward
        if t % 2 == 0:
            forward = top(w, 10)
            backward = top(w, 24) if name == "top_kast" else backward
            came_back += (forward & ~before).sum()
        params, state = update({"w": jnp.asarray(w)}, state)
        np.testing.assert_array_equal(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"][0], forward)
    assert came_back > 4
    stored = run(lambda p, s: jc.materialize(scheme.compress(p, s)), params, state)
    np.testing.assert_array_equal(stored["w"], np.where(forward, w, 0))


def test_every_kept_weight_is_trained_whatever_the_pattern_or_schedule() -> None:
    """A pattern keeps small weights too; a schedule may cross the other."""
    w = draw(8, 5)
    narrow = jc.prune.top_kast(sparsity=jc.prune.nm(2, 4), backward_sparsity=0.9)
    crossing = jc.prune.top_kast(
        sparsity=jc.schedules.constant(0.5), backward_sparsity=0.8
    )

    def first(scheme: jc.Transform, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, state = scheme.init({"w": w})
        view = lambda p: scheme.view(p, state)["w"].materialize().sum()
        return jax.grad(view)(params)["w"], state.masks["w"][0]

    for scheme in (narrow, crossing):
        grad, mask = run(functools.partial(first, scheme), w)
        np.testing.assert_array_equal(grad, mask)
        assert np.asarray(mask).sum() == 20


def test_the_penalty_weighs_explored_weights_by_one_over_the_density() -> None:
    w, other = draw(8, 5), draw(4, 10)
    scheme = jc.select(
        {
            "a": SCHEMES["top_kast"],
            "b": jc.prune.top_kast(sparsity=0.5, backward_sparsity=0.0),
        }
    )
    params = {"a": jnp.asarray(w), "b": jnp.asarray(other), "c": jnp.ones(3)}

    def penalty(params: Any) -> Any:
        _, state = scheme.init(params)
        return jax.value_and_grad(jc.prune.top_kast_penalty)(params, state)

    value, grads = run(penalty, params)
    expected = 0.0
    for v, kept, trained, name in [(w, 10, 24, "a"), (other, 20, 40, "b")]:
        a, b = top(v, kept), top(v, trained)
        density = kept / 40
        weight = np.where(a, 1.0, np.where(b, 1 / density, 0.0))
        expected += (weight * v.astype(np.float64) ** 2).sum()
        np.testing.assert_allclose(grads[name], 2 * weight * v, rtol=1e-6)
    assert float(value) == pytest.approx(expected)
    assert not np.asarray(grads["c"]).any()


def test_a_penalty_without_sets_is_refused() -> None:
    _, state = jax.eval_shape(SCHEMES["straight_through"].init, {"w": jnp.ones((4, 5))})
    with pytest.raises(ValueError, match=r"top_kast_penalty: .* masks of prune\.top_k"):
        jc.prune.top_kast_penalty({"w": jnp.ones((4, 5))}, state)


def test_training_brings_back_a_weight_that_the_mask_hid() -> None:
    """What magnitude pruning cannot do: the target wants a weight that starts small."""
    target = jnp.array([[0.0], [0.0], [3.0], [0.5]])
    start = {"w": jnp.array([[2.0], [1.5], [0.25], [0.5]])}

    def trained(scheme: jc.Transform) -> np.ndarray:
        def step(_: Any, carry: Any) -> tuple[Any, Any]:
            params, state = carry
            value = lambda p: scheme.view(p, state)["w"].materialize()
            grads = jax.grad(lambda p: ((value(p) - target) ** 2).sum())(params)
            moved = jax.tree.map(lambda w, g: w - 0.125 * g, params, grads)
            return scheme.update(moved, state)

        run = lambda start: jax.lax.fori_loop(0, 12, step, scheme.init(start))
        return np.asarray(jax.jit(run)(start)[1].masks["w"][0]).ravel()

    assert trained(jc.prune.straight_through(sparsity=0.75)).tolist() == [0, 0, 1, 0]
    assert trained(jc.prune.magnitude(sparsity=0.75)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.4, "backward_sparsity": 0.5}, "at most sparsity, .* got 0.5 a"),
        ({"sparsity": 0.4, "backward_sparsity": -0.5}, r"sparsity .* got -0\.5"),
        ({"sparsity": 1.4, "backward_sparsity": 0.5}, r"sparsity .* got 1\.4"),
        ({"sparsity": 0.4, "backward_sparsity": 0.2, "every": 0}, "every must be .* 0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"prune\.top_kast: .*{message}"):
        jc.prune.top_kast(**options)
