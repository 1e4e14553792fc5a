"""soft_assignment: the mixture, its sharpening, its gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

soft = functools.partial(
    jc.codebook.soft_assignment,
    dims=2,
    bits=2,
    key=jax.random.key(0),
    iterations=4,
)


@functools.cache
def weight() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(7, 6)), jnp.float32)


def view(scheme: jc.Transform, params: Any, state: Any) -> np.ndarray:
    return np.asarray(scheme.view(params, state)["w"].materialize())


def test_the_view_is_the_mixture_of_all_entries() -> None:
    scheme = soft(sharpness=3.0, end=5)
    params, state = scheme.init({"w": weight()})
    table = np.asarray(params["w"].codebooks, np.float64)[0, 0]
    unit = 3.0 / np.square(table).mean()
    wanted = np.zeros((8, 6))
    w = np.pad(np.asarray(weight(), np.float64), ((0, 1), (0, 0)))
    for o in range(6):
        for s in range(4):
            v = w[2 * s : 2 * s + 2, o]
            share = np.exp(-unit * np.square(table - v).sum(1))
            wanted[2 * s : 2 * s + 2, o] = share @ table / share.sum()
    np.testing.assert_allclose(view(scheme, params, state), wanted[:7], atol=1e-5)


def test_it_sharpens_to_what_is_stored_and_ends_there() -> None:
    scheme = soft(sharpness=jc.schedules.linear(1.0, 200.0, begin=0, end=2), end=3)
    params, state = scheme.init({"w": weight()})
    stored = np.asarray(scheme.compress(params, state)["w"].materialize())
    off = []
    for _ in range(4):
        off.append(np.square(view(scheme, params, state) - stored).sum())
        params, state = scheme.update(params, state)
    assert off[0] > 4 * off[2] > 0
    assert off[3] == 0


def test_gradients_reach_weights_and_entries_and_then_entries_alone() -> None:
    scheme = soft(sharpness=2.0, end=1)
    params, state = scheme.init({"w": weight()})

    def loss(params: Any, state: Any) -> jax.Array:
        return jnp.sum(scheme.view(params, state)["w"].materialize() ** 2)

    leaf = jax.grad(loss)(params, state)["w"]
    assert leaf.latent.any()
    assert leaf.codebooks.any()
    direction = jax.tree.map(
        lambda a: jnp.asarray(np.random.default_rng(1).normal(size=a.shape), a.dtype),
        params,
    )
    step = lambda t: jax.tree.map(lambda a, b: a + t * b, params, direction)
    measured = (loss(step(1e-2), state) - loss(step(-1e-2), state)) / 2e-2
    pairs = zip(jax.tree.leaves(direction), (leaf.latent, leaf.codebooks), strict=True)
    assert float(sum((a * b).sum() for a, b in pairs)) == pytest.approx(
        float(measured), rel=2e-2
    )
    _, state = scheme.update(params, state)
    leaf = jax.grad(loss)(params, state)["w"]
    assert not leaf.latent.any()
    assert leaf.codebooks.any()


def test_training_a_step_keeps_the_leaf() -> None:
    scheme = soft(sharpness=2.0, end=1)
    params, _ = scheme.init({"w": weight()})
    assert scheme.init(params)[0]["w"] is params["w"]
    trainable, _ = jc.partition(params)
    assert {a.shape for a in jax.tree.leaves(trainable)} == {(7, 6), (1, 1, 4, 2)}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"sharpness": 0.0, "end": 1}, "sharpness must be positive; got 0"),
        ({"sharpness": 1.0, "end": -1}, "end must not be negative"),
        ({"sharpness": 1.0, "end": 1, "bits": 0}, "bits must be from 1 to 8"),
    ],
)
def test_errors_name_the_rule(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        soft(**options)
