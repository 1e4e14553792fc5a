"""Ahead of time: every operation lowers for TPU and CUDA; listings are read right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats
from kernels_pallas.aot import _gpu, _tpu
from kernels_pallas.aot.__main__ import summary
from kernels_pallas.aot.cases import cases
from kernels_pallas.block_sparse_matmul import block_sparse_matmul
from kernels_pallas.block_sparse_matmul import pack as pack_blocks
from kernels_pallas.codebook_matmul import CodebookWeight, codebook_matmul
from kernels_pallas.hashed_matmul import Hashing, hashed_matmul
from kernels_pallas.nm_sparse_matmul import nm_sparse_matmul
from kernels_pallas.nm_sparse_matmul import pack as pack_nm
from kernels_pallas.quantized_embedding_lookup import quantized_embedding_lookup
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.ragged_quantized_matmul import ragged_quantized_matmul
from kernels_pallas.scaled_matmul import fp8_matmul, int8_matmul
from tests.kernels.weights import FORMATS, random_weight

KERNELS = [
    "W4A16 zero points g128, 16 rows",
    "W8A8 channel, 32 rows",
    "W4A8 channel, 32 rows",
    "FP8 FP8 channel, 32 rows",
    "ragged W4A16 g128, 256 rows",
    "codebook d=8 E=256",
    "hashed element, 256 buckets",
    "block-sparse 128 x 128, a tenth",
    "2:4 bfloat16",
]


@pytest.mark.parametrize("name", KERNELS)
def test_every_tpu_kernel_lowers(name: str) -> None:
    fn, args = cases("tpu")[name]
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def operations() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    rng = np.random.default_rng(0)
    x, dense = rng.normal(size=(3, 64)), rng.normal(size=(32, 64))
    x, dense = jnp.asarray(x, jnp.float32), jnp.asarray(dense, jnp.float32)
    make = lambda name: random_weight(rng, FORMATS[name], 32, 64, 1)[0]
    int4, fp8 = make("int4"), make("fp8_e4m3")
    experts = jax.tree.map(lambda a: jnp.stack([a, a]), int4)
    codes = jnp.asarray(rng.integers(0, 256, (32, 1, 16)), jnp.uint8)
    books = jnp.asarray(rng.normal(size=(1, 1, 256, 4)), jnp.float32)
    word = formats.INT4
    return {
        "quantized": (lambda x, w: quantized_matmul(x, w, word), (x, int4)),
        "int8": (lambda x, w: int8_matmul(x, w, word), (x, int4)),
        "fp8": (lambda x, w: fp8_matmul(x, w, formats.FP8_E4M3), (x, fp8)),
        "ragged": (
            lambda x, w, s: ragged_quantized_matmul(x, w, s, word),
            (x, experts, jnp.array([1, 2])),
        ),
        "codebook": (
            lambda x, w: codebook_matmul(x, w, bits=8),
            (x, CodebookWeight(codes, books)),
        ),
        "hashed": (lambda x, b: hashed_matmul(x, b, Hashing(), n=32), (x, x[0])),
        "blocks": (block_sparse_matmul, (x, pack_blocks(dense, block=(8, 8)))),
        "2:4": (
            lambda x, w: nm_sparse_matmul(x, w, n=2, m=4),
            (x, pack_nm(dense, n=2, m=4)),
        ),
        "lookup": (
            lambda i, w: quantized_embedding_lookup(i, w, word, k=64),
            (jnp.array([1, 5]), int4),
        ),
    }


def test_every_operation_lowers_for_every_platform() -> None:
    made = operations()
    run = lambda args: {name: fn(*args[name]) for name, (fn, _) in made.items()}
    traced = jax.jit(run).trace({name: args for name, (_, args) in made.items()})
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("dot") > len(made) // 2, platform


def test_a_schedule_is_counted_by_unit(tmp_path: Path) -> None:
    file = tmp_path / "1-kernel-x-final_hlo-static-per-bundle-utilization.txt"
    file.write_text("head\nMXU, VALU, VSTORE:SPILL\n\n\n1 2 0\n0 3 1\n\n")
    assert _tpu._schedule(tmp_path, "kernel") == file
    found = _tpu._slots(file)
    assert found == {"bundles": 2, "MXU": 1, "VALU": 5, "VSTORE:SPILL": 1}
    with pytest.raises(ValueError, match="dump must hold one"):
        _tpu._schedule(tmp_path, "other")


SASS = """
.L_x_1:
        /*0010*/                   LDS.128 R4, [R2] ;
        /*0020*/                   HGMMA.64x16x16.F32 R24, R4, gdesc[UR4] ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/                   STL [R1], R4 ;
"""


def test_code_is_counted_in_the_loop_and_in_all() -> None:
    found = _gpu._code(SASS)
    assert found["code"]["STL"] == 1
    assert found["loop"]["HGMMA"] == 1
    assert "STL" not in found["loop"]


def test_a_failure_is_summed_up_as_one() -> None:
    assert summary({"error": "no VMEM"}) == "FAILED no VMEM"


def test_an_unknown_chip_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"topology must begin with one of.*'v2:2x2'"):
        _tpu.environment("v2:2x2", tmp_path)
