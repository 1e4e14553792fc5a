"""GPTQ against Algorithm 1 in float64, and what coordinate descent promises."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import quant as q
from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics, statistics
from jaxcompress.quant import _feedback
from jaxcompress.quant._gptq import factorize, gptq_weight
from jaxcompress.quant._reconstruct import lay
from jaxcompress.quant._steps import static_steps
from tests.quant.wrapping import materialize, quantize

K, R = 24, 6
DAMPING = 0.01
PLAIN = q.int4()
GROUPS = q.int3(group_size=8, symmetric=False)
FROM_THE_PAPER = {"candidates": 1, "block": 5, "damping": DAMPING}
"""No search; settings that tests share, so that each run is compiled once."""


@functools.cache
def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs, some of them large, and a weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(96, 8)) @ rng.normal(size=(8, K)) + rng.normal(size=(96, K))
    x[:, ::7] *= 4
    return x.astype(np.float32), rng.normal(size=(K, R)).astype(np.float32)


moments = jax.jit(functools.partial(statistics, gram=True))


def seen(x: np.ndarray) -> Statistics:
    return moments(jnp.asarray(x))


def dense(leaf: Any) -> np.ndarray:
    return np.asarray(materialize(leaf))


def loss(x: np.ndarray, w: np.ndarray, value: np.ndarray, damping: float = 0) -> float:
    """``|X (W - Q)|^2 / n``, plus the damping's part."""
    h = np.float64(x).T @ x / len(x)
    h += damping * np.diagonal(h).mean() * np.eye(len(h))
    e = np.float64(w) - value
    return np.einsum("ko,kl,lo->", e, h, e)


# -- the definition


def sixteen_bits(x: np.ndarray) -> np.ndarray:
    fraction, exponent = np.frexp(np.float64(np.float32(x)))
    return np.ldexp(np.floor(fraction * 2**16 + 0.5), exponent - 16)


