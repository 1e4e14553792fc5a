"""When quantization begins, when ranges freeze, which layers are the ends."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q

W8A8 = jc.presets.W8A8


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("fmt", [q.int3(), W8A8], ids=lambda f: f.name)
def test_a_delayed_rule_is_dense_before_and_stored_from_its_step_on(
    fmt: q.NumberFormat,
) -> None:
    scheme = q.delayed(fmt.replace(axes=-2), begin=1)
    w, x = draw(2, 6, 6), draw(3, 6, seed=1)
    params, state = scheme.init({"w": w})
    layer = lambda x, w: (jax.nn.relu(x @ w), None)
    fn = lambda p, x: jax.lax.scan(layer, x, p["w"])[0]
    run = jc.lift(fn)

    @jax.jit
    def seen(params: Any, state: Any) -> Any:
        loss = lambda p: run(scheme.view(p, state), x).sum()
        slope = jax.grad(loss)(params)["w"]
        packed = scheme.compress(params, state)
        return run(scheme.view(params, state), x), run(packed, x), slope

    before, stored, slope = seen(params, state)
    np.testing.assert_allclose(before, fn(params, x), atol=1e-6)
    dense = jax.jit(jax.grad(lambda p: fn(p, x).sum()))(params)["w"]
    np.testing.assert_allclose(slope, dense, atol=1e-5)
    assert jnp.abs(before - stored).max() > 1e-4
    params, state = jax.jit(scheme.update)(params, state)
    after, stored, slope = seen(params, state)
    np.testing.assert_array_equal(after, stored)
    assert jnp.abs(slope).max() > 0


def test_updates_of_a_delayed_rule_wait_too() -> None:
    inner = q.weights(q.int4(rounding="stochastic"), key=jax.random.key(0))
    scheme = jc.chain(jc.prune.magnitude(sparsity=0.5), q.delayed(inner, begin=2))
    params, state = scheme.init({"w": draw(4, 4)})
    update = jax.jit(scheme.update)
    steps = []
    for _ in range(4):
        steps.append((int(state[1].step), int(state[1].inner.step)))
        params, state = update(params, state, grads=params)
    assert steps == [(0, 0), (1, 0), (2, 0), (3, 1)]
    view = np.asarray(jc.materialize(jax.jit(scheme.view)(params, state))["w"])
    assert (view == 0).sum() >= 8


@pytest.mark.parametrize(
    "fmt", [q.int4(), q.int4(symmetric=False), q.fp4_e2m1()], ids=lambda f: f.name
)
def test_ranges_follow_the_weights_and_then_stay(fmt: q.NumberFormat) -> None:
    scheme = q.frozen_ranges(fmt.replace(clip_gradient=True), after=1)
    w = draw(8, 3)
    _, state = jax.jit(scheme.init)({"w": w})
    update, compress = jax.jit(scheme.update), jax.jit(scheme.compress)
    plain = jax.jit(lambda w: q.quantize(w, fmt))
    first, state = update({"w": 2 * w}, state)
    np.testing.assert_array_equal(
        compress(first, state)["w"].materialize(), plain(2 * w).materialize()
    )
    later, state = update({"w": 8 * w}, state)
    packed = compress(later, state)["w"]
    np.testing.assert_array_equal(packed.scale, plain(2 * w).scale)
    view = lambda p: jc.materialize(scheme.view(p, state))["w"]
    np.testing.assert_array_equal(jax.jit(view)(later), packed.materialize())
    slope = np.asarray(jax.jit(jax.grad(lambda p: view(p).sum()))(later)["w"])
    assert set(np.unique(slope)) == {0.0, 1.0}
    assert (slope.min(0) == 0).all()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="stem")(x)
        for name, momentum in (("one", 0.9), ("two", 0.99)):
            x = nn.Conv(4, (3, 3), name=name)(x)
            x = nn.BatchNorm(
                use_running_average=not train, momentum=momentum, name=f"norm_{name}"
            )(x)
            x = nn.relu(x)
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@functools.cache
def variables() -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 4, 4, 2)))


def apply(v: Any, x: jax.Array, train: bool = True) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return Net().apply(v, x, train=train, mutable=["batch_stats"])


def test_the_first_and_last_matmul_get_a_rule_of_their_own() -> None:
    v = variables()
    rules = q.first_and_last(apply, v, draw(2, 4, 4, 2), inner=q.int4())
    names = {path.split("/")[1]: fmt.name for path, fmt in rules.items()}
    assert names == {"stem": "int8", "one": "int4", "two": "int4", "head": "int8"}
    packed = jc.compress(v, rules, fn=apply, example=draw(2, 4, 4, 2))
    assert packed["params"]["stem"]["kernel"].method == "int8"
    other = q.first_and_last(
        lambda p, x: x @ p["w"], {"w": draw(2, 2)}, draw(1, 2), inner=1, outer=2
    )
    assert other == {"w": 2}
    with pytest.raises(ValueError, match="no matmul with a weight"):
        q.first_and_last(lambda p, x: x, {"w": draw(2)}, draw(2), inner=q.int4())


def test_batch_statistics_are_the_mean_over_batches_of_the_compressed_model() -> None:
    v = variables()
    rules = {"params/one/kernel": q.int2(axes=(-4, -3, -2))}
    packed = jc.compress(v, rules)
    batches = [draw(3, 4, 4, 2, seed=i) for i in range(3)]
    found = q.recalibrate_batch_norm(apply, packed, iter(batches))
    assert found["params"]["one"]["kernel"] is packed["params"]["one"]["kernel"]
    dense = jc.materialize(packed)
    for name, source in (("one", "stem"), ("two", "norm_one")):
        means, variances = [], []
        for x in batches:
            h = conv(np.asarray(x), dense["params"]["stem"])
            h = conv(h, dense["params"]["one"])
            if source == "norm_one":
                norm = (h - h.mean((0, 1, 2))) / np.sqrt(h.var((0, 1, 2)) + 1e-5)
                h = conv(np.maximum(norm, 0), dense["params"]["two"])
            means.append(h.mean((0, 1, 2)))
            variances.append(h.var((0, 1, 2)))
        stats = found["batch_stats"][f"norm_{name}"]
        np.testing.assert_allclose(stats["mean"], np.mean(means, 0), atol=1e-4)
        np.testing.assert_allclose(stats["var"], np.mean(variances, 0), rtol=1e-3)


def conv(x: np.ndarray, layer: Any) -> np.ndarray:
    """A convolution of 3 by 3 with zero padding, in loops."""
    k = np.asarray(layer["kernel"], np.float64)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], k.shape[-1])) + np.asarray(layer["bias"])
    for i in range(3):
        for j in range(3):
            part = padded[:, i : i + x.shape[1], j : j + x.shape[2]]
            out += part @ k[i, j]
    return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.delayed(q.int4(), begin=-1), "got -1"),
        (lambda: q.frozen_ranges(q.int4(), after=-1), "got -1"),
        (lambda: q.frozen_ranges(q.nvfp4(), after=1), "float scales"),
        (lambda: q.frozen_ranges(q.ternary(), after=1), "float scales"),
        (
            lambda: q.frozen_ranges(q.int4(rounding="stochastic"), after=1),
            "not be stochastic",
        ),
        (
            lambda: q.recalibrate_batch_norm(apply, {"batch_stats": {}}, []),
            "batches is empty",
        ),
        (
            lambda: q.recalibrate_batch_norm(apply, {"params": {}}, []),
            "must have the collection 'batch_stats'",
        ),
        (
            lambda: q.recalibrate_batch_norm(
                lambda v, x: apply(v, x, train=False), variables(), [draw(1, 4, 4, 2)]
            ),
            "batch_stats/norm_one/mean does not change",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
