"""`nm_sparse_matmul`: packing, every form against float64, gradients, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats
from kernels_pallas.layouts import PORTABLE, TPU, Weight
from kernels_pallas.nm_sparse_matmul import (
    NMSparse,
    choose,
    nm_sparse_matmul,
    pack,
    reference,
    repack,
    restore,
    tpu,
    unpack,
)
from kernels_pallas.target import Target
from tests.kernels.weights import (
    FORMATS,
    matmul_bound,
    random_weight,
    stream,
)

V5E, CPU = Target("tpu", "TPU v5 lite"), Target("cpu", "cpu")
PATTERNS = ((2, 4), (3, 8), (5, 16), (4, 4))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def places_of(seed: int, n: int, m: int, rows: int, k: int) -> np.ndarray:
    """Ascending places ``[rows, G, n]``."""
    order = np.random.default_rng(seed).random((rows, -(-k // m), m)).argsort(-1)
    return np.sort(order[..., :n], axis=-1)


def bits_of(m: int) -> int:
    return {4: 2, 8: 3, 16: 4}[m]


def dense_of(values: np.ndarray, places: np.ndarray, m: int, k: int) -> np.ndarray:
    """The dense weight, number by number."""
    rows, groups, n = places.shape
    dense = np.zeros((rows, groups * m))
    for (r, g, i), place in np.ndenumerate(places):
        dense[r, g * m + place] = values[r, g * n + i]
    return dense[:, :k]


def packed_places(places: np.ndarray, m: int) -> jax.Array:
    flat = places.reshape(len(places), -1)
    return jnp.asarray(np.stack([stream(row, bits_of(m)) for row in flat]))


def floating(n: int, m: int, rows: int, k: int) -> tuple[NMSparse, np.ndarray]:
    """A weight of floats, and the dense one."""
    places = places_of(0, n, m, rows, k)
    values = normal(1, rows, places.shape[1] * n)
    return NMSparse(values, packed_places(places, m)), dense_of(values, places, m, k)


def coded(
    name: str, n: int, m: int, rows: int, k: int, scales: int
) -> tuple[NMSparse, np.ndarray]:
    """A weight of codes, and the dense one."""
    places, rng = places_of(2, n, m, rows, k), np.random.default_rng(3)
    kept = places.shape[1] * n
    values, dense = random_weight(rng, FORMATS[name], rows, kept, scales)
    return NMSparse(values, packed_places(places, m)), dense_of(dense, places, m, k)


def assert_close(
    y: Any, x: np.ndarray, w: np.ndarray, product: float = 2.0**-22
) -> None:
    """Against float64, within the bound of float32 sums."""
    error = np.abs(np.asarray(y, np.float64) - x.astype(np.float64) @ w.T)
    assert (error <= matmul_bound(x, w, product)).all(), error.max()


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packing_keeps_the_largest_the_first_of_equals(n: int, m: int) -> None:
    # Integers, so that many magnitudes are equal.
    dense = np.random.default_rng(4).integers(-3, 4, (2, 3, 37)).astype(np.float32)
    packed = jax.jit(lambda d: pack(d, n=n, m=m))(dense)
    wanted = np.zeros_like(dense)
    for at in np.ndindex(2, 3, -(-37 // m)):
        group = dense[at[0], at[1], at[2] * m :][:m]
        best = sorted(range(len(group)), key=lambda i, g=group: (-abs(g[i]), i))[:n]
        for i in best:
            wanted[at[0], at[1], at[2] * m + i] = group[i]
    assert (np.asarray(unpack(packed, n=n, m=m, k=37)) == wanted).all()
    kept = (37 + m - 1) // m * n
    assert packed.indices.shape[-1] == (kept * bits_of(m) + 7) // 8


def test_agrees_with_float64_for_any_size() -> None:
    made = {p: floating(*p, 13, 37) for p in PATTERNS}
    xs = {
        p: normal(5, rows, 37) for p, rows in zip(PATTERNS, (1, 3, 8, 17), strict=True)
    }

    @jax.jit
    def run(xs: list[Any], weights: list[NMSparse]) -> Any:
        return [
            (
                nm_sparse_matmul(x, w, n=n, m=m, target=CPU),
                reference.nm_sparse_matmul(x, w, None, n=n, m=m),
                nm_sparse_matmul(
                    x.astype(jnp.bfloat16),
                    w,
                    n=n,
                    m=m,
                    dtype=jnp.float32,
                    target=Target("gpu", "NVIDIA H200"),
                ),
            )
            for (n, m), x, w in zip(PATTERNS, xs, weights, strict=True)
        ]

    ys = run(list(xs.values()), [w for w, _ in made.values()])
    for (plain, known, half), p in zip(ys, PATTERNS, strict=True):
        x, dense = xs[p], made[p][1]
        assert_close(plain, x, dense)
        assert_close(known, x, dense)
        assert_close(half, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), dense)


def test_every_format_agrees_with_float64_in_a_stack() -> None:
    made = {name: coded(name, 2, 4, 6, 48, 3) for name in FORMATS}
    x = normal(6, 2, 2, 3, 48)
    double = lambda w: jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), w)
    run = jax.jit(
        lambda x, ws: {
            name: nm_sparse_matmul(x, double(w), FORMATS[name], n=2, m=4, target=CPU)
            for name, w in ws.items()
        }
    )
    for name, y in run(x, {name: w for name, (w, _) in made.items()}).items():
        for s, dense in enumerate((made[name][1], made[name][1][::-1])):
            assert_close(y[s].reshape(6, 6), x[s].reshape(6, 48), dense)


def test_gradients_are_those_of_the_kept_weights() -> None:
    n, m, k = 3, 8, 1301
    weight, dense = floating(n, m, 500, k)
    x, dy = normal(7, 3, k), normal(8, 3, 500)

    @jax.jit
    def run(x: Any, values: Any, dy: Any) -> Any:
        def f(x: Any, values: Any) -> Any:
            w = weight._replace(values=values)
            return nm_sparse_matmul(x, w, n=n, m=m, target=CPU)

        return jax.vjp(f, x, values)[1](dy)

    dx, dvalues = run(x, weight.values, dy)
    assert_close(dx, dy, dense.T)
    places = places_of(0, n, m, 500, k)
    kept = dense_of(np.ones_like(dvalues), places, m, k) == 1
    found = dense_of(np.asarray(dvalues), places, m, k)
    error = np.abs(found - dy.T.astype(np.float64) @ x)
    assert (error <= matmul_bound(dy.T, x.T))[kept].all()
    assert not found[~kept].any()


@pytest.mark.parametrize("name", ["uint4", "nf4"])
def test_gradients_of_scales_and_zero_points(name: str) -> None:
    weight, dense = coded(name, 2, 4, 7, 32, 2)
    x, dy = normal(9, 3, 32), normal(10, 3, 7)
    scale, zero = weight.values.scale, weight.values.zero
    zero = None if zero is None else zero.astype(jnp.float32)

    @jax.jit
    def run(scale: Any, zero: Any) -> Any:
        def f(scale: Any, zero: Any) -> Any:
            w = weight._replace(values=weight.values._replace(scale=scale, zero=zero))
            return nm_sparse_matmul(x, w, FORMATS[name], n=2, m=4, target=CPU)

        return jax.vjp(f, scale, zero)[1](dy)

    dscale, dzero = run(scale, zero)
    by_scale = lambda a: a.reshape(7, 2, 16).sum(-1)
    outer, s = dy.T.astype(np.float64) @ x, np.asarray(scale, np.float64)
    size = np.abs(dy.T).astype(np.float64) @ np.abs(x)
    kept = dense_of(np.ones((7, 16)), places_of(2, 2, 4, 7, 32), 4, 32)
    error = np.abs(np.asarray(dscale) - by_scale(outer * dense) / s)
    # Zero points are subtracted exactly: both are integers.
    assert (error <= by_scale(size * np.abs(dense)) / s * 2.0**-19).all()
    if zero is not None:
        error = np.abs(np.asarray(dzero) + by_scale(outer * kept) * s)
        assert (error <= by_scale(size * kept) * s * 2.0**-19).all()


def test_tpu_kernel_of_floats_agrees_and_repacking_undoes_itself() -> None:
    n, m, rows, k = 2, 4, 150, 1030
    weight, dense = floating(n, m, rows, k)
    x = normal(11, 3, k)
    half = lambda a: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32)

    @jax.jit
    def run(x: Any, weight: NMSparse) -> Any:
        stored = repack(weight, n=n, m=m, k=k, to=TPU)
        back = restore(stored, n=n, m=m, k=k, outputs=rows, layout=TPU)
        blocks = tpu.Blocks(16, 128, 128)
        y = tpu.nm_sparse_matmul(
            x, stored, None, n=n, m=m, blocks=blocks, interpret=True
        )
        options = {"n": n, "m": m, "outputs": rows, "layout": TPU, "target": V5E}
        narrow = stored._replace(values=stored.values.astype(jnp.bfloat16))
        low = nm_sparse_matmul(
            x.astype(jnp.bfloat16),
            narrow,
            **options,
            dtype=jnp.float32,
            interpret=True,
        )
        return y[:, :rows], low, back

    y, low, back = run(x, weight)
    assert_close(y, x, dense)
    assert_close(low, half(x), half(dense).astype(np.float64))
    assert jax.tree.all(jax.tree.map(np.array_equal, back, weight))


def test_tpu_kernel_of_codes_agrees_and_repacking_undoes_itself() -> None:
    cases = {"int4": (2, 4), "uint4": (3, 8), "int2": (4, 8), "nf4": (2, 16)}
    rows, k, scales = 9, 768, 3
    made = {c: coded(c, *p, rows, k, scales) for c, p in cases.items()}
    x = normal(12, 3, k)

    sizes = {"outputs": rows, "scales": scales, "layout": TPU}
    pattern = lambda name: dict(zip("nm", cases[name], strict=True))

    # Apart from the kernel: the CPU compiler of jax 0.10 fails on bitcasts of bitcasts
    # to codes of 2 bits.
    @jax.jit
    def store(weights: dict[str, NMSparse]) -> Any:
        to, back = {}, {}
        for name, w in weights.items():
            fmt, options = FORMATS[name], pattern(name) | {"k": k}
            to[name] = repack(w, fmt, **options, to=TPU)
            back[name] = restore(to[name], fmt, **options, **sizes)
        return to, back

    @jax.jit
    def run(x: Any, weights: dict[str, NMSparse]) -> Any:
        options = sizes | {"target": V5E, "interpret": True}
        return {
            name: nm_sparse_matmul(x, w, FORMATS[name], **pattern(name), **options)
            for name, w in weights.items()
        }

    stored, back = store({name: w for name, (w, _) in made.items()})
    ys = run(x, stored)
    for name, (w, dense) in made.items():
        assert_close(ys[name], x, dense)
        assert jax.tree.all(jax.tree.map(np.array_equal, back[name], w)), name


def test_gradients_of_the_tpu_layout_are_the_portable_ones() -> None:
    fmt, k = formats.INT4, 512
    weight, _ = coded("int4", 2, 4, 9, k, 2)
    x = normal(13, 3, k)

    @jax.jit
    def run(x: Any, weight: NMSparse) -> Any:
        def loss(x: Any, w: NMSparse, **options: Any) -> Any:
            y = nm_sparse_matmul(x, w, fmt, n=2, m=4, **options)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

        take = jax.grad(loss, argnums=(0, 1), allow_int=True)
        stored = repack(weight, fmt, n=2, m=4, k=k, to=TPU)
        sizes = {"outputs": 9, "scales": 2, "layout": TPU, "target": V5E}
        found = [
            take(x, weight, target=CPU),
            take(x, stored, **sizes, interpret=True),
        ]
        return [(dx, dw.values.scale) for dx, dw in found]

    (dx, dscale), (chip_dx, chip_dscale) = run(x, weight)
    np.testing.assert_array_equal(dx, chip_dx)
    np.testing.assert_array_equal(dscale, chip_dscale.T[:9])
    assert np.abs(dscale).max() > 1


@pytest.mark.parametrize(("groups", "scales"), [(2176, 68), (4224, 128), (1280, 2)])
def test_a_block_takes_scales_by_eights(groups: int, scales: int) -> None:
    rows = tpu.scale_rows_for(groups, scales)
    blocks = tpu.blocks_for(16, groups, 1024, rows)
    assert groups // scales % rows == 0
    assert groups % blocks.groups == 0
    assert blocks.groups <= 512
    assert blocks.groups % 128 == blocks.groups // rows % 8 == 0


def test_lowers_for_a_tpu() -> None:
    shape = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    layout = lambda w: repack(pack(w, n=2, m=4), n=2, m=4, k=512, to=TPU)
    weight = jax.eval_shape(layout, shape)
    f = lambda x, w: nm_sparse_matmul(x, w, n=2, m=4, layout=TPU, target=V5E)
    traced = jax.jit(f).trace(jax.ShapeDtypeStruct((5, 512), jnp.bfloat16), weight)
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_choice_says_why_no_kernel_runs() -> None:
    weight, _ = floating(2, 4, 3, 8)
    x = normal(0, 2, 8)

    def how(target: Target, x: Any = x, fmt: Any = None, layout: Any = TPU) -> str:
        return choose(weight, x, fmt, n=2, m=4, layout=layout, target=target).how

    assert "some outputs at a time" in how(CPU)
    assert "no kernel for this device" in how(Target("gpu", "NVIDIA H200"))
    assert "portable layout" in how(V5E, layout=PORTABLE)
    assert "2 bits do not compile" in how(Target("tpu", "TPU v4"))
    assert "not ['float16', 'float32']" in how(V5E, x.astype(np.float16))
    table = formats.Table(values=tuple(range(17)))
    assert "more than 16 entries" in how(V5E, fmt=table)
    assert "in the TPU kernel" in how(V5E)


WEIGHT, X = floating(2, 4, 3, 16)[0], normal(0, 2, 16)
CODES = coded("int4", 2, 4, 3, 16, 2)[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(X, n=2, m=5), ValueError, "m must be one of"),
        (lambda: pack(X, n=5, m=4), ValueError, "n must be from 1 to m"),
        (lambda: pack(X[0], n=2, m=4), ValueError, "dense must"),
        (
            lambda: nm_sparse_matmul(X.astype(np.int32), WEIGHT, n=2, m=4),
            TypeError,
            "x must be floating",
        ),
        (lambda: nm_sparse_matmul(X, CODES, n=2, m=4), ValueError, "fmt must"),
        (
            lambda: nm_sparse_matmul(X, WEIGHT, n=2, m=4, layout=TPU, target=V5E),
            TypeError,
            "words of the tpu layout must be int32",
        ),
        (
            lambda: nm_sparse_matmul(
                X,
                jax.eval_shape(lambda w: repack(w, n=2, m=4, k=16, to=TPU), WEIGHT),
                n=2,
                m=4,
                layout=TPU,
                target=CPU,
            ),
            ValueError,
            "layout must be the device's",
        ),
        (
            lambda: nm_sparse_matmul(X, WEIGHT, n=2, m=4, outputs=2),
            ValueError,
            "outputs must",
        ),
        (
            lambda: nm_sparse_matmul(X, CODES, formats.INT4, n=2, m=4, scales=3),
            ValueError,
            "scales must",
        ),
        (
            lambda: nm_sparse_matmul(X, CODES, formats.INT8, n=2, m=4),
            ValueError,
            "indices and values must",
        ),
        (
            lambda: nm_sparse_matmul(X[:, :12], WEIGHT, n=2, m=4),
            ValueError,
            "Check that x has the inputs",
        ),
        (
            lambda: nm_sparse_matmul(
                X, jax.tree.map(lambda a: a[None], WEIGHT), n=2, m=4
            ),
            ValueError,
            "begin with the stack",
        ),
        (
            lambda: nm_sparse_matmul(
                X,
                CODES._replace(values=Weight(CODES.values.words, jnp.ones((2, 2)))),
                formats.INT4,
                n=2,
                m=4,
            ),
            ValueError,
            "indices and values must",
        ),
    ],
)
def test_errors_name_the_rule(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
