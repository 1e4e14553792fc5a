"""Presets do what the field means by their names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q

INT8 = q.Integer(bits=8)

MEANINGS = {
    "W8A16": q.int8(),
    "W4A16": q.int4(group_size=128),
    "W8A8": q.int8(activations=q.dynamic(INT8, per="token")),
    "W4A8": q.int4(activations=q.dynamic(INT8, per="token")),
    "FP8": q.fp8_e4m3(activations=q.static(q.E4M3)),
    "FP8_DYNAMIC": q.fp8_e4m3(activations=q.dynamic(q.E4M3, per="token")),
    "MXFP4": q.mxfp4(),
    "NVFP4": q.nvfp4(),
}


def test_every_preset_has_a_meaning() -> None:
    public = {name for name in vars(jc.presets) if name.isupper() and name[0] != "_"}
    assert public - {"E4M3"} == set(MEANINGS)


@pytest.mark.parametrize("name", MEANINGS)
def test_a_preset_is_the_format_of_its_name(name: str) -> None:
    assert getattr(jc.presets, name) == MEANINGS[name]


@pytest.mark.parametrize(
    ("name", "how", "bits_per_weight", "error"),
    [
        ("W8A16", "dequantized dot", 8 + 32 / 128, 0.01),
        ("W4A16", "dequantized dot", 4 + 32 / 128, 0.15),
        ("W8A8", "int8 dot", 8 + 32 / 128, 0.015),
        ("W4A8", "int8 dot", 4 + 32 / 128, 0.15),
        ("FP8", "fake-quantized dot", 8 + (32 + 32 / 6) / 128, 0.05),
        ("FP8_DYNAMIC", "fake-quantized dot", 8 + 32 / 128, 0.05),
        ("MXFP4", "dequantized dot", 4 + 8 / 32, 0.15),
        ("NVFP4", "dequantized dot", 4 + 8 / 16 + 32 / 768, 0.12),
    ],
)
def test_a_model_runs_on_what_a_preset_stores(
    name: str, how: str, bits_per_weight: float, error: float
) -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(128, 6)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, 128)), jnp.float32)
    fmt = getattr(jc.presets, name)
    scale = 0.02 if name == "FP8" else None
    pack = lambda w: {"w": q.quantize(w, fmt, activation_scale=scale)}
    model = lambda p, x: x @ p["w"]
    packed = jax.eval_shape(pack, w)
    assert packed["w"].stored_bytes * 8 / w.size == pytest.approx(bits_per_weight)
    (site,) = jc.explain(model, packed, x)
    assert site.how == how
    exact = np.float64(x) @ np.float64(w)
    found = jax.jit(lambda w, x: jc.lift(model)(pack(w), x))(w, x)
    assert np.linalg.norm(found - exact) < error * np.linalg.norm(exact)
