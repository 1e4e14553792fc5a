"""`kmeans`: clusters in training, beside masks, on a net."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress.codebook import CodebookArray, kmeans

AXES = {"w": jc.Axes(contract=(-2,))}


def weight(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def scheme(rule: Any) -> jc.Transform:
    return jc.select({"w": rule}, axes=AXES)


def test_gradients_are_summed_by_value_and_spare_the_weight() -> None:
    rule = scheme(kmeans(bits=3))
    params, state = rule.init({"w": weight(24, 10)})
    dy = weight(24, 10, seed=1)
    loss = lambda p: (jc.materialize(rule.view(p, state))["w"] * dy).sum()
    grads = jax.grad(loss)(params)["w"]
    codes = np.asarray(state[0].state.codes["w"][0])[:, 0].T
    wanted = [np.asarray(dy, np.float64)[codes == i].sum() for i in range(8)]
    np.testing.assert_allclose(grads.codebooks.ravel(), wanted, rtol=1e-4)
    assert not grads.latent.any()


def test_pruned_weights_stay_zero_and_have_no_part_in_the_clusters() -> None:
    rule = scheme(jc.chain(jc.prune.magnitude(sparsity=0.9), kmeans(bits=4)))
    w = {"w": weight(64, 40)}
    packed = rule.compress(*rule.init(w))["w"]
    dense = np.asarray(packed.materialize())
    kept = np.sort(np.abs(np.asarray(w["w"])).ravel())[-256:].min()
    assert isinstance(packed, jc.prune.BitmaskArray)
    assert isinstance(packed.frame, CodebookArray)
    assert np.count_nonzero(dense) == 256
    values = np.unique(dense[dense != 0])
    assert len(values) == 16
    assert (np.abs(values) >= kept).all()
    assert packed.stored_bytes == 64 * 40 // 8 + 256 * 4 // 8 + 16 * 4


def test_trained_centroids_follow_a_loss_while_codes_and_masks_stay() -> None:
    """The wanted weights are larger than those that were clustered."""
    w, x = weight(32, 16), weight(200, 32, seed=1)
    rule = scheme(jc.chain(jc.prune.magnitude(sparsity=0.5), kmeans(bits=3)))
    apply = jc.lift(lambda p, x: x @ p["w"])
    kept = jnp.abs(w) > jnp.median(jnp.abs(w))
    y = apply({"w": jnp.where(kept, 1.5 * w, 0.0)}, x)
    params, _ = rule.init({"w": w})
    with jax.numpy_dtype_promotion("standard"):
        tx = jc.optim.attach(optax.adam(2e-2), rule)
        opt = tx.init(params)
    first = rule.compress(params, jc.optim.state(opt))

    def loss(params: Any, opt: Any) -> jax.Array:
        view = rule.view(params, jc.optim.state(opt))
        return jnp.square(apply(view, x) - y).mean()

    @jax.jit
    def step(params: Any, opt: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(jax.grad(loss)(params, opt), opt, params)
        return optax.apply_updates(params, updates), opt

    before = loss(params, opt)
    for _ in range(150):
        params, opt = step(params, opt)
    assert loss(params, opt) < 0.3 * before
    packed = rule.compress(params, jc.optim.state(opt))
    np.testing.assert_array_equal(packed["w"].mask, first["w"].mask)
    np.testing.assert_array_equal(packed["w"].elements, first["w"].elements)
    view = rule.view(params, jc.optim.state(opt))
    np.testing.assert_array_equal(apply(view, x), apply(packed, x))


def test_codebooks_are_trained_and_not_decayed() -> None:
    params, _ = scheme(kmeans(bits=2)).init({"w": weight(8, 8)})
    mask = jc.weight_decay_mask(params)["w"]
    assert not mask.codebooks
    assert mask.latent


def test_starts_differ_as_deep_compression_says() -> None:
    """A linear start gives large weights values of their own."""
    rng = np.random.default_rng(2)
    bulk = np.concatenate([rng.normal(size=4000) * 0.05, rng.uniform(2, 3, size=8)])
    w = {"w": jnp.asarray(bulk.reshape(167, 24), jnp.float32)}
    large = {}
    for init in ("linear", "density"):
        rule = scheme(kmeans(bits=4, init=init, iterations=1))
        values = np.unique(rule.compress(*rule.init(w))["w"].materialize())
        large[init] = (values > 1.5).sum()
    assert large["linear"] > large["density"]


def test_the_same_key_gives_the_same_bits_and_another_others() -> None:
    def entries(seed: int) -> np.ndarray:
        rule = scheme(kmeans(bits=4, init="kmeans++", key=jax.random.key(seed)))
        return np.asarray(rule.init({"w": weight(30, 20)})[0]["w"].codebooks)

    np.testing.assert_array_equal(entries(0), entries(0))
    assert (entries(0) != entries(1)).any()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 0}, "bits must be 1 to 8"),
        ({"bits": 4, "init": "best"}, "init must be one of"),
        ({"bits": 4, "init": "random"}, "pass key="),
        ({"bits": 4, "iterations": -1}, "iterations must not be negative"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        kmeans(**options)


def test_what_cannot_follow_clusters_is_refused_by_name() -> None:
    for later in (
        jc.prune.magnitude(sparsity=0.5),
        jc.quant.lsq(jc.quant.int4()),
        jc.presets.W8A8,
    ):
        with pytest.raises(jc.OrderError):
            scheme(jc.chain(kmeans(bits=4), later)).init({"w": weight(16, 16)})
