"""Searched ranges against NumPy searches, and what must not get worse."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.lift import statistics
from jaxcompress.quant._quantize import encode

quantize = jax.jit(q.quantize, static_argnames=("fmt", "axes"))
dense = jax.jit(lambda leaf: leaf.materialize())


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def heavy(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def square_errors(w: np.ndarray, fmt: q.NumberFormat, group: int) -> np.ndarray:
    """Of each group of inputs, ``[K // group, out]``."""
    error = np.float64(dense(quantize(w, fmt))) - w
    return np.square(error).reshape(-1, group, w.shape[1]).sum(1)


def round_to(w: np.ndarray, low: float, high: float, levels: int) -> np.ndarray:
    """Integers of a range of which zero is a point, in float64."""
    step = (high - low) / levels
    zero = np.rint(-low / step)
    return (np.clip(np.rint(w / step) + zero, 0, levels) - zero) * step


def symmetric_error(w: np.ndarray, scale: float, top: int) -> float:
    codes = np.clip(np.rint(w / scale), -top, top)
    return float(np.square(codes * scale - w).sum())


# -- squared error


@pytest.mark.parametrize(("bits", "draw"), [(2, gaussian), (3, heavy), (4, heavy)])
def test_mse_is_the_least_over_the_ratios(bits: int, draw: Any) -> None:
    w, top = draw(0, 32, 3), 2 ** (bits - 1) - 1
    search = q.mse(steps=20, shrink=0.3)
    found = square_errors(w, q.integer(bits, group_size=16, search=search), 16)
    ratios = 1 - np.arange(21) / 20 * 0.7
    default = 0.0
    for (g, o), error in np.ndenumerate(found):
        block = np.float64(w[16 * g : 16 * (g + 1), o])
        step = np.abs(block).max() / top
        tried = [symmetric_error(block, r * step, top) for r in ratios]
        np.testing.assert_allclose(error, min(tried), rtol=2e-3)
        default += tried[0]
    assert found.sum() < 0.99 * default


def test_mse_of_shared_powers_of_two_is_the_least_over_exponents() -> None:
    w = heavy(1, 64, 4)
    found = square_errors(w, q.mxfp4(search=q.mse(shrink=0.25)), 32)
    points = np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    points = np.concatenate([-points[::-1], points])
    default = 0
    for (g, o), error in np.ndenumerate(found):
        block = np.float64(w[32 * g : 32 * (g + 1), o])
        exponent = np.floor(np.log2(np.abs(block).max())) - 2
        tried = []
        for e in exponent + np.array([0, 1, -1, -2]):
            nearest = np.abs(block[:, None] - points * 2.0**e).min(1)
            tried.append(np.square(nearest).sum())
        np.testing.assert_allclose(error, min(tried), rtol=1e-5)
        default += tried[0] == min(tried)
    assert 0 < default < found.size


def test_with_a_zero_point_each_end_shrinks_for_itself() -> None:
    w = np.random.default_rng(2).uniform(-1, 0.3, (1024, 1)).astype(np.float32)
    w[5, 0] = 2.0  # Worth clipping, which must not clip the many at -1.
    search = q.mse(steps=20, shrink=0.3)
    found = square_errors(w, q.int3(symmetric=False, search=search), 1024).item()
    block, ratios = np.float64(w[:, 0]), 1 - np.arange(21) / 20 * 0.7

    def error(a: float, b: float) -> float:
        grid = round_to(block, a * block.min(), b * block.max(), 7)
        return float(np.square(grid - block).sum())

    together = min(error(r, r) for r in ratios)
    each = min(error(a, b) for a in ratios for b in ratios)
    assert found < 0.9 * together
    assert found < 1.1 * each


SEARCHABLE = [
    q.integer(4, narrow=False),
    q.int3(symmetric=False, group_size=32),
    q.fp4_e2m1(group_size=32),
    q.nf4(group_size=32),
    q.mxfp4(),
    q.nvfp4(),
    q.int4(scale_dtype="bfloat16", granularity=q.Block2D(out=4, contract=16)),
]


@pytest.mark.parametrize("fmt", SEARCHABLE, ids=lambda fmt: fmt.name)
def test_mse_lowers_the_error_and_is_a_projection(fmt: q.NumberFormat) -> None:
    searched = fmt.replace(search=q.mse(steps=12))
    w = np.concatenate([gaussian(3, 64, 8), heavy(4, 64, 8)], 1)
    w[:32, 3] = 0
    once = quantize(w, searched)
    before, after = (
        np.square(np.float64(dense(leaf)) - w) for leaf in (quantize(w, fmt), once)
    )
    for half in (slice(0, 8), slice(8, 16)):
        assert after[:, half].sum() < before[:, half].sum()
    assert not np.asarray(dense(once))[:32, 3].any()
    if fmt.scale == "nvfp4":  # That of the largest weight, which is not clipped.
        np.testing.assert_array_equal(once.tensor_scale, quantize(w, fmt).tensor_scale)
    twice = quantize(dense(once), searched)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_a_tie_keeps_the_full_range() -> None:
    w = np.full((32, 1), 4.0, np.float32)  # On the grids of 2^0 and 2^1.
    assert quantize(w, q.mxfp4(search=q.mse())).scales().item() == 1.0


def test_importance_says_which_errors_count() -> None:
    w = gaussian(6, 2, 4, 8, 3)
    w[:, 1, 7] = 8.0
    axes = jc.Axes(contract=(-2, -3), stack=1)  # Inputs flatten as [8, 4].
    fmt = q.int3(search=q.mse())
    importance = np.ones((2, 8, 4), np.float32)
    importance[0, 7, 1], importance[1, 7, 1] = 0.0, 100.0

    def run(w: Any, importance: Any, axes: Any = None) -> Any:
        return encode(w, fmt, axes=axes, importance=importance).materialize()

    run = jax.jit(run, static_argnames="axes")
    found = np.asarray(run(w, importance.reshape(2, 32), axes))
    assert (found[0, 1, 7] < 4).all()
    assert (np.abs(found[1, 1, 7] - 8) < 1).all()
    plain = w[1].transpose(1, 0, 2).reshape(32, 3)
    alone = np.asarray(run(plain, importance[1].ravel())).reshape(8, 4, 3)
    np.testing.assert_array_equal(found[1], alone.transpose(1, 0, 2))


@pytest.mark.parametrize("fmt", [q.int3(group_size=16), q.integer(3, symmetric=False)])
def test_moments_of_the_inputs_weigh_errors_of_a_blocks_outputs(fmt: Any) -> None:
    """Least among all scales that a search could have taken; a diagonal is a vector."""
    fmt = fmt.replace(search=q.mse(steps=8, shrink=0.5))
    w, x = gaussian(3, 2, 32, 3), gaussian(4, 2, 64, 32)
    w[0, 3, 1] = 6.0
    x = x + 2 * x[..., :1]
    gram = np.swapaxes(x, 1, 2) @ x
    run = jax.jit(lambda w, g: encode(w, fmt, axes=-2, importance=g).materialize())
    size = fmt.granularity.size if hasattr(fmt.granularity, "size") else 32

    def errors(importance: np.ndarray) -> np.ndarray:
        delta = (np.asarray(run(w, importance)) - w).reshape(2, -1, size, 3)
        blocks = gram.reshape(2, 32 // size, size, 32 // size, size)
        own = np.stack([blocks[:, i, :, i] for i in range(32 // size)], 1)
        return np.einsum("sgio,sgij,sgjo->sgo", delta, own, delta)

    diagonal = np.einsum("sii->si", gram)
    by_outputs, by_inputs = errors(gram), errors(diagonal)
    if fmt.element.symmetric:  # Else the ends are searched in turn.
        assert (by_outputs <= by_inputs * (1 + 1e-5)).all()
    assert by_outputs.sum() < 0.98 * by_inputs.sum()
    only = np.eye(32, dtype=np.float32) * diagonal[:, None]
    np.testing.assert_array_equal(run(w, only), run(w, diagonal))


@pytest.mark.parametrize("gram", [False, True])
def test_an_expert_that_saw_nothing_has_the_range_of_its_weights(gram: bool) -> None:
    w, fmt = gaussian(7, 2, 32, 3), q.int3(search=q.mse(), axes=-2)
    w[1, 3, 1] = 6.0
    x, rows = gaussian(8, 2, 16, 32), np.array([[1.0], [0.0]], np.float32)

    def run(w: Any, x: Any) -> Any:
        stats = statistics(x, weights=np.broadcast_to(rows, (2, 16)), gram=gram)
        leaves = q.round_weight(w, fmt, stats), q.quantize(w, fmt)
        return [leaf.materialize() for leaf in leaves]

    found, plain = map(np.asarray, jax.jit(run)(w, x))
    np.testing.assert_array_equal(found[1], plain[1])
    assert (found[0] != plain[0]).any()


# -- percentile


@pytest.mark.parametrize("percent", [60.0, 90.0, 100.0])
def test_percentile_is_a_weight_of_that_rank(percent: float) -> None:
    w = heavy(9, 48, 2)
    rank = int(np.ceil(percent / 100 * 24)) - 1
    scales = quantize(w, q.int4(group_size=24, search=q.percentile(percent))).scales()
    ranked = np.sort(np.abs(w).reshape(2, 24, 2), 1)[:, rank]
    np.testing.assert_allclose(scales, ranked.T / 7, rtol=2**-14)
    fmt = q.int4(symmetric=False, group_size=24, search=q.percentile(percent))
    ranked = np.sort(w.reshape(2, 24, 2), 1)
    width = np.maximum(ranked[:, rank], 0) - np.minimum(ranked[:, 23 - rank], 0)
    np.testing.assert_allclose(quantize(w, fmt).scales(), width.T / 15, rtol=2**-14)


def test_a_percentile_of_all_is_the_largest_weight() -> None:
    w, fmt = heavy(10, 64, 4), q.mxfp4()
    same = quantize(w, fmt), quantize(w, fmt.replace(search=q.percentile(100)))
    for a, b in zip(*map(jax.tree.leaves, same), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_percentile_is_a_projection() -> None:
    fmt = q.nf4(group_size=16, search=q.percentile(80))
    once = quantize(heavy(10, 64, 4), fmt)
    jax.tree.map(np.testing.assert_array_equal, once, quantize(dense(once), fmt))


# -- half-quadratic


def hqq_oracle(
    w: np.ndarray, bits: int, symmetric: bool, steps: int, p: float
) -> float:
    """Least ``sum |w - w_hat|^p`` over the iterates, of one block in float64."""
    low, high = (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    z = 0.0
    if symmetric:
        unit = np.abs(w).max() / high
    else:
        low, high = 0, 2**bits - 1
        unit = (max(w.max(), 0) - min(w.min(), 0)) / high
        z = np.rint(-min(w.min(), 0) / unit)
    s, beta, errors = unit, 10.0, []
    for _ in range(steps + 1):
        v = np.clip(np.rint(w / s) + z, low, high) - z
        residual = w - v * s
        errors.append((np.abs(residual) ** p).sum())
        x = residual / unit
        size = np.abs(x)
        e = np.sign(x) * np.maximum(
            size - np.where(size > 0, size, 1) ** (p - 1) / beta, 0
        )
        target = w - e * unit
        if not symmetric:
            z_next = z + (v - target / s).mean()
        s = np.clip((v * target).sum() / (v * v).sum(), unit / 8, unit)
        if not symmetric:
            z = max(np.rint(z_next), high - np.rint(w.max() / s))
            z = np.clip(min(z, low - np.rint(w.min() / s)), low, high)
        beta *= 1.01
    return min(errors)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_finds_the_iterate_of_least_error(symmetric: bool) -> None:
    w = heavy(11, 64, 4)
    base = q.int3(group_size=32, symmetric=symmetric)
    plain, leaf = quantize(w, base), quantize(w, base.replace(search=q.hqq(steps=15)))
    before, found = (
        (np.abs(np.float64(dense(a)) - w) ** 0.7).reshape(2, 32, 4).sum(1)
        for a in (plain, leaf)
    )
    expected = [
        [
            hqq_oracle(np.float64(w[g : g + 32, o]), 3, symmetric, 15, 0.7)
            for o in range(4)
        ]
        for g in (0, 32)
    ]
    # A code at a tie may fall to either side: in one block of eight, at most.
    assert (np.abs(found / expected - 1) < 1e-3).sum() >= 7
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert (found <= before * (1 + 1e-6)).all()
    assert found.sum() < 0.96 * before.sum()


@pytest.mark.parametrize(
    "fmt",
    [
        q.int2(symmetric=False, group_size=16, search=q.hqq()),
        q.nf4(group_size=16, search=q.hqq(norm=1.0)),
    ],
    ids=lambda fmt: fmt.name,
)
def test_hqq_is_a_projection_that_keeps_zeros(fmt: q.NumberFormat) -> None:
    w = heavy(12, 64, 6)
    w[:16, 0] = 0
    w[16:32, 0] = 0.3
    w[::5] = 0
    once = quantize(w, fmt)
    assert not np.asarray(dense(once))[w == 0].any()
    twice = quantize(dense(once), fmt)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


# -- edges


@pytest.mark.parametrize(
    ("search", "symmetric"),
    [(q.mse(steps=3), False), (q.percentile(70), True), (q.hqq(steps=3), False)],
)
def test_blocks_of_one_value_and_of_one_weight(search: Any, symmetric: bool) -> None:
    constant = np.repeat(np.float32([[0.0, 2.0, -3.0]]), 8, 0)
    for size in (8, 1):
        fmt = q.int8(group_size=size, symmetric=symmetric, search=search)
        np.testing.assert_allclose(dense(quantize(constant, fmt)), constant, 1e-4)


def test_errors() -> None:
    for make in (q.ternary, q.binary):
        with pytest.raises(ValueError, match="search must be left out"):
            make(search=q.mse())
    with pytest.raises(ValueError, match="mxfp4: hqq"):
        q.mxfp4(search=q.hqq())
    with pytest.raises(ValueError, match=r"percent must be in \(50, 100\]; got 50"):
        q.percentile(50)
    with pytest.raises(ValueError, match="steps must be positive"):
        q.mse(shrink=1.0)
    with pytest.raises(ValueError, match="norm in"):
        q.hqq(norm=2.0)
