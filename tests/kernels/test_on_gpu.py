"""On a GPU: every operation and format against float64, compiled."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, layouts
from kernels_pallas.quantized_matmul import quantized_matmul
from kernels_pallas.ragged_quantized_matmul import ragged_quantized_matmul
from kernels_pallas.scaled_matmul import fp8_matmul, int8_matmul
from kernels_pallas.target import current_target
from tests.kernels.weights import FORMATS, random_weight

pytestmark = pytest.mark.gpu
N, K = 200, 1024
HELD = [
    n for n, f in FORMATS.items() if not isinstance(f, formats.Table) or f.bits == 4
]


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if current_target().reads != "gpu":
        pytest.skip("needs a Hopper GPU and jax 0.11")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def off(y: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact)) / float(
        np.linalg.norm(exact)
    )


@pytest.mark.parametrize("groups", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("name", HELD)
def test_quantized_matmul(name: str, groups: int) -> None:
    fmt = FORMATS[name]
    weight, dense = random_weight(np.random.default_rng(groups), fmt, N, K, groups)
    packed = jax.jit(lambda w: layouts.repack(w, fmt, n=N, k=K, to=layouts.GPU))(weight)
    run = jax.jit(
        functools.partial(
            quantized_matmul, fmt=fmt, n=N, groups=groups, layout=layouts.GPU
        )
    )
    for m in (1, 3, 8, 17, 64, 200, 600):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            x = jnp.asarray(normal(m, m, K), dtype)
            y = run(x, packed)
            assert y.shape == (m, N)
            exact = np.asarray(x, np.float64) @ dense.T
            # Rounding of the result, of table entries, and of a dense copy.
            assert off(y, exact) < (2**-7 if dtype != jnp.float32 else 2**-8), (
                m,
                dtype,
            )


@pytest.mark.parametrize("m", [1, 17, 300])
def test_int8_and_fp8_matmul(m: int) -> None:
    x = jnp.asarray(normal(m, m, K), jnp.bfloat16)
    exact = lambda dense: np.asarray(x, np.float64) @ dense.T
    for name, run, largest in (
        ("int8", int8_matmul, 0.02),
        ("int4", int8_matmul, 0.02),
        ("fp8_e4m3", fp8_matmul, 0.06),
    ):
        fmt: Any = FORMATS[name]
        weight, dense = random_weight(np.random.default_rng(0), fmt, N, K, 1)
        y = jax.jit(functools.partial(run, fmt=fmt))(x, weight)
        assert off(y, exact(dense)) < largest, name


def test_ragged_quantized_matmul() -> None:
    fmt, rng = FORMATS["int4"], np.random.default_rng(1)
    made = [random_weight(rng, fmt, N, K, 8) for _ in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(w for w, _ in made))
    sizes = np.array([5, 0, 20], np.int32)
    x = jnp.asarray(normal(2, 30, K), jnp.bfloat16)
    y = jax.jit(functools.partial(ragged_quantized_matmul, fmt=fmt))(
        x, stack, jnp.asarray(sizes)
    )
    rows = np.repeat(np.arange(3), sizes)
    exact = np.zeros((30, N))
    for i, expert in enumerate(rows):
        exact[i] = made[expert][1] @ np.asarray(x[i], np.float64)
    assert off(y, exact) < 2**-7
    assert not np.asarray(y[25:], np.float32).any()
