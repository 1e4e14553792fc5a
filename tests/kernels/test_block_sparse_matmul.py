"""`block_sparse_matmul`: packing, every form against float64, gradients, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats
from kernels_pallas.block_sparse_matmul import (
    BlockSparse,
    block_sparse_matmul,
    choose,
    pack,
    reference,
    repack,
    restore,
    tpu,
    unpack,
    xla,
)
from kernels_pallas.layouts import PORTABLE, TPU, Weight
from kernels_pallas.target import Target
from tests.kernels.weights import FORMATS, matmul_bound, random_weight

V5E, CPU = Target("tpu", "TPU v5 lite"), Target("cpu", "cpu")
PLACES = ((0, 3, -1), (-1, -2, -1), (2, -1, 1), (1, 2, 4), (4, 0, -1))
"""Columns of five rows of blocks, of five: one empty, two not in order."""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_of(
    values: np.ndarray, columns: np.ndarray, n: int, k: int, dtype: Any = np.float64
) -> np.ndarray:
    """The dense weight, block by block."""
    rows, places, bn, bk = values.shape
    dense = np.zeros((rows * bn, (columns.max() + 1) * bk + k), dtype)
    for r in range(rows):
        for c in range(places):
            if (at := int(columns[r, c])) >= 0:
                block = values[r, c].astype(dtype)
                dense[r * bn : (r + 1) * bn, at * bk : (at + 1) * bk] = block
    return dense[:n, :k]


def floating(seed: int, block: tuple[int, int], rows: int = 5) -> BlockSparse:
    """Blocks whose empty places are not zeros."""
    columns = np.array(PLACES[:rows], np.int32)
    return BlockSparse(normal(seed, *columns.shape, *block), columns)


def coded(
    name: str, block: tuple[int, int], rows: int
) -> tuple[BlockSparse, np.ndarray]:
    """Codes of blocks, and their values."""
    columns, (bn, bk) = np.array(PLACES[:rows], np.int32), block
    rng = np.random.default_rng(7)
    flat, values = random_weight(rng, FORMATS[name], columns.size * bn, bk, 1)
    split = lambda a: a.reshape(*columns.shape, bn, -1)
    weight = BlockSparse(jax.tree.map(split, flat), jnp.asarray(columns))
    return weight, split(values)


def assert_close(
    y: Any, x: np.ndarray, w: np.ndarray, product: float = 2.0**-22
) -> None:
    """Against float64, within the bound of float32 sums."""
    x = x.astype(np.float64)
    error = np.abs(np.asarray(y, np.float64) - x @ w.T)
    assert (error <= matmul_bound(x, w, product)).all(), error.max()


@pytest.mark.parametrize("block", [(8, 16), (75, 5)])
def test_packing_keeps_the_blocks_that_are_not_zero(block: tuple[int, int]) -> None:
    n, k, (bn, bk) = 75, 41, block
    dense = normal(0, 2, n, k)
    for at, drop in np.ndenumerate(np.random.default_rng(1).random((2, 75, 41)) < 0.6):
        s, r, c = at
        if drop:
            dense[s, r * bn : (r + 1) * bn, c * bk : (c + 1) * bk] = 0
    packed = pack(jnp.asarray(dense), block=block)
    assert (np.asarray(unpack(packed, n=n, k=k)) == dense).all()
    for s in range(2):
        for r, row in enumerate(np.asarray(packed.columns[s])):
            strip = dense[s, r * bn : (r + 1) * bn]
            found = [c for c in range(-(-k // bk)) if strip[:, c * bk :][:, :bk].any()]
            assert row.tolist() == found + [-1] * (len(row) - len(found))
    again = jax.jit(lambda d: pack(d, block=block, capacity=packed.columns.shape[-1]))
    assert jax.tree.all(jax.tree.map(np.array_equal, again(dense), packed))


def test_a_small_capacity_keeps_the_strongest_blocks() -> None:
    dense = np.ones((2, 8), np.float32) * np.repeat([1.0, 3.0, 2.0, 0.5], 2)
    packed = pack(jnp.asarray(dense, jnp.float32), block=(2, 2), capacity=2)
    assert packed.columns.tolist() == [[1, 2]]
    assert packed.values.tolist() == [[[[3.0] * 2] * 2, [[2.0] * 2] * 2]]


def test_agrees_with_float64_for_any_size() -> None:
    sizes = {1: (40, 80), 3: (37, 80), 8: (33, 75), 17: (35, 70)}
    weight = floating(2, (8, 16))
    xs = {m: normal(m, m, k) for m, (_, k) in sizes.items()}

    @jax.jit
    def run(xs: dict[int, Any], weight: BlockSparse) -> Any:
        half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), weight.values)
        return {
            m: (
                block_sparse_matmul(x, weight, n=sizes[m][0], target=CPU),
                xla.block_sparse_matmul(x, weight, None, at_once=2)[:, : sizes[m][0]],
                reference.block_sparse_matmul(x, weight, None, n=sizes[m][0]),
                block_sparse_matmul(
                    x.astype(jnp.bfloat16),
                    weight._replace(values=half),
                    n=sizes[m][0],
                    dtype=jnp.float32,
                    target=Target("gpu", "NVIDIA H200"),
                ),
            )
            for m, x in xs.items()
        }

    ys = run(xs, weight)
    half = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float32)
    for m, (n, k) in sizes.items():
        w = dense_of(weight.values, weight.columns, n, k)
        for y in ys[m][:3]:
            assert_close(y, xs[m], w)
        w = dense_of(half(weight.values), weight.columns, n, k)
        assert_close(ys[m][3], half(xs[m]), w)


def test_every_format_agrees_with_float64() -> None:
    made = {name: coded(name, (5, 8), 4) for name in FORMATS}
    x = normal(3, 3, 37)
    run = jax.jit(
        lambda x, ws: {
            name: (
                block_sparse_matmul(x, w, FORMATS[name], target=CPU),
                reference.block_sparse_matmul(x, w, FORMATS[name], n=20),
            )
            for name, w in ws.items()
        }
    )
    for name, ys in run(x, {name: w for name, (w, _) in made.items()}).items():
        w, values = made[name]
        for y in ys:
            assert_close(y, x, dense_of(values, np.asarray(w.columns), 20, 37))


def test_gradients_are_those_of_the_dense_matmul() -> None:
    weight, x, dy = floating(4, (8, 16)), normal(5, 2, 5, 75), normal(6, 2, 5, 37)
    columns = np.stack([weight.columns, np.roll(weight.columns, 1, 0)])
    stack = BlockSparse(np.stack([weight.values, -weight.values]), columns)

    @jax.jit
    def run(x: Any, weight: BlockSparse, dy: Any) -> Any:
        def f(x: Any, values: Any) -> Any:
            w = weight._replace(values=values)
            return block_sparse_matmul(x, w, n=37, target=CPU)

        return jax.vjp(f, x, weight.values)[1](dy)

    dx, dvalues = run(x, stack, dy)
    for s in range(2):
        w = dense_of(stack.values[s], columns[s], 37, 75)
        assert_close(dx[s], dy[s], w.T)
        dense = dense_of(np.asarray(dvalues[s]), columns[s], 37, 75)
        kept = dense_of(np.ones_like(dvalues[s]), columns[s], 37, 75) == 1
        error = np.abs(dense - dy[s].T.astype(np.float64) @ x[s])
        assert (error <= matmul_bound(dy[s].T, x[s].T))[kept].all()
        assert (np.asarray(dvalues[s])[columns[s] < 0] == 0).all()


def test_scales_and_zero_points_have_gradients() -> None:
    fmt, (weight, _) = formats.UINT4, coded("uint4", (8, 16), 4)
    assert isinstance(weight.values, Weight)
    scale, zero = weight.values.scale, weight.values.zero.astype(jnp.float32)
    x, dy = normal(8, 3, 80), normal(9, 3, 32)

    @jax.jit
    def run(scale: Any, zero: Any) -> Any:
        def f(scale: Any, zero: Any) -> Any:
            w = weight._replace(values=weight.values._replace(scale=scale, zero=zero))
            return block_sparse_matmul(x, w, fmt, target=CPU)

        return jax.vjp(f, scale, zero)[1](dy)

    dscale, dzero = run(scale, zero)
    codes = np.asarray(unpack_codes(weight.values.words), np.float64)
    outer = dy.T.astype(np.float64) @ x
    size = np.abs(dy.T).astype(np.float64) @ np.abs(x)
    for (r, c), at in np.ndenumerate(np.asarray(weight.columns)):
        if at < 0:
            assert not dscale[r, c].any()
            assert not dzero[r, c].any()
            continue
        cut = lambda a, r=r, at=at: a[r * 8 : r * 8 + 8, at * 16 : at * 16 + 16]
        value = codes[r, c] - np.asarray(zero[r, c], np.float64)
        wanted = (cut(outer) * value).sum(1)
        bound = (cut(size) * np.abs(value)).sum(1) * 2.0**-18
        assert (np.abs(np.asarray(dscale[r, c, :, 0]) - wanted) <= bound).all()
        s = np.asarray(scale[r, c, :, 0], np.float64)
        error = np.abs(np.asarray(dzero[r, c, :, 0]) + cut(outer).sum(1) * s)
        assert (error <= cut(size).sum(1) * s * 2.0**-18).all()


def unpack_codes(words: jax.Array) -> np.ndarray:
    """Nibbles, low first."""
    w = np.asarray(words)
    return np.stack([w & 15, w >> 4], axis=-1).reshape(*w.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tpu_kernel_agrees_with_float64(dtype: Any) -> None:
    weight, x = floating(10, (128, 128), rows=3), normal(11, 3, 500)
    half = lambda a: np.asarray(a.astype(dtype), np.float32)
    steps = tpu.Steps(16, 2, 2)

    @jax.jit
    def run(x: Any, weight: BlockSparse) -> Any:
        w = weight._replace(values=weight.values.astype(dtype))
        x = x.astype(dtype)
        tails = tpu.block_sparse_matmul(x, w, None, steps=steps, interpret=True)
        options = {"dtype": jnp.float32, "target": V5E, "interpret": True}
        return tails[:, :300], block_sparse_matmul(x, w, n=300, **options)

    dense = dense_of(half(weight.values), weight.columns, 300, 500)
    for y in run(x, weight):
        assert_close(y, half(x), dense)
    assert choose(weight, x, layout=TPU, target=V5E).kernel == "tpu"


def test_tpu_kernel_of_codes_agrees_and_repacking_undoes_itself() -> None:
    names = ("int4", "uint4", "nf4", "fp8_e4m3")
    made = {name: coded(name, (128, 128), 1) for name in names}
    x = normal(12, 3, 512)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)

    @jax.jit
    def run(x: Any, weights: dict[str, BlockSparse]) -> Any:
        y, back = {}, {}
        for name, w in weights.items():
            fmt = FORMATS[name]
            stored = repack(w, fmt, to=TPU)
            back[name] = restore(stored, fmt, layout=TPU)
            y[name] = block_sparse_matmul(
                x.astype(jnp.bfloat16),
                stored,
                fmt,
                layout=TPU,
                dtype=jnp.float32,
                target=V5E,
                interpret=True,
            )
        return y, back

    ys, back = run(x, {name: w for name, (w, _) in made.items()})
    for name, (w, values) in made.items():
        product = 2.0**-8 if name == "nf4" else 2.0**-22
        dense = dense_of(values, np.asarray(w.columns), 128, 512)
        if isinstance(FORMATS[name], formats.Integer) and w.values.zero is not None:
            # x @ code and zero * sum(x) are summed apart.
            product += 256 * 512 * 2.0**-24
        assert_close(ys[name], rounded, dense, product)
        assert jax.tree.all(jax.tree.map(np.array_equal, w, back[name])), name


def test_gradients_of_the_tpu_layout_are_the_portable_ones() -> None:
    fmt, (weight, _) = formats.INT4, coded("int4", (128, 128), 2)
    weight = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), weight)
    x = normal(13, 2, 3, 500)

    @jax.jit
    def run(x: Any, weight: BlockSparse) -> Any:
        def loss(x: Any, w: BlockSparse, **options: Any) -> Any:
            y = block_sparse_matmul(x, w, fmt, **options)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        take = jax.grad(loss, argnums=(0, 1), allow_int=True)
        stored = repack(weight, fmt, to=TPU)
        chip = take(x, stored, layout=TPU, target=V5E, interpret=True)
        scales = [g[1].values.scale for g in (take(x, weight, target=CPU), chip)]
        return take(x, weight, target=CPU)[0], chip[0], scales

    plain, chip, scales = run(x, weight)
    np.testing.assert_array_equal(plain, chip)
    np.testing.assert_array_equal(scales[0], np.swapaxes(scales[1], -1, -2))
    assert np.abs(scales[0]).max() > 1


def test_lowers_for_a_tpu() -> None:
    x = jax.ShapeDtypeStruct((5, 512), jnp.bfloat16)
    weight = jax.eval_shape(
        lambda w: pack(w, block=(128, 256), capacity=1),
        jax.ShapeDtypeStruct((512, 512), jnp.bfloat16),
    )
    f = lambda x, w: block_sparse_matmul(x, w, target=V5E)
    lowered = jax.jit(f).trace(x, weight).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_choice_says_why_no_kernel_runs() -> None:
    wide = floating(0, (128, 128))
    x, fine = normal(0, 2, 600), floating(0, (64, 64))
    how = lambda w, target: choose(w, x, layout=TPU, target=target)
    assert "row by row" in how(wide, CPU).how
    assert "no kernel for this device" in how(wide, Target("gpu", "NVIDIA H200")).how
    assert "no multiples of 128 x 128" in how(fine, V5E).how
    many = BlockSparse(
        jax.ShapeDtypeStruct((4096, 64, 128, 128), jnp.float32),
        jax.ShapeDtypeStruct((4096, 64), jnp.int32),
    )
    assert "scalar memory" in how(many, V5E).how
    long = jax.ShapeDtypeStruct((2, 128 * 512), jnp.float32)
    assert "VMEM" in choose(wide, long, layout=TPU, target=V5E).how
    big = floating(0, (1024, 512), rows=1)
    assert "does not fit in a step" in how(big, V5E).how
    half = wide._replace(values=wide.values.astype(np.float16))
    assert "not ['float32', 'float16']" in how(half, V5E).how
    codes, _ = coded("int4", (128, 128), 1)
    portable = choose(codes, x, formats.INT4, layout=PORTABLE, target=V5E)
    assert "portable layout" in portable.how
    table = formats.Table(values=tuple(range(17)))
    large = choose(codes, x, table, layout=TPU, target=V5E)
    assert "more than 16 entries" in large.how


WEIGHT, X = floating(0, (8, 16)), normal(0, 3, 80)
CODES = coded("int4", (8, 16), 4)[0]
CHANGED = CODES.values._replace


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(X, block=(0, 4)), ValueError, "block must"),
        (lambda: pack(X, block=(1, 16), capacity=6), ValueError, "from 1 to the 5"),
        (
            lambda: jax.jit(lambda d: pack(d, block=(1, 16)))(X),
            ValueError,
            "given under jit",
        ),
        (lambda: repack(CODES, formats.INT4, to=TPU), ValueError, "multiples of"),
        (
            lambda: block_sparse_matmul(np.ones((2, 80), np.int32), WEIGHT),
            TypeError,
            "x must be floating",
        ),
        (
            lambda: block_sparse_matmul(
                X, WEIGHT._replace(columns=WEIGHT.columns * 1.0)
            ),
            TypeError,
            "columns must be int32",
        ),
        (lambda: block_sparse_matmul(X, WEIGHT, formats.INT4), ValueError, "fmt must"),
        (lambda: block_sparse_matmul(X, CODES), ValueError, "fmt must"),
        (lambda: block_sparse_matmul(X, WEIGHT, n=41), ValueError, "n must"),
        (lambda: block_sparse_matmul(X, WEIGHT, n=32), ValueError, "n must"),
        (
            lambda: block_sparse_matmul(X, WEIGHT, layout=TPU, target=CPU),
            ValueError,
            "layout must be the device's",
        ),
        (
            lambda: block_sparse_matmul(
                X, WEIGHT._replace(values=WEIGHT.values[:, :2])
            ),
            ValueError,
            "values must begin",
        ),
        (
            lambda: block_sparse_matmul(X, jax.tree.map(lambda a: a[None], WEIGHT)),
            ValueError,
            r"x must be \[\*stack",
        ),
        (
            lambda: block_sparse_matmul(X, CODES, formats.INT4, layout=TPU, target=V5E),
            TypeError,
            "words of the tpu layout must be int32",
        ),
        (
            lambda: block_sparse_matmul(
                X,
                CODES._replace(values=CHANGED(scale=CODES.values.scale[..., 0, :])),
                formats.INT4,
            ),
            ValueError,
            "values must begin",
        ),
        (
            lambda: block_sparse_matmul(
                X,
                CODES._replace(values=CHANGED(scale=CODES.values.scale[..., :4, :])),
                formats.INT4,
            ),
            ValueError,
            "one for each output of a block",
        ),
        (
            lambda: block_sparse_matmul(X, CODES, formats.INT3),
            ValueError,
            "whole bytes",
        ),
    ],
)
def test_errors_name_the_rule(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
