"""The TPU kernel of `quantized_matmul`, interpreted, against float64."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import formats, layouts
from kernels_pallas.layouts import TPU, Weight
from kernels_pallas.quantized_matmul import tpu
from kernels_pallas.quantized_matmul._tpu_blocks import (
    VMEM_BYTES,
    Blocks,
    blocks_for,
    k_unit,
    vmem_bytes,
)
from tests.kernels.weights import FORMATS, random_weight

N = 260
"""Padded to 384: a block and a half."""


class Case(NamedTuple):
    k: int
    groups: int
    m: int
    dtype: Any = jnp.bfloat16
    after: bool = True
    block: int = 256


CASES = (
    Case(300, 1, m=1, dtype=jnp.float32),
    Case(256, 8, m=17),
    Case(384, 3, m=8, after=False, block=1024),
)


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def pack(weight: Weight, fmt: formats.Format, k: int) -> Weight:
    """In the TPU layout, by NumPy: bit `j` of input `i` at bit ``i B + j`` of a column.

    Signed codes keep their value in the wider ``B`` bits; unsigned ones that fill
    them are lowered, the zero point too.
    """
    n, groups = weight.scale.shape
    integer = isinstance(fmt, formats.Integer)
    rows, columns = TPU.padded(n, k, groups)
    wide = layouts.width(fmt)
    bits = np.unpackbits(np.asarray(weight.words), axis=1, bitorder="little")
    codes = bits[:, : k * fmt.bits].reshape(n, k, -1) @ (1 << np.arange(fmt.bits))
    if integer and fmt.signed:
        codes -= (codes >> (fmt.bits - 1)) << fmt.bits
    lowered = 2 ** (wide - 1) * (integer and not fmt.signed and fmt.bits == wide)
    codes = np.pad(codes - lowered, ((0, rows - n), (0, columns - k)))
    bits = (codes[..., None] >> np.arange(wide)) & 1
    words = np.packbits(bits.reshape(rows, -1), axis=1, bitorder="little")
    words = np.ascontiguousarray(words.view(np.int32).T)
    spare = ((0, columns * groups // k - groups), (0, rows - n))

    def side(a: jax.Array, lower: int = 0) -> jax.Array:
        return jnp.asarray(np.pad(np.asarray(a, np.float32).T - lower, spare))

    zero = None if weight.zero is None else side(weight.zero, lowered)
    return Weight(jnp.asarray(words), side(weight.scale), zero)


def multiply(x: jax.Array, weight: Weight, fmt: formats.Format, **how: Any) -> Any:
    """The kernel, of a portable weight."""
    run = functools.partial(tpu.quantized_matmul, fmt=fmt, interpret=True)
    packed = pack(weight, fmt, x.shape[1])
    return jax.jit(functools.partial(run, **how))(x, packed)[:, : weight.words.shape[0]]


def bound(
    x: jax.Array, weight: Weight, dense: np.ndarray, fmt: formats.Format, after: bool
) -> np.ndarray:
    """K float32 sums, a few float32 products, and roundings to bfloat16.

    With zero points the sums are of codes, of at most ``2**(bits - 1)``, and zero
    points as large. Products of bfloat16 are exact in float32.
    """
    size = np.abs(np.asarray(x, np.float64))
    terms = np.abs(dense)
    if weight.zero is not None:
        groups = weight.scale.shape[1]
        scale = np.repeat(np.asarray(weight.scale, np.float64), x.shape[1] // groups, 1)
        terms = 2.0**fmt.bits * scale
    rounded = x.dtype == jnp.bfloat16
    sums = (size @ terms.T) * (x.shape[1] + 8) * 2.0**-24
    times = (not after) + (fmt.name == "nf4")
    return sums + (size @ np.abs(dense).T) * 2.0**-8 * times * rounded


def check(y: Any, x: jax.Array, weight: Weight, dense: np.ndarray, *how: Any) -> None:
    error = np.abs(np.asarray(y, np.float64) - np.asarray(x, np.float64) @ dense.T)
    assert (error <= bound(x, weight, dense, *how)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_agrees_with_float64(name: str) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(0)
    sizes = {(c.k, c.groups) for c in CASES}
    made = {s: random_weight(rng, fmt, N, *s) for s in sizes}
    xs = [normal(i, c.m, c.k, dtype=c.dtype) for i, c in enumerate(CASES)]

    packed = {size: pack(weight, fmt, size[0]) for size, (weight, _) in made.items()}

    @jax.jit
    def run(xs: list[jax.Array], weights: dict[Any, Weight]) -> list[jax.Array]:
        return [
            tpu.quantized_matmul(
                x,
                weights[c.k, c.groups],
                fmt,
                blocks=Blocks(16, 256, c.block, c.after),
                interpret=True,
            )
            for c, x in zip(CASES, xs, strict=True)
        ]

    for case, x, y in zip(CASES, xs, run(xs, packed), strict=True):
        assert y.dtype == jnp.float32
        check(y[:, :N], x, *made[case.k, case.groups], fmt, case.after)


@pytest.mark.parametrize("name", ["int4", "uint3"])
def test_groups_of_256_run_over_blocks(name: str) -> None:
    fmt, m, k = FORMATS[name], 3, 2304
    weight, dense = random_weight(np.random.default_rng(6), fmt, 128, k, 9)
    x = normal(7, m, k)
    y = multiply(x, weight, fmt, blocks=Blocks(16, 128, 2048))
    check(y, x, weight, dense, fmt, True)


@pytest.mark.parametrize(
    ("name", "after", "dtype"),
    [("int4", True, jnp.bfloat16), ("fp4_e2m1", False, jnp.float32)],
)
def test_zero_points_of_any_format_may_be_fractions(
    name: str, after: bool, dtype: Any
) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    weight, dense = random_weight(rng, fmt, 128, 256, 4)
    zero = rng.uniform(-7, 7, weight.scale.shape).astype(np.float32)
    dense = dense - np.repeat(zero * np.asarray(weight.scale, np.float64), 64, axis=1)
    weight = weight._replace(zero=jnp.asarray(zero))
    x = normal(2, 8, 256, dtype=dtype)
    y = multiply(x, weight, fmt, blocks=Blocks(16, 128, 256, after))
    check(y, x, weight, dense, fmt, after)


def test_unsigned_codes_need_no_zero_point() -> None:
    fmt = formats.UINT4
    codes, _ = random_weight(np.random.default_rng(3), formats.INT4, 128, 128, 1)
    dense = np.asarray(codes.words, np.float64)
    dense = np.stack([dense % 16, dense // 16], axis=-1).reshape(128, 128)
    dense *= np.asarray(codes.scale, np.float64)
    x = normal(4, 3, 128)
    check(multiply(x, codes, fmt), x, codes, dense, fmt, True)


def test_x_too_large_to_stay_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "RESIDENT_BYTES", 0)
    fmt, k = formats.INT2, 384
    weight, dense = random_weight(np.random.default_rng(5), fmt, 128, k, 1)
    x = normal(6, 17, k)
    y = multiply(x, weight, fmt, blocks=Blocks(32, 128, 256))
    check(y, x, weight, dense, fmt, True)


def test_result_is_rounded_once_to_the_dtype_asked_for() -> None:
    weight, _ = random_weight(np.random.default_rng(7), formats.INT8, 128, 256, 2)
    run = functools.partial(multiply, normal(8, 3, 256), weight, formats.INT8)
    np.testing.assert_array_equal(
        run(out_dtype=jnp.bfloat16), run().astype(jnp.bfloat16)
    )


def test_blocks_beyond_the_edge_are_never_read(capsys: Any) -> None:
    fmt = formats.UINT4
    weight, dense = random_weight(np.random.default_rng(9), fmt, N, 384, 12)
    x = normal(10, 17, 384)
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = multiply(x, weight, fmt, blocks=Blocks(16, 256, 256), interpret=strict)
    check(y, x, weight, dense, fmt, True)
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.parametrize("m", [1, 16, 300, 4096])
@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_chosen_blocks_fit(name: str, m: int) -> None:
    fmt = FORMATS[name]
    for n, k, group in itertools.product((128, 4096), (4096, 11008, 29696), (32, 128)):
        for groups in (1, k // group):
            blocks = blocks_for(m, n, k, fmt, groups)
            assert vmem_bytes(blocks, k, fmt, groups) <= VMEM_BYTES
            assert blocks.k % k_unit(k, groups) == 0 or blocks.k == k
            assert blocks.n % 128 == 0
            assert blocks.m % 16 == 0


REFUSED = {
    "float16 x": (TypeError, r"x must be bfloat16 or float32; got float16"),
    "no rows": (ValueError, r"x must be \[M, K\].*got \(0, 256\)"),
    "uint8 words": (ValueError, r"weight.words must be int32.*got uint8"),
    "short words": (ValueError, r"K' >= 256; got int32\[24, 128\]"),
    "scale": (ValueError, r"weight.scale must be \[G', 128\].*got \(3, 128\)"),
    "zero": (ValueError, r"weight.zero must have the shape.*got \(1, 128\)"),
    "blocks": (ValueError, r"blocks.k must be a multiple of 1024.*got 128"),
    "table": (NotImplementedError, r"at most 16 entries; got 17"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_by_name(what: str) -> None:
    x, fmt, how = jnp.ones((2, 256), jnp.bfloat16), formats.INT4, {}
    sides = jnp.ones((2, 128), jnp.float32)
    weight = Weight(jnp.ones((32, 128), jnp.int32), sides, sides)
    match what:
        case "float16 x":
            x = x.astype(jnp.float16)
        case "no rows":
            x = x[:0]
        case "uint8 words":
            weight = weight._replace(words=weight.words.astype(jnp.uint8))
        case "short words":
            weight = weight._replace(words=weight.words[:24])
        case "scale":
            weight = weight._replace(scale=jnp.ones((3, 128), jnp.float32))
        case "zero":
            weight = weight._replace(zero=sides[:1])
        case "blocks":
            how = {"blocks": Blocks(16, 128, 128)}
        case "table":
            fmt = formats.Table(tuple(float(i) for i in range(17)))
    error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        tpu.quantized_matmul(x, weight, fmt, **how)
