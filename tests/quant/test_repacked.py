"""`repack`: the same values in a chip's order, back bit for bit, and to its kernel."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.quant import _repacked, _weight_only
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.ragged_quantized_matmul import ragged_quantized_matmul
from kernels_pallas.target import Target
from tests.quant.wrapping import materialize, quantize, run

V5E = Target("tpu", "TPU v5 lite")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STACK = jc.Axes(contract=(-2,), stack=1)
HEADS = jc.Axes(contract=(-3, -2))
WEIGHTS = {
    "int4 g128": ((256, 24), q.int4(group_size=128), None),
    "uint3 g32": ((96, 24), q.int3(group_size=32, symmetric=False), None),
    "int8": ((50, 7), q.int8(), None),
    "per tensor": ((64, 8), q.int8(granularity=q.PerTensor()), None),
    "blocks": ((64, 24), q.int4(granularity=q.Block2D(out=8, contract=32)), None),
    "nf4": ((128, 24), q.nf4(), None),
    "mxfp4": ((64, 24), q.mxfp4(), None),
    "nvfp4": ((64, 24), q.nvfp4(), None),
    "mxint8": ((64, 24), q.mxint8(), None),
    "fp8": ((64, 24), q.fp8_e4m3(), None),
    "ternary": ((64, 24), q.ternary(), None),
    "stack": ((2, 64, 24), q.int4(group_size=32), STACK),
    "heads": ((4, 16, 24), q.int4(group_size=64), HEADS),
}


@functools.cache
def make() -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves, and their dense values."""

    def all_of(ws: dict[str, Any]) -> Any:
        leaves = {
            name: q.quantize(w, WEIGHTS[name][1], axes=WEIGHTS[name][2])
            for name, w in ws.items()
        }
        return leaves, jc.materialize(leaves)

    return jax.jit(all_of)(
        {
            name: normal(i, *shape)
            for i, (name, (shape, _, _)) in enumerate(WEIGHTS.items())
        }
    )


@pytest.mark.parametrize("to", ["tpu", "gpu"])
def test_the_portable_leaf_comes_back_bit_for_bit(to: str) -> None:
    leaves, dense = make()
    turned = run(lambda leaves: q.repack(leaves, to=to), leaves)
    kept = {n for n, leaf in turned.items() if not isinstance(leaf, q.RepackedArray)}
    assert kept == {"nvfp4"}  # Its groups of 16 are no kernel's.
    back, values = run(
        lambda t: (q.repack(t, to="portable"), jc.materialize(t)), turned
    )
    assert jax.tree.structure(back) == jax.tree.structure(leaves)
    jax.tree.map(np.testing.assert_array_equal, back, leaves)
    for name, value in dense.items():
        assert turned[name].shape == leaves[name].shape
        np.testing.assert_array_equal(values[name], value, err_msg=name)


def test_files_hold_the_portable_order(tmp_path: Path) -> None:
    leaf = quantize(normal(0, 64, 24), q.int4(group_size=32))
    turned = run(lambda leaf: q.repack(leaf, to="tpu"), leaf)
    jc.io.save(tmp_path / "a.jc", {"w": turned})
    loaded = jc.io.load(tmp_path / "a.jc")["w"]
    assert isinstance(loaded, q.QuantizedArray)
    jax.tree.map(np.testing.assert_array_equal, loaded, leaf)


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TPU that is not there: chosen, and interpreted."""
    for module in (_repacked, _weight_only):
        monkeypatch.setattr(module, "current_target", lambda: V5E)
    interpreted = functools.partial(quantized_matmul, target=V5E, interpret=True)
    monkeypatch.setattr(_weight_only, "quantized_matmul", interpreted)
    interpreted = functools.partial(ragged_quantized_matmul, target=V5E, interpret=True)
    monkeypatch.setattr(_weight_only, "ragged_quantized_matmul", interpreted)


@pytest.mark.usefixtures("on_tpu")
def test_lift_runs_the_kernel_on_its_device() -> None:
    shape, fmt, axes = (2, 256, 24), q.int4(group_size=128), STACK
    make = lambda w: q.repack(q.quantize(w, fmt, axes=axes), to="tpu")
    leaf = run(make, normal(1, *shape))
    x = normal(2, 3, 256)

    def fn(w: Any, x: Any) -> Any:
        step = lambda x, w: (x, x @ w)
        return jax.lax.scan(step, x, w)[1]

    assert [s.how for s in jc.explain(fn, leaf, x)] == ["int4 TPU kernel"]
    y, w = run(lambda leaf, x: (jc.lift(fn)(leaf, x), jc.materialize(leaf)), leaf, x)
    exact = np.einsum("bi,sio->sbo", x.astype(np.float64), w)
    np.testing.assert_allclose(y, exact, atol=1e-3)


@pytest.mark.usefixtures("on_tpu")
def test_experts_run_by_the_ragged_kernel_on_its_device() -> None:
    make = lambda w: q.repack(
        q.quantize(w, q.int4(group_size=128), axes=STACK), to="tpu"
    )
    leaf, x = run(make, normal(6, 2, 256, 24)), normal(7, 5, 256)
    sizes = jnp.array([3, 2], jnp.int32)
    fn = lambda w, x, n: jax.lax.ragged_dot(x, w, n)
    assert [s.how for s in jc.explain(fn, leaf, x, sizes)] == ["int4 ragged TPU kernel"]
    y, w = run(
        lambda leaf, x: (jc.lift(fn)(leaf, x, sizes), jc.materialize(leaf)), leaf, x
    )
    w, x = np.float64(w), np.float64(x)
    np.testing.assert_allclose(y, np.r_[x[:3] @ w[0], x[3:] @ w[1]], atol=1e-3)


def test_elsewhere_it_is_dequantized() -> None:
    leaf = quantize(normal(3, 256, 24), q.int4(group_size=128))
    leaf = run(lambda leaf: q.repack(leaf, to="tpu"), leaf)
    x = normal(4, 3, 256)
    fn = lambda w, x: x @ w
    assert [s.how for s in jc.explain(fn, leaf, x)] == ["dequantized dot"]
    y = run(jc.lift(fn), leaf, x)
    np.testing.assert_allclose(y, x @ np.asarray(materialize(leaf)), atol=1e-4)


def test_quantized_activations_stay_with_xla() -> None:
    leaf = jc.compress({"w": jnp.asarray(normal(5, 64, 24))}, {"w": jc.presets.W8A8})
    assert q.repack(leaf, to="tpu")["w"] is leaf["w"]


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(ValueError, match=r"repack: to must be one of.*got 'npu'"):
        q.repack({}, to="npu")
