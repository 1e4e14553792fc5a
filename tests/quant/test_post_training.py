"""Whole models through the sweep, by each algorithm."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import quant
from jaxcompress.lift import Layer
from tests.lift.programs import mesh
from tests.quant.wrapping import run


class Net(nn.Module):
    """An embedding, and scanned layers."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
                y = nn.relu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))
                return x + nn.Dense(16, name="down")(y), None

        scan = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x = nn.Embed(32, 16, name="embed")(tokens)
        return scan(name="block")(x, None)[0]


@pytest.fixture(scope="module")
def net() -> Any:
    model, rng = Net(), np.random.default_rng(0)
    batches = [jnp.asarray(rng.integers(0, 32, (8, 16)), jnp.int32) for _ in range(2)]
    params = run(model.init, jax.random.key(0), batches[0])
    # Some channels of the layer norms are loud.
    gain = jnp.where(jnp.arange(16) % 8 == 3, 20.0, 1.0)
    loud = lambda a: a * jnp.broadcast_to(gain, a.shape)
    flat, structure = jc.tree.flatten(params)
    flat = {p: loud(a) if p.endswith("scale") else a for p, a in flat.items()}
    return model.apply, jc.tree.unflatten(structure, flat), batches


RULES = {"**/kernel": quant.int3(), "**/embedding": quant.int8()}
W8A8 = {"**/kernel": jc.presets.W8A8}


def error(net: Any, packed: Any) -> float:
    apply, params, batches = net

    def relative(params: Any, packed: Any, x: jax.Array) -> jax.Array:
        expected = apply(params, x)
        off = jc.lift(apply)(packed, x) - expected
        return jnp.square(off).mean() / jnp.square(expected).mean()

    return float(run(relative, params, packed, batches[0]))


@pytest.fixture(scope="module")
def rounded(net: Any) -> Any:
    """Errors by rounding, of the weights alone and with activations."""
    rounding = functools.partial(quant.post_training, core=quant.round_weight)
    return {
        name: error(net, rounding(*net, rules=rules))
        for name, rules in (("weights", RULES), ("activations", W8A8))
    }


@pytest.mark.parametrize(
    ("method", "what", "factor"),
    [
        (functools.partial(quant.gptq, reference=True), "weights", 0.4),
        pytest.param(
            functools.partial(quant.adaround, iterations=200),
            "weights",
            0.8,
            marks=pytest.mark.slow,
        ),
        (quant.awq, "weights", 0.8),
        pytest.param(
            functools.partial(quant.awq, base=quant.gptq_weight),
            "weights",
            0.6,
            marks=pytest.mark.slow,
        ),
        (quant.smoothquant, "activations", 0.8),
    ],
)
def test_every_algorithm_beats_rounding(
    net: Any, rounded: Any, method: Any, what: str, factor: float
) -> None:
    packed = method(*net, rules=RULES if what == "weights" else W8A8)
    assert error(net, packed) < factor * rounded[what]


def test_static_activations_take_their_scale_from_the_sweep(net: Any) -> None:
    rules = {"**/kernel": jc.presets.FP8}
    for core in (quant.round_weight, quant.gptq_weight):
        packed = quant.post_training(*net, rules=rules, core=core)
        kernel = packed["params"]["block"]["up"]["kernel"]
        assert kernel.activation_scale.size == 2
        assert error(net, packed) < 0.01


@pytest.fixture(scope="module")
def by_gptq(net: Any) -> tuple[Any, list[Layer]]:
    layers: list[Layer] = []
    return quant.gptq(*net, rules=RULES, on_layer=layers.append), layers


def test_gptq_beats_rounding(net: Any, rounded: Any, by_gptq: Any) -> None:
    assert error(net, by_gptq[0]) < 0.6 * rounded["weights"]


def test_sharded_batches_give_the_same_codes(net: Any, by_gptq: Any) -> None:
    apply, params, batches = net
    sharding = NamedSharding(mesh(), P("d"))
    split = [jax.device_put(b, sharding) for b in batches]
    packed = quant.gptq(apply, params, split, rules=RULES)
    for path, leaf in jc.tree.flatten(packed)[0].items():
        if isinstance(leaf, quant.QuantizedArray):
            expected = jc.tree.flatten(by_gptq[0])[0][path]
            np.testing.assert_array_equal(leaf.codes(), expected.codes())
            np.testing.assert_allclose(leaf.scales(), expected.scales(), rtol=1e-4)


def test_the_log_says_the_error_before_and_after(by_gptq: Any) -> None:
    layers = by_gptq[1]
    swept = [x for x in layers if x.error is not None and x.error_before is not None]
    assert len(swept) == 4
    assert all(x.error < x.error_before for x in swept)
    assert str(layers[0]) == "params/embed/embedding: int8, without data"
    assert "params/block/up/kernel[0]: int3, relative output error" in str(layers[1])
