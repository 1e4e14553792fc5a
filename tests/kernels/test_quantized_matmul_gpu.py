"""The H200 kernel of `quantized_matmul`, interpreted, against float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from kernels_pallas import _gpu_words, layouts
from kernels_pallas.formats import FP8_E4M3, Format, Integer, Table
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul import gpu
from kernels_pallas.quantized_matmul._gpu_config import (
    SHARED_MEMORY,
    Config,
    config_for,
    shared_memory,
)
from tests.kernels.weights import FORMATS, random_weight

plgpu: Any = mosaic_gpu
needs_mosaic = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Mosaic GPU needs jax 0.11"
)
N = 70


class Case(NamedTuple):
    fmt: str
    m: int
    k: int
    groups: int
    dtype: Any = jnp.bfloat16
    config: Config | None = None


SMALL = Config(tile_m=8, tile_k=128, strips=1, splits=2, stages=2)
"""More steps than stages: buffers are used again."""
HALVES = Config(tile_m=16, tile_k=64, strips=2, splits=1, stages=2, split_k=2)
CASES = (
    Case("int4", m=3, k=131, groups=1),
    Case("int4", m=8, k=512, groups=4, config=SMALL),
    Case("uint4", m=17, k=131, groups=1, config=HALVES),
    Case("uint3", m=1, k=128, groups=4),
    Case("int3", m=17, k=128, groups=2, dtype=jnp.float32),
    Case("int8", m=1, k=384, groups=3, config=SMALL),
    Case("uint8", m=8, k=131, groups=1, dtype=jnp.float16),
    Case("int2", m=3, k=128, groups=1, dtype=jnp.float16),
    Case("nf4", m=1, k=130, groups=1),
    Case("fp4_e2m1", m=3, k=128, groups=4, dtype=jnp.float16),
    Case("fp8_e4m3", m=17, k=128, groups=1),
    Case("fp8_e5m2", m=3, k=128, groups=2),
)


def packed(weight: Weight, fmt: Format, k: int) -> Weight:
    n = weight.words.shape[0]
    return layouts.repack(weight, fmt, n=n, k=k, to=layouts.GPU)


def rounding(fmt: Format, dtype: Any) -> float:
    """Relative error of a decoded weight and of the terms of x."""
    terms = 2.0**-17 if dtype == jnp.float32 else 0.0
    kept = {jnp.float16: 11}.get(dtype, 8)
    return terms + (2.0**-kept if isinstance(fmt, Table) else 0.0)


def bound(x: np.ndarray, weight: Weight, dense: np.ndarray, relative: float) -> Any:
    """Of float32 sums of products and, apart from them, of zero points times x."""
    k = x.shape[1]
    size = np.abs(dense)
    if weight.zero is not None:
        scale = np.repeat(np.asarray(weight.scale), k // weight.scale.shape[1], axis=1)
        largest = np.abs(np.asarray(weight.zero)).max() + 256.0
        size = size + 2 * largest * scale
    return np.abs(x) @ size.T * (relative + (k + 4) * 2.0**-23)


@needs_mosaic
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.fmt}-{c.m}-{c.groups}")
def test_interpreted_kernel_is_the_float64_product(case: Case) -> None:
    rng = np.random.default_rng(case.m)
    fmt = FORMATS[case.fmt]
    weight, dense = random_weight(rng, fmt, N, case.k, case.groups)
    x = jnp.asarray(rng.normal(size=(case.m, case.k)), case.dtype)
    multiply = jax.jit(
        lambda x, w: gpu.quantized_matmul(
            x,
            w,
            fmt,
            config=case.config,
            interpret=plgpu.InterpretGPUParams(
                detect_races=True, uninitialized_memory="nan"
            ),
        ),
    )
    y = np.asarray(multiply(x, packed(weight, fmt, case.k)))
    assert y.shape == (case.m, 128)
    x64 = np.asarray(x, np.float64)
    limit = bound(x64, weight, dense, rounding(fmt, case.dtype))
    assert np.all(np.abs(y[:, :N] - x64 @ dense.T) <= limit)
    np.testing.assert_array_equal(y[:, N:], 0)


@pytest.mark.parametrize("name", ["int4", "uint4", "nf4"])
def test_many_rows_are_multiplied_dense(name: str) -> None:
    rng = np.random.default_rng(5)
    fmt = FORMATS[name]
    weight, dense = random_weight(rng, fmt, N, 96, 3)
    x = jnp.asarray(rng.normal(size=(gpu.DENSE_ROWS, 96)), jnp.bfloat16)
    y = gpu.quantized_matmul(x, packed(weight, fmt, 96), fmt)
    x64 = np.asarray(x, np.float64)
    limit = bound(x64, weight, dense, 2.0**-8)
    assert np.all(np.abs(np.asarray(y)[:, :N] - x64 @ dense.T) <= limit)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_what_each_thread_multiplies(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (128, 192), np.uint8)
    words = _gpu_words.arrange(jnp.asarray(codes), bits=bits)
    assert words.shape == (2, 2 * 192 * bits)
    blocks = np.asarray(words).view(np.uint32).reshape(2, 3, bits * 128)
    vector, per = min(bits, 4), 16 // bits
    for _ in range(200):
        strip, block, thread, pair, half = rng.integers(0, (2, 3, 128, 16, 2))
        word, slot = divmod(pair, per)
        at = (word // vector * 128 + thread) * vector + word % vector
        code = blocks[strip, block, at] >> (bits * slot + 16 * half) & (2**bits - 1)
        warp, lane = divmod(thread, 32)
        row = 64 * strip + 16 * warp + 8 * (pair % 2) + lane // 4
        column = 64 * block + 8 * (pair // 2) + 2 * (lane % 4) + half
        assert code == codes[row, column]
    np.testing.assert_array_equal(_gpu_words.restore(words, bits=bits), codes)


@pytest.mark.parametrize("name", ["int4", "int8", "int2"])
@pytest.mark.parametrize("m", [1, 16, 33, 64, 100, 256, 511])
def test_configs_fit_the_chip_and_the_weight(name: str, m: int) -> None:
    fmt = FORMATS[name]
    sizes = ((64, 128, 1), (8192, 8192, 64), (28672, 8192, 256), (192, 1152, 3))
    for n, k, groups in sizes:
        for zeros in (False, True):
            c = config_for(m, n, k, fmt, groups, zeros=zeros)
            group = k // groups if groups > 1 else None
            assert shared_memory(c, fmt, group) <= SHARED_MEMORY
            assert k % (c.tile_k * c.split_k) == 0
            assert n % (64 * c.strips) == 0
            assert 1 <= c.stages <= k // (c.tile_k * c.split_k)
            assert c.tile_k % (64 * c.splits) == 0
            share = c.tile_k // c.splits
            assert group is None or share % group == 0 or group % share == 0


def test_large_weights_occupy_the_processors() -> None:
    for m in (1, 16, 64):
        c = config_for(m, 8192, 8192, FORMATS["int4"], 64)
        assert 120 <= 8192 // (64 * c.strips) * c.split_k <= 132
        assert c.stages >= 3


def shapes(fmt: Format, n: int, k: int, groups: int) -> Weight:
    side = jax.ShapeDtypeStruct((groups, n), jnp.float32)
    words = jax.ShapeDtypeStruct((n // 64, 2 * k * layouts.width(fmt)), jnp.int32)
    zero = side if isinstance(fmt, Integer) and not fmt.signed else None
    return Weight(words, side, zero)


LOWERED = [name for name in FORMATS if name != "odd"]


@needs_mosaic
@pytest.mark.parametrize(("index", "name"), list(enumerate(LOWERED)), ids=LOWERED)
def test_lowers_for_hopper(index: int, name: str) -> None:
    fmt, m = FORMATS[name], (1, 16, 64, 200)[index % 4]
    device = jax.sharding.AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    groups = (1, 32, 16, 4)[index // 3 % 4]
    x = jax.ShapeDtypeStruct((m, 1024), (jnp.bfloat16, jnp.float16)[groups == 16])
    run = jax.jit(lambda x, w: gpu.quantized_matmul(x, w, fmt))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = run.trace(x, shapes(fmt, 512, 1024, groups))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_refusals_name_the_rule_and_the_remedy() -> None:
    rng = np.random.default_rng(0)
    fmt = FORMATS["int4"]
    weight = packed(random_weight(rng, fmt, 64, 96, 2)[0], fmt, 96)
    x = jnp.ones((1, 96), jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"groups must .* 64; got 48\. Repeat"
    ):
        gpu.quantized_matmul(x, weight, fmt)
    with pytest.raises(NotImplementedError, match=r"5 to 16 entries.*got wide"):
        gpu.quantized_matmul(x, weight, Table(tuple(range(17)), name="wide"))
    with pytest.raises(TypeError, match=r"x must be bfloat16.*got int8"):
        gpu.quantized_matmul(x.astype(jnp.int8), weight, fmt)
    with pytest.raises(ValueError, match=r"weight\.words must be int32.*repack"):
        gpu.quantized_matmul(x, weight, FP8_E4M3)
    with pytest.raises(ValueError, match=r"weight\.scale must be \[G', 64\]"):
        gpu.quantized_matmul(x, weight._replace(scale=weight.scale.T), fmt)


@pytest.mark.skipif(hasattr(plgpu, "InterpretGPUParams"), reason="this jax has it")
def test_an_older_jax_is_told_what_to_do() -> None:
    fmt = FORMATS["int4"]
    weight = packed(random_weight(np.random.default_rng(0), fmt, 64, 96, 3)[0], fmt, 96)
    with pytest.raises(
        NotImplementedError, match=r"jax must be 0\.11 or later.*Update"
    ):
        gpu.quantized_matmul(jnp.ones((1, 96), jnp.bfloat16), weight, fmt)
