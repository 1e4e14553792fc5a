"""Folding, equalization and bias correction on a small convolutional net."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.quant import batch_norms, correct_bias, equalize, fold_batch_norm
from tests.quant.wrapping import run


class Net(nn.Module):
    """Two convolutions with batch norm, one of which has a bias, and a Dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, bias in enumerate((False, True)):
            x = nn.Conv(8, (3, 3), use_bias=bias, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(True, name=f"bn{i}")(x))
        return nn.Dense(4, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def net() -> Any:
    model, rng = Net(), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)
    variables = run(model.init, jax.random.key(0), x)
    fill = lambda a: jnp.asarray(rng.uniform(0.5, 2.0, a.shape), jnp.float32)
    flat, structure = jc.tree.flatten(variables)
    kernels = {p: w for p, w in flat.items() if p.endswith("kernel")}
    flat = {p: fill(w) for p, w in flat.items()} | kernels
    return model.apply, jc.tree.unflatten(structure, flat), x


def test_every_norm_is_found_with_its_kernel(net: Any) -> None:
    apply, variables, x = net
    found = [(n.kernel, n.bias, n.scale) for n in batch_norms(apply, variables, x)]
    assert found == [
        ("params/conv0/kernel", None, "params/bn0/scale"),
        ("params/conv1/kernel", "params/conv1/bias", "params/bn1/scale"),
    ]


def test_a_folded_norm_changes_nothing_and_is_the_formula(net: Any) -> None:
    apply, variables, x = net
    folded = fold_batch_norm(apply, variables, x)
    found, expected = run(lambda *v: [apply(t, x) for t in v], folded, variables)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    flat = {p: np.float64(w) for p, w in jc.tree.flatten(variables)[0].items()}
    gain = flat["params/bn1/scale"] / np.sqrt(flat["batch_stats/bn1/var"] + 1e-5)
    np.testing.assert_allclose(
        folded["params"]["conv1"]["kernel"],
        flat["params/conv1/kernel"] * gain,
        rtol=1e-5,
    )
    shift = flat["params/conv1/bias"] - flat["batch_stats/bn1/mean"]
    np.testing.assert_allclose(
        folded["params"]["bn1"]["bias"],
        flat["params/bn1/bias"] + shift * gain,
        rtol=1e-5,
        atol=1e-5,
    )
    assert not folded["params"]["conv1"]["bias"].any()


def test_equalized_layers_compute_the_same_from_equal_ranges(net: Any) -> None:
    apply, variables, x = net
    folded = fold_batch_norm(apply, variables, x)
    scale = jnp.logspace(-2, 2, 8)
    folded["params"]["conv0"]["kernel"] *= scale.reshape(1, 1, 1, 8)
    folded["params"]["bn0"]["bias"] *= scale
    folded["params"]["conv1"]["kernel"] /= scale.reshape(1, 1, 8, 1)
    even = equalize(apply, folded, x)
    found, expected = run(lambda *v: [apply(t, x) for t in v], even, folded)
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    out = jnp.abs(even["params"]["conv0"]["kernel"]).max((0, 1, 2))
    into = jnp.abs(even["params"]["conv1"]["kernel"]).max((0, 1, 3))
    np.testing.assert_allclose(out, into, rtol=1e-3)
    rules = {"**/conv*/kernel": jc.quant.int8(granularity=jc.quant.PerTensor())}

    def errors(*trees: Any) -> list[jax.Array]:
        expected = apply(trees[0], x)
        packed = [jc.compress(t, rules, fn=apply, example=x) for t in trees]
        outputs = [apply(jc.materialize(p), x) for p in packed]
        return [jnp.square(y - expected).mean() for y in outputs]

    uneven, evened = run(errors, folded, even)
    assert evened < 0.1 * uneven


def test_corrected_biases_take_out_the_mean_error(net: Any) -> None:
    apply, variables, x = net
    rules = {"params/**/kernel": jc.quant.int3()}
    compress = lambda v: jc.compress(v, rules, fn=apply, example=x)
    packed = run(compress, variables)
    corrected = correct_bias(apply, variables, packed, [x])
    stats = jc.calibrate(apply, variables, [x])
    kernel = variables["params"]["head"]["kernel"]
    off = packed["params"]["head"]["kernel"].materialize() - kernel
    np.testing.assert_allclose(
        corrected["params"]["head"]["bias"],
        variables["params"]["head"]["bias"] - stats["params/head/kernel"].mean @ off,
        rtol=1e-5,
        atol=1e-6,
    )

    def errors(*trees: Any) -> list[jax.Array]:
        expected = apply(variables, x)
        return [jnp.square(jc.lift(apply)(t, x) - expected).mean() for t in trees]

    before, after = run(errors, packed, corrected)
    assert after < 0.5 * before


def test_nothing_to_do_is_an_error() -> None:
    w = {"w": jnp.ones((4, 4))}
    fn = lambda p, x: x @ p["w"]
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="no batch norm with running statistics"):
        fold_batch_norm(fn, w, x)
    with pytest.raises(ValueError, match="no kernel's output reaches"):
        equalize(fn, w, x)
    packed = jc.compress(w, {"w": jc.quant.int8()})
    with pytest.raises(ValueError, match="no bias is added"):
        correct_bias(fn, w, packed, [x])
