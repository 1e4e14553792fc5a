"""Whole layers: found in the trace, measured, merged and removed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune

RNG = np.random.default_rng(2)
WIDTH = 4


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "enter": normal(3, WIDTH),
    **{
        f"layer{i}": {
            "norm": normal(WIDTH),
            "up": normal(WIDTH, 6),
            "down": normal(6, WIDTH) / 3,
        }
        for i in range(4)
    },
    "leave": normal(WIDTH, 2),
}
X = normal(5, 3)


def before(p: Any, h: jax.Array) -> jax.Array:
    """Normalized first: the branch is added to what was not."""
    y = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True)) * p["norm"][None]
    return h + jnp.tanh(y @ p["up"]) @ p["down"]


def after(p: Any, h: jax.Array) -> jax.Array:
    """Normalized last."""
    y = h + jnp.tanh(h @ p["up"]) @ p["down"]
    return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True)) * p["norm"][None]


def model(layer: Any, left: tuple[int, ...]) -> Any:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["enter"]
        for i in left:
            h = layer(p[f"layer{i}"], h)
        return h @ p["leave"]

    return fn


LAYERS = {
    "before": before,
    "after": after,
    "jit": jax.jit(before),
    "checkpoint": jax.checkpoint(after),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("gone", [(1,), (0, 2), (2, 3)], ids=str)
def test_the_layers_left_are_the_model(layer: Any, gone: tuple[int, ...]) -> None:
    fn = model(layer, (0, 1, 2, 3))
    paths = [f"layer{i}" for i in gone]
    fewer = prune.remove_layers(fn, PARAMS, paths, X)
    assert set(fewer.params) == set(PARAMS) - set(paths)
    x = normal(7, 3)
    found = jax.jit(fewer.fn)(fewer.params, x)
    left = tuple(i for i in range(4) if i not in gone)
    np.testing.assert_allclose(found, model(layer, left)(PARAMS, x), atol=1e-4)


def test_a_model_that_is_jitted_whole_is_entered() -> None:
    fn = jax.jit(model(before, (0, 1, 2, 3)))
    fewer = prune.remove_layers(fn, PARAMS, ["layer1"], X)
    expected = model(before, (0, 2, 3))(PARAMS, X)
    np.testing.assert_allclose(fewer.fn(fewer.params, X), expected, atol=1e-4)


def test_influence_is_how_much_a_layer_turns_its_input() -> None:
    fn = model(before, (0, 1, 2, 3))
    paths = [f"layer{i}" for i in range(4)]
    found = prune.layer_influence(fn, PARAMS, paths, [(X,), (normal(5, 3),)])
    assert list(found) == paths
    h = np.asarray(X @ PARAMS["enter"], np.float64)
    one = prune.layer_influence(fn, PARAMS, paths, [(X,)])
    for i in range(4):
        y = np.asarray(before(PARAMS[f"layer{i}"], jnp.asarray(h, jnp.float32)), float)
        cosine = (h * y).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(one[f"layer{i}"], 1 - cosine.mean(), atol=1e-5)
        h = y


def test_merged_layers_lie_between() -> None:
    merged = prune.merge_layers(PARAMS, "layer1", "layer2", weight=0.25)
    expected = 0.75 * PARAMS["layer1"]["up"] + 0.25 * PARAMS["layer2"]["up"]
    np.testing.assert_allclose(merged["layer1"]["up"], expected, rtol=1e-6)
    assert merged["layer2"]["up"] is PARAMS["layer2"]["up"]
    with pytest.raises(ValueError, match="must have the same params"):
        prune.merge_layers(PARAMS, "layer1", "enter")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layer9", r"no params are below 'layer9'"),
        ("enter", "not one part of the program with one value in"),
        ("layer1/up", "not one part of the program with one value in"),
    ],
)
def test_what_is_no_layer_is_named(path: str, message: str) -> None:
    fn = model(before, (0, 1, 2, 3))
    with pytest.raises(ValueError, match=message):
        prune.remove_layers(fn, PARAMS, [path], X)
