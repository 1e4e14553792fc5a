"""The operations inside `jax.shard_map`: outputs cut over devices, inputs summed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.scaled_matmul import int8_matmul
from tests.kernels.weights import FORMATS, random_weight

N, K, DEVICES = 16, 64, 2


def shard(fn: Any, specs: Any, out: Any) -> Any:
    mesh = jax.make_mesh(
        (DEVICES,), ("d",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out))


@pytest.fixture(scope="module")
def case() -> tuple[np.ndarray, Weight, np.ndarray]:
    rng = np.random.default_rng(0)
    weight, dense = random_weight(rng, FORMATS["int4"], N, K, 2)
    return rng.normal(size=(3, K)).astype(np.float32), weight, dense


def test_outputs_cut_over_devices(case: Any) -> None:
    x, weight, dense = case
    cut = Weight(P("d"), P("d"), None)
    for run, atol in ((quantized_matmul, 1e-4), (int8_matmul, 1.0)):
        fn = lambda x, w, run=run: run(x, w, FORMATS["int4"])
        y = shard(fn, (P(), cut), P(None, "d"))(x, weight)
        np.testing.assert_array_equal(y, jax.jit(fn)(x, weight))
        np.testing.assert_allclose(y, x @ dense.T, atol=atol)


def test_inputs_cut_over_devices_are_summed(case: Any) -> None:
    x, weight, dense = case
    cut = Weight(P(None, "d"), P(None, "d"), None)

    def fn(x: Any, w: Weight) -> Any:
        return jax.lax.psum(quantized_matmul(x, w, FORMATS["int4"]), "d")

    def loss(x: Any, w: Weight) -> Any:
        return jnp.sin(shard(fn, (P(None, "d"), cut), P())(x, w)).sum()

    np.testing.assert_allclose(
        shard(fn, (P(None, "d"), cut), P())(x, weight), x @ dense.T, atol=1e-4
    )
    gradient = jax.jit(jax.grad(loss))(jnp.asarray(x), weight)
    wanted = np.cos(x.astype(np.float64) @ dense.T) @ dense
    np.testing.assert_allclose(gradient, wanted, atol=1e-3)
