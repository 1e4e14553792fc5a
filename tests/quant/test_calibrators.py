"""Static ranges of activations against NumPy, on all the data behind a histogram."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.lift import Statistics, statistics
from jaxcompress.lift._histogram import SAMPLE, sample_rows
from jaxcompress.quant._histogram_ranges import equal_bins

INT8 = q.Integer(bits=8)
INT4 = q.Integer(bits=4)
UINT4 = q.Integer(bits=4, symmetric=False, narrow=False)
UINT8 = q.Integer(bits=8, symmetric=False, narrow=False)

find = jax.jit(q.activation_range, static_argnames=("activations", "method"))


def rows(seed: int = 0) -> np.ndarray:
    """Heavy-tailed and off centre."""
    x = np.random.default_rng(seed).standard_t(4, size=(500, 16))
    return (0.5 * x + 0.25).astype(np.float32)


def seen(x: Any) -> Statistics:
    return statistics(jnp.asarray(x), histogram=True)


def reach(x: Any, element: Any, method: Any) -> tuple[float, float]:
    """Lowest and highest number on the grid found."""
    scale, zero = find(seen(x), q.static(element), method=method)
    low, high = (
        float(scale) * (e - (0 if zero is None else float(zero))) for e in element.range
    )
    return low, high


# -- the range of all, and its averages


@pytest.mark.parametrize("element", [INT8, q.E4M3], ids=lambda e: e.label)
def test_the_largest_entry_reaches_the_end_of_a_symmetric_grid(element: Any) -> None:
    x = rows()
    np.testing.assert_allclose(reach(x, element, q.minmax())[1], np.abs(x).max(), 1e-6)


def test_with_a_zero_point_both_ends_are_reached_and_zero_is_a_code() -> None:
    x = np.abs(rows()) - 0.1
    scale, zero = find(seen(x), q.static(UINT8))
    assert zero is not None
    assert float(zero) == round(float(zero)) > 0
    np.testing.assert_allclose(255 * scale, x.max() - x.min(), rtol=1e-6)
    low, high = reach(x, UINT8, q.minmax())
    np.testing.assert_allclose([low, high], [x.min(), x.max()], atol=float(scale))


def test_a_moving_average_over_batches() -> None:
    batches = [rows(i) * s for i, s in enumerate((1.0, 3.0, 2.0))]
    stats = jc.calibrate(
        lambda p, x: x @ p["w"],
        {"w": jnp.eye(16)},
        map(jnp.asarray, batches),
        momentum=0.8,
    )["w"]
    low, high = batches[0].min(), batches[0].max()
    for x in batches[1:]:
        low, high = 0.8 * low + 0.2 * x.min(), 0.8 * high + 0.2 * x.max()
    assert stats.average_low is not None
    np.testing.assert_allclose(stats.average_low, low, rtol=1e-5)
    scale, _ = find(stats, q.static(INT8), method=q.moving_average())
    np.testing.assert_allclose(scale, max(high, -low) / 127, rtol=1e-5)
    assert float(find(stats, q.static(INT8))[0]) > 1.2 * float(scale)


# -- read off the histogram


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
def test_a_percentile_within_one_bin(percent: float) -> None:
    x = rows()
    bin_width = 1 / 16
    high = reach(x, INT8, q.percentile(percent))[1]
    np.testing.assert_allclose(high, np.percentile(np.abs(x), percent), rtol=bin_width)
    scale, _ = find(seen(x), q.static(UINT8), method=q.percentile(percent))
    low, high = np.percentile(x, [100 - percent, percent])
    np.testing.assert_allclose(255 * scale, high - low, rtol=2 * bin_width)


def error(x: np.ndarray, low: float, high: float, element: Any) -> float:
    """Mean squared error of a range, in float64."""
    x = np.float64(x)
    if element.symmetric:
        scale = max(high, -low) / element.high
        codes = np.clip(np.rint(x / scale), element.low, element.high)
        return float(np.square(codes * scale - x).mean())
    scale = (high - low) / (element.high - element.low)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, element.low, element.high)
    return float(np.square((codes - zero) * scale - x).mean())


@pytest.mark.parametrize("element", [INT4, UINT4], ids=lambda e: e.label)
def test_mse_is_near_the_best_range_of_the_data(element: Any) -> None:
    x = rows()
    found = error(x, *reach(x, element, q.mse()), element)
    whole = error(x, x.min(), x.max(), element)
    ratios = 1 - np.arange(41) / 40 * 0.8
    best = min(error(x, r * x.min(), r * x.max(), element) for r in ratios)
    assert best < 0.95 * whole
    assert found < 1.05 * best


def test_mse_of_a_sample_does_not_forget_the_extremes() -> None:
    x = np.zeros((2**16, 2), np.float32)
    x[:] = np.random.default_rng(1).normal(size=x.shape)
    counts = seen(x).counts
    assert counts is not None
    assert float(counts.sum()) == SAMPLE
    kept = sample_rows(len(x), SAMPLE // 2)
    assert kept is not None
    x[np.setdiff1d(np.arange(9), kept)[0]] = 1000.0
    assert reach(x, INT8, q.mse())[1] > 250


def divergences(h: np.ndarray, levels: int) -> np.ndarray:
    """Of a histogram cut behind 1, 2, ... bins (infinite below `levels`)."""
    result = np.full(len(h) + 1, np.inf)
    for i in range(levels, len(h) + 1):
        p = h[:i].copy()
        p[-1] += h[i:].sum()
        q_ = np.zeros(i)
        for level in range(levels):
            mine = [j for j in range(i) if j * levels // i == level and p[j] > 0]
            if mine:
                total = sum(h[j] for j in range(i) if j * levels // i == level)
                q_[mine] = total / len(mine)
        p, q_ = p / p.sum(), np.maximum(q_ / max(q_.sum(), 1e-9), 1e-9)
        result[i] = sum(a * np.log(a / b) for a, b in zip(p, q_, strict=True) if a > 0)
    return result


def test_entropy_cuts_where_the_divergence_is_least() -> None:
    x, bins = rows(), 128
    stats = seen(x)
    assert stats.counts is not None
    assert stats.low is not None
    assert stats.high is not None
    h = np.asarray(equal_bins(stats.counts, stats.low, stats.high, bins))
    np.testing.assert_allclose(h.sum(), x.size, rtol=1e-5)
    raw = np.histogram(np.abs(x), bins, (0, np.abs(x).max()))[0]
    assert np.abs(h - raw).sum() < 0.1 * x.size
    d = divergences(np.float64(h), 8)
    best = int(d.argmin())
    assert 8 < best < bins
    high = reach(x, INT4, q.entropy(bins=bins))[1]
    np.testing.assert_allclose(high, (best + 0.5) * np.abs(x).max() / bins, rtol=1e-5)


# -- stacks, and entries that saw nothing


@pytest.mark.parametrize(
    "method",
    [q.minmax(), q.percentile(99)],
    ids=["minmax", "percentile"],
)
def test_each_stack_entry_has_its_own_and_an_idle_one_borrows(method: Any) -> None:
    x = np.stack([rows(0), 4 * rows(0), np.zeros((500, 16), np.float32)])
    weights = jnp.asarray([1.0, 1.0, 0.0])[:, None] * jnp.ones((1, 500))
    stats = statistics(jnp.asarray(x), weights=weights, histogram=True)
    scale, zero = find(stats, q.static(INT4), method=method)
    assert zero is None
    np.testing.assert_allclose(
        scale[0], find(seen(x[0]), q.static(INT4), method=method)[0], 1e-5
    )
    np.testing.assert_allclose(scale[1], 4 * scale[0], rtol=0.1)
    assert float(scale[2]) == float(scale[1])
    idle = find(seen(x[2]), q.static(UINT8), method=method)
    assert [float(a) for a in idle] == [1.0, 0.0]  # type: ignore[arg-type]


# -- by path


def model(p: Any, x: jax.Array) -> jax.Array:
    x = lax.scan(lambda c, w: (2.0 * jnp.tanh(c @ w), None), x, p["layers"])[0]
    return x @ p["head"]


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32) / 4
    return {"layers": draw(3, 16, 16), "head": draw(16, 4), "idle": draw(4, 4)}


def test_every_leaf_has_the_scale_of_its_own_path() -> None:
    x, p = jnp.asarray(rows()[:32]), params()
    stats = jc.calibrate(model, p, [x])
    rule = q.calibrated(q.int8(activations=q.static(UINT8)), stats)
    rules = {jc.where("*", exclude="idle"): rule}
    packed = jc.compress(p, rules, fn=model, example=x)
    for path in ("layers", "head"):
        found = packed[path].activation_scale, packed[path].activation_zero
        for a, b in zip(found, find(stats[path], q.static(UINT8)), strict=True):
            np.testing.assert_array_equal(a.ravel(), jnp.ravel(b))
    assert packed["layers"].activation_scale.shape == (3, 1, 1)
    exact, found = model(p, x), jax.jit(jc.lift(model))(packed, x)
    assert jnp.linalg.norm(found - exact) < 0.05 * jnp.linalg.norm(exact)


def test_errors() -> None:
    x, p = jnp.asarray(rows()[:4]), params()
    shapes = {"layers": (3, 4, 16), "head": (4, 16)}
    stats = {name: statistics(jnp.ones(shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="activations of the format must be static"):
        q.calibrated(jc.presets.FP8_DYNAMIC, stats)
    bad = {"head": statistics(jnp.array([[jnp.inf]]))}
    with pytest.raises(ValueError, match="statistics of 'head' must be finite"):
        q.calibrated(jc.presets.FP8, bad)
    rule = q.calibrated(jc.presets.FP8, stats)
    with pytest.raises(
        ValueError, match=r"no statistics for 'idle', only for \['head'"
    ):
        jc.compress(p, {"idle": rule})
    flat = {**p, "layers": p["layers"].reshape(48, 16)}
    with pytest.raises(ValueError, match=r"of a stack \(3,\), the weight's is \(\)"):
        jc.compress(flat, {"layers": rule})
    for method, message in (
        (q.mse(), "needs a histogram"),
        (q.moving_average(), "momentum=0.9"),
        (q.hqq(), "needs a histogram"),
    ):
        with pytest.raises(ValueError, match=message):
            q.activation_range(stats["head"], q.static(INT8), method=method)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"entropy\(\) is of integer formats"):
        q.activation_range(seen(x), q.static(q.E4M3), method=q.entropy())
    with pytest.raises(TypeError, match="method must be"):
        q.activation_range(seen(x), q.static(INT8), method=q.hqq())  # type: ignore[arg-type]
    zero = jnp.zeros(())
    bare = Statistics(count=zero, absmax=zero, total=zero, total_square=zero)
    with pytest.raises(ValueError, match="low and high"):
        q.activation_range(bare, q.static(INT8))
    with pytest.raises(ValueError, match="bins must be at least 16"):
        q.entropy(bins=4)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        jc.calibrate(model, p, [x], momentum=1.0)
