"""Iterative magnitude pruning with rewinding, against the procedure in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc

rng = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("rewind_to", "every"), [(0, 2), (2, 3)])
def test_rounds_prune_and_rewind(rewind_to: int, every: int) -> None:
    scheme = jc.prune.iterative(rate=0.25, rounds=2, every=every, rewind_to=rewind_to)
    w = draw(8, 5)
    start = {"w": jnp.asarray(w)}
    params, state = scheme.init(start)
    assert state.memory["w"][0] is not start["w"]
    update = jax.jit(scheme.update, donate_argnums=(0, 1))
    kept, early = np.ones((8, 5), bool), w
    sizes = []
    for t in range(1, 3 * every + 1):
        w = np.where(kept, draw(8, 5), 0).astype(np.float32)
        params, state = update({"w": jnp.asarray(w)}, state)
        if t == rewind_to:
            early = w
        if t % every == 0 and t <= 2 * every:
            left = [i for i in range(40) if kept.flat[i]]
            left.sort(key=lambda i: abs(float(w.flat[i])))
            goal = 40 - int(np.floor(40 * (1 - 0.75 ** (t // every)) + 0.5))
            kept = kept.copy()
            kept.flat[left[: len(left) - goal]] = False
            w = np.where(kept, early, 0)
            sizes.append(int(kept.sum()))
        np.testing.assert_array_equal(state.masks["w"][0], kept)
        np.testing.assert_array_equal(params["w"], w)
    assert sizes == [30, 22]


def test_without_a_rate_weights_are_rewound_and_not_pruned() -> None:
    scheme = jc.prune.iterative(rate=0.0, rounds=1, every=1)
    params, state = jax.jit(scheme.init)({"b": jnp.arange(4.0)})
    params, state = jax.jit(scheme.update)({"b": jnp.ones(4)}, state)
    assert params["b"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert state.masks["b"][0].all()


def test_inside_an_optimizer_weights_return_to_the_last_bit() -> None:
    scheme = jc.prune.iterative(
        rate=0.5, rounds=1, every=3, rewind_to=1, scope="global"
    )
    tx = jc.optim.attach(optax.sgd(0.5), scheme)
    params: Any = {"a": jnp.asarray(draw(6, 4)), "b": jnp.asarray(draw(5))}
    opt = jax.jit(tx.init)(params)

    def step(params: Any, opt: Any) -> tuple[Any, Any]:
        loss = lambda p: sum((w**2).sum() for w in jax.tree.leaves(p))
        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        return optax.apply_updates(params, updates), opt

    step = jax.jit(step)
    seen = [params]
    for _ in range(3):
        params, opt = step(params, opt)
        seen.append(params)
    masks = jc.optim.state(opt).masks
    assert sum(int(m.sum()) for (m,) in masks.values()) == 14
    for path, early in seen[1].items():
        expected = np.where(masks[path][0], early, 0)
        np.testing.assert_allclose(params[path], expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, r"rate .* \[0, 1\); got 1\.0"),
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"every": 0}, "every must be at least 1 update; got 0"),
        ({"rewind_to": 4}, r"rewind_to .* \[0, 4\); got 4"),
        ({"rewind_to": -1}, r"rewind_to .* \[0, 4\); got -1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"prune\.iterative: {message}"):
        jc.prune.iterative(**{"rounds": 2, "every": 4, **options})
