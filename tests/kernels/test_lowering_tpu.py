"""The TPU kernels pass the compiler's front end: block shapes, casts, gathers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import layouts
from kernels_pallas.layouts import TPU, Weight
from kernels_pallas.quantized_matmul import tpu
from tests.kernels.weights import FORMATS

N = 256


def abstract(fmt: Any, k: int, groups: int) -> Weight:
    """Shapes of a weight in the TPU layout."""
    rows, columns = TPU.padded(N, k, groups)
    side = jax.ShapeDtypeStruct((groups, rows), jnp.float32)
    words = (columns * layouts.width(fmt) // 32, rows)
    zero = side if fmt.name.startswith("u") else None
    return Weight(jax.ShapeDtypeStruct(words, jnp.int32), side, zero)


def lowered(fmt: Any, calls: list[tuple[int, int, Any]], k: int) -> str:
    """StableHLO for TPU of one call for each ``(m, groups, dtype)``."""
    xs = [jax.ShapeDtypeStruct((m, k), dtype) for m, _, dtype in calls]
    weights = [abstract(fmt, k, groups) for _, groups, _ in calls]

    def run(xs: list[jax.Array], weights: list[Weight]) -> list[jax.Array]:
        pairs = zip(xs, weights, strict=True)
        return [tpu.quantized_matmul(x, weight, fmt) for x, weight in pairs]

    return jax.jit(run).trace(xs, weights).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lowers(name: str) -> None:
    # 256 rows: scales before the dot. 8 groups of 128 and 10 of 32 do not fill K.
    calls = [(1, 1, jnp.bfloat16), (256, 10, jnp.bfloat16), (16, 40, jnp.float32)]
    text = lowered(FORMATS[name], calls, k=1280)
    assert text.count("tpu_custom_call") == len(calls)


@pytest.mark.parametrize("groups", [43, 86, 172, 344])
def test_every_group_size_lowers_with_a_last_block_that_is_short(groups: int) -> None:
    calls = [(8, groups, jnp.bfloat16), (256, groups, jnp.bfloat16)]
    text = lowered(FORMATS["uint4"], calls, k=11008)
    assert text.count("tpu_custom_call") == len(calls)
