"""Rotations between two weights: found in the program, and without effect on it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quant import fuse_rotations
from jaxcompress.quant._fused_rotation import Pair, rotation_pairs
from tests.quant.wrapping import run

WIDTH, HEADS, LAYERS = 16, 2, 3
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)


class Attention(nn.Module):
    """Heads by reshaping; attention's own products as `jax.nn` writes them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = [nn.Dense(WIDTH, name=n)(x) for n in ("query", "key", "value")]
        heads = [p.reshape(*x.shape[:2], HEADS, -1) for p in parts]
        y = jax.nn.dot_product_attention(*heads).reshape(x.shape)
        return nn.Dense(WIDTH, use_bias=False, name="out")(y)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        y = nn.MultiHeadDotProductAttention(HEADS, name="flax")(x)
        x = x + y + Attention(name="own")(x)
        return nn.relu(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(name="layers")(x, None)[0]


def changed(before: Any, after: Any) -> set[str]:
    a, b = (jc.tree.flatten(t)[0] for t in (before, after))
    return {path for path in a if not np.array_equal(a[path], b[path])}


def test_values_are_rotated_within_heads_through_a_scan() -> None:
    model, rng = Scanned(), np.random.default_rng(2)
    shapes: Any = jax.eval_shape(model.init, KEY, X)
    filled = lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, jnp.float32)
    params = jax.tree.map(filled, shapes)
    at = "params/layers"
    assert set(rotation_pairs(model.apply, params, X)) == {
        Pair(
            f"{at}/own/value/kernel",
            (f"{at}/own/value/bias",),
            f"{at}/own/out/kernel",
            -2,
            WIDTH // HEADS,
        ),
        Pair(
            f"{at}/flax/value/kernel",
            (f"{at}/flax/value/bias",),
            f"{at}/flax/out/kernel",
            -2,
            WIDTH // HEADS,
        ),
    }

    def both(p: Any) -> Any:
        turned = fuse_rotations(model.apply, p, X, key=KEY)
        return turned, model.apply(turned, X), model.apply(p, X)

    turned, found, expected = run(both, params)
    ends = ("value/kernel", "value/bias", "out/kernel")
    assert changed(params, turned) == {
        f"{at}/{m}/{e}" for m in ("own", "flax") for e in ends
    }
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_an_outlier_is_spread_and_both_weights_round_better() -> None:
    rng = np.random.default_rng(1)
    v, o = rng.normal(size=(WIDTH, 32)), rng.normal(size=(32, WIDTH))
    v[:, 5] *= 30
    o[5] *= 5
    params = {"v": jnp.asarray(v, jnp.float32), "o": jnp.asarray(o, jnp.float32)}
    fn = lambda p, x: ((x @ p["v"]) * 2.0).astype(jnp.float32).mT.mT @ p["o"]
    int4 = {"v": jc.quant.int4(granularity=jc.quant.PerTensor()), "o": jc.quant.int4()}

    def outputs(p: Any) -> Any:
        turned = fuse_rotations(fn, p, X, key=KEY)
        rounded = lambda p: jc.lift(fn)(jc.compress(p, int4), X)
        return fn(p, X), fn(turned, X), rounded(p), rounded(turned)

    exact, same, plain, found = run(outputs, params)
    np.testing.assert_allclose(same, exact, rtol=1e-3, atol=2e-2)
    error = lambda y: np.square(y - exact).mean()
    assert error(found) < error(plain) / 3


def unequal(p: Any, x: jax.Array) -> jax.Array:
    return nn.relu(x @ p["v"]) @ p["o"]


def used_twice(p: Any, x: jax.Array) -> jax.Array:
    y = x @ p["v"]
    return y @ p["o"] + y


def shared(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["v"]) @ p["o"] + x @ p["v"]


def contracted_elsewhere(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("btk,tk->bk", x @ p["v"], p["o"])


def batched(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("btk,sk->bts", (x @ p["v"]) * x[..., :1], p["o"])


def added_along_time(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["v"] + p["b"][None, :, None]) @ p["o"]


def moved_then_scanned(p: Any, x: jax.Array) -> jax.Array:
    step = lambda y, b: ((y @ p["v"] + b[None]) @ p["o"], None)
    along_time = jnp.broadcast_to(p["b"][:, None], (1, WIDTH, WIDTH))
    return jax.lax.scan(step, x, along_time)[0]


def squared(p: Any, x: jax.Array) -> jax.Array:
    y = x[0] @ p["v"]
    return (y @ y) @ p["o"]


def handed_on(p: Any, x: jax.Array) -> jax.Array:
    step = lambda y, w: (y @ w, None)
    return jax.lax.scan(step, x @ p["v"], p["o"][None])[0]


REFUSED = [
    unequal,
    used_twice,
    shared,
    contracted_elsewhere,
    batched,
    added_along_time,
    moved_then_scanned,
    squared,
    handed_on,
]


@pytest.mark.parametrize("fn", REFUSED)
def test_what_a_rotation_would_change_is_refused(fn: Any) -> None:
    params = {"v": jnp.eye(WIDTH), "o": jnp.eye(WIDTH), "b": jnp.ones(WIDTH)}
    x = jnp.ones((2, WIDTH, WIDTH))
    with pytest.raises(ValueError, match="no weight's output reaches another"):
        fuse_rotations(fn, params, x, key=KEY)


def test_a_compressed_weight_is_refused_by_path() -> None:
    params = {"v": jc.quant.quantize(jnp.eye(WIDTH), jc.quant.int8()), "o": jnp.eye(16)}
    with pytest.raises(TypeError, match=r"v must be an array.*Rotate first"):
        fuse_rotations(lambda p, x: (x @ p["v"]) @ p["o"], params, X, key=KEY)