def grid(w: np.ndarray, fmt: q.NumberFormat) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a row of blocks: of their largest weights."""
    low, high = fmt.element.low, fmt.element.high
    if fmt.element.symmetric:
        return sixteen_bits(np.abs(w).max(0) / high), np.zeros(w.shape[1])
    least, most = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    first = np.float64(most - least) / (high - low)
    return sixteen_bits(first), np.clip(low - np.round(least / first), low, high)


def algorithm_1(
    x: np.ndarray, w: np.ndarray, fmt: q.NumberFormat, act_order: bool = False
) -> np.ndarray:
    """Frantar et al., 2022, Algorithm 1, one column a block; groups as they come."""
    h = np.float64(x).T @ x / len(x)
    h += DAMPING * np.diagonal(h).mean() * np.eye(len(h))
    order = np.arange(K)
    if act_order:
        order = np.argsort(-np.diagonal(np.float64(x).T @ x), kind="stable")
    size = getattr(fmt.granularity, "size", K)
    steps = {g: grid(w[g : g + size], fmt) for g in range(0, K, size)}
    h, w = h[np.ix_(order, order)], np.float64(w[order])
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for i, k in enumerate(order):
        if not act_order and i % size == 0:
            steps[i] = grid(w[i : i + size], fmt)
        scale, zero = steps[k - k % size]
        code = np.round(w[i] / scale) + zero
        value = (np.clip(code, fmt.element.low, fmt.element.high) - zero) * scale
        out[k] = value
        error = (w[i] - value) / upper[i, i]
        w[i:] -= upper[i, i:, None] * error
    return out


by_the_paper = jax.jit(
    functools.partial(gptq_weight, refine=0, **FROM_THE_PAPER),
    static_argnames=("fmt", "act_order", "axes"),
)


@pytest.mark.parametrize(
    ("fmt", "act_order"),
    [(PLAIN, False), (GROUPS, False), (GROUPS, True)],
    ids=["channels", "groups", "act_order"],
)
def test_the_paper(fmt: q.NumberFormat, act_order: bool) -> None:
    x, w = problem()
    leaf = by_the_paper(jnp.asarray(w), fmt, seen(x), act_order=act_order)
    expected = algorithm_1(x, w, fmt, act_order)
    np.testing.assert_allclose(dense(leaf), expected, rtol=1e-5, atol=1e-6)


def test_better_on_outputs_worse_on_weights() -> None:
    x, w = problem()
    rounded = dense(quantize(jnp.asarray(w), PLAIN))
    value = dense(plain(w, seen(x)))
    assert loss(x, w, value) < 0.6 * loss(x, w, rounded)
    assert np.square(w - value).sum() > np.square(w - rounded).sum()


def plain(w: Any, stats: Statistics | None) -> Any:
    """The run that most tests share."""
    return by_the_paper(jnp.asarray(w), PLAIN, stats)


# -- refining


def test_refining_never_raises_the_error() -> None:
    x, w = problem()
    run = lambda n: gptq_weight(
        jnp.asarray(w), GROUPS, seen(x), refine=n, **FROM_THE_PAPER
    )
    errors = [loss(x, w, dense(run(n)), DAMPING) for n in (0, 1, 30)]
    assert errors[2] < errors[1] < errors[0]
    # At the end no single code can be changed for the better, nor any scale.
    leaf = run(30)
    codes, least = np.asarray(leaf.elements()).astype(int), errors[2]
    for o, k in np.ndindex(codes.shape):
        for step in (-1, 1):
            other = codes.copy()
            other[o, k] += step
            if 0 <= other[o, k] <= 7:
                changed = leaf.with_elements(jnp.asarray(other, jnp.uint8))
                assert loss(x, w, dense(changed), DAMPING) >= least * (1 - 1e-4)
    for ratio in (0.99, 1.01):
        for o, g in np.ndindex(leaf.scale.shape):
            scaled = leaf.replace(scale=leaf.scale.at[o, g].multiply(ratio))
            assert loss(x, w, dense(scaled), DAMPING) >= least * (1 - 1e-4)


def test_searched_ranges_lower_the_error() -> None:
    x, w = problem()
    w = w.copy()
    w[3] *= 8  # An outlier in every block: its range is worth clipping.
    run = lambda n: gptq_weight(
        jnp.asarray(w), GROUPS, seen(x), refine=0, candidates=n, block=5
    )
    assert loss(x, w, dense(run(16))) < 0.9 * loss(x, w, dense(run(1)))


SLOW = pytest.mark.slow
FORMATS = [
    pytest.param(q.int3(granularity=q.Block2D(out=2, contract=8), symmetric=False)),
    pytest.param(q.ternary(group_size=16), marks=SLOW),
    pytest.param(q.nvfp4(), marks=SLOW),
    pytest.param(q.int4(granularity=q.PerTensor()), marks=SLOW),
    pytest.param(q.int8(granularity=q.PerChannel(axes=(-2,))), marks=SLOW),
    pytest.param(q.binary(), marks=SLOW),
    pytest.param(q.nf4(group_size=8, scale_dtype=jnp.bfloat16), marks=SLOW),
    pytest.param(q.fp6_e2m3(), marks=SLOW),
    pytest.param(q.mxfp4(), marks=SLOW),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_formats(fmt: q.NumberFormat) -> None:
    """Valid leaves of every format, in stacks, with less error than rounding."""
    stack, k = 2, 32
    rng = np.random.default_rng(1)
    x = rng.normal(size=(stack, 64, 8)) @ rng.normal(size=(stack, 8, k))
    x = np.float32(x + 0.3 * rng.normal(size=x.shape))
    w = np.float32(rng.normal(size=(stack, k, R)))
    axes = Axes(contract=(-2,), stack=1)
    leaf = gptq_weight(jnp.asarray(w), fmt, seen(x), axes=axes)
    rounded = quantize(jnp.asarray(w), fmt, axes=axes)
    assert jax.tree.structure(leaf) == jax.tree.structure(rounded)
    for ours, theirs in zip(
        jax.tree.leaves(leaf), jax.tree.leaves(rounded), strict=True
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    codes = int(leaf.elements().max())
    assert codes < 2**fmt.element.bits or fmt.element.bits == 8
    for s in range(stack):
        error = loss(x[s], w[s], dense(leaf)[s])
        assert error < 0.9 * loss(x[s], w[s], dense(rounded)[s])


# -- shapes


def test_a_jitted_stack_is_its_entries() -> None:
    (x, w), (y, v) = problem(), problem(1)
    stats = jax.tree.map(lambda a, b: jnp.stack([a, b]), seen(x), seen(y))

    axes = Axes(contract=(-2,), stack=1)
    both = by_the_paper(jnp.asarray(np.stack([w, v])), PLAIN, stats, axes=axes)
    for s, one in enumerate([plain(w, seen(x)), plain(v, seen(y))]):
        np.testing.assert_allclose(dense(both)[s], dense(one), rtol=1e-5, atol=1e-6)


def test_convolution_axes_are_flattened() -> None:
    x, w = problem()
    conv = jnp.asarray(w).reshape(2, 3, 4, R)
    axes = (-4, -3, -2)
    leaf = by_the_paper(conv, PLAIN, seen(x), axes=axes)
    assert leaf.shape == conv.shape
    expected = dense(plain(w, seen(x))).reshape(conv.shape)
    np.testing.assert_allclose(dense(leaf), expected, rtol=1e-6)


# -- what has no answer in the paper


def test_without_data_it_is_rounding() -> None:
    x, w = problem()
    rounded = dense(quantize(jnp.asarray(w), PLAIN))
    for stats in (None, seen(x[:0]), seen(0 * x)):
        np.testing.assert_allclose(dense(plain(w, stats)), rounded, rtol=1e-4)
    overflown = dataclasses.replace(seen(x), gram=jnp.full((K, K), jnp.inf))
    np.testing.assert_allclose(dense(plain(w, overflown)), rounded, rtol=1e-4)


def test_dead_inputs_are_rounded_and_disturb_nothing() -> None:
    x, w = problem()
    x = x.copy()
    x[:, [2, 8]] = 0
    value = dense(plain(w, seen(x)))
    rounded = dense(quantize(jnp.asarray(w), PLAIN))
    np.testing.assert_allclose(value[[2, 8]], rounded[[2, 8]], rtol=1e-4)
    changed = w.copy()
    changed[[2, 8]] *= 0.5
    largest = np.abs(w).argmax(0)
    assert not {2, 8} & set(largest.tolist())  # The scales stay as they were.
    live = np.setdiff1d(np.arange(K), [2, 8])
    other = dense(plain(changed, seen(x)))
    np.testing.assert_allclose(other[live], value[live], rtol=1e-6)


def test_zeros_and_constants() -> None:
    x, w = problem()
    w = w.copy()
    w[:, 0] = 0
    w[:, 1] = 0.25
    value = dense(plain(w, seen(x)))
    assert not value[:, 0].any()
    np.testing.assert_allclose(value[:, 1], 0.25, rtol=1e-4)
    refined = gptq_weight(jnp.zeros((K, R)), GROUPS, seen(x), refine=1)
    assert not dense(refined).any()


def test_a_moment_that_overflowed_counts_as_no_data() -> None:
    x, w = problem()
    stats = seen(x)
    broken = dataclasses.replace(stats, gram=stats.gram.at[1, 1].set(jnp.inf))
    none = dataclasses.replace(stats, gram=jnp.zeros_like(stats.gram))
    np.testing.assert_array_equal(dense(plain(w, broken)), dense(plain(w, none)))


def test_few_rows_make_a_singular_moment() -> None:
    x, w = problem()
    value = dense(plain(w, seen(x[:3])))
    assert np.isfinite(value).all()
    rounded = dense(quantize(jnp.asarray(w), PLAIN))
    assert loss(x[:3], w, value) < 0.5 * loss(x[:3], w, rounded)


def test_factor() -> None:
    x, _ = problem()
    gram = jnp.asarray(x.T @ x / len(x))
    h, feedback, importance, damping = factorize(gram, DAMPING)
    product = np.float64(feedback).T @ (np.float64(importance)[:, None] * feedback)
    np.testing.assert_allclose(product, h, atol=1e-4)
    mean = np.diagonal(gram).mean()
    np.testing.assert_allclose(h, gram / mean + DAMPING * np.eye(K), atol=1e-5)
    assert float(damping) == np.float32(DAMPING)


def test_skipping_what_is_not_there_yet_changes_nothing(monkeypatch: Any) -> None:
    x, w = problem()
    options = {"axes": None, "path": "w", "candidates": 1, "who": "test"}
    laid = lay(jnp.asarray(w), GROUPS, seen(x), **options)
    w, shape = laid.w[0], laid.problem
    factor = factorize(laid.gram[0], DAMPING)
    steps = static_steps(w, factor.importance, laid.tensor[0], shape)
    groups = jnp.arange(K) // (K // shape.groups)

    def choose(i: jax.Array, group: Any) -> Any:
        return _feedback.Choice(jax.tree.map(lambda s: s[i], steps), group)

    def codes(first: bool) -> list[np.ndarray]:
        start = _feedback.empty(w, shape, steps)
        rest = (shape, 4)
        return [
            np.asarray(run(w, start, factor.feedback, how, *rest, first=first).codes)
            for run, how in (
                (_feedback.sweep_all, groups),
                (_feedback.sweep_groups, choose),
            )
        ]

    expected = codes(first=False)
    monkeypatch.setattr(_feedback, "_MANY_INPUTS", 1)
    for mine, other in zip(codes(first=True), expected, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(*expected)


def test_damping_rises_until_the_factor_exists() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(K, 3)).astype(np.float32)
    indefinite = a @ a.T - 0.5 * np.eye(K, dtype=np.float32)
    factor = factorize(jnp.asarray(indefinite), 1e-3)
    assert 0.5 < float(factor.damping) < 11
    assert np.isfinite(factor.feedback).all()
    lowest = np.linalg.eigvalsh(np.float64(factor.h)).min()
    assert lowest > 0
    hopeless = factorize(jnp.asarray(indefinite).at[0, 1].set(1e30), 1e-3)
    assert np.isfinite(hopeless.feedback).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must not be negative; got -1.0"),
        ({"refine": -1}, "refine must not be negative; got -1"),
        ({"block": 0}, "block must be positive; got 0"),
        ({"candidates": 0}, "candidates must be positive; got 0"),
        ({"fmt": q.int4(rounding="toward_zero")}, "rounding must be 'nearest'"),
        ({"stats": seen(np.ones((2, 3), np.float32))}, r"shape \(24, 24\)"),
        ({"stats": statistics(jnp.ones((2, K)))}, "no gram; .*gram=True"),
        ({"fmt": q.int4(group_size=7)}, "must divide"),
        ({"w": jnp.full((K, R), jnp.inf)}, "'kernel' has 144 NaN or infinite"),
        ({"w": jnp.ones((2, K, R))}, "cannot be told"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    x, w = problem()
    given = {"w": jnp.asarray(w), "fmt": PLAIN, "stats": seen(x), **options}
    w, fmt, stats = given.pop("w"), given.pop("fmt"), given.pop("stats")
    with pytest.raises(ValueError, match=message):
        gptq_weight(w, fmt, stats, path="kernel", **given)
