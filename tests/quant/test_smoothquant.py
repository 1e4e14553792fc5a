"""SmoothQuant: its scales, its statistics, and activations with outliers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.lift import statistics
from tests.quant.wrapping import draw, run

INT8 = q.Integer(bits=8)
DYNAMIC = q.int8(activations=q.dynamic(INT8))
STATIC = q.int8(activations=q.static(INT8))


def activations(*shape: int) -> jax.Array:
    """Normal rows, one channel in sixteen fifty times as large."""
    x = np.random.default_rng(0).normal(size=shape)
    x[..., ::16] *= 50
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_scales_are_equation_4_and_what_was_never_active_is_left_alone(
    alpha: float,
) -> None:
    w, x = np.array(draw(0, 8, 4)), np.array(draw(1, 9, 8))
    x[:, 2] = 0
    w[5] = 0
    found = run(
        lambda w, x: (
            q.smoothquant_weight(w, DYNAMIC, statistics(x), alpha=alpha).channel_scale
        ),
        w,
        x,
    )
    for j, s in enumerate(np.ravel(found)):
        top_x, top_w = np.abs(x[:, j]).max(), np.abs(w[j]).max()
        expected = top_x**alpha / top_w ** (1 - alpha) if top_x * top_w else 1.0
        assert s == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fmt", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_it_beats_plain_w8a8_on_activations_with_outliers(fmt: Any) -> None:
    w, x = draw(2, 32, 8), activations(40, 32)

    def fn(w: jax.Array, x: jax.Array) -> Any:
        leaf = q.smoothquant_weight(w, fmt, statistics(x))
        scale = jnp.abs(x).max() / 127 if fmt is STATIC else None
        plain = q.quantize(w, fmt, activation_scale=scale)
        product = jc.lift(lambda w, x: x @ w)
        return product(leaf, x), product(plain, x)

    exact = np.float64(x) @ np.float64(w)
    error, before = (np.square(y - exact).sum() for y in run(fn, w, x))
    assert error < before / 4


def test_the_static_scale_is_that_of_the_smoothed_activations() -> None:
    """One for each entry of a stack; where there are no data, one that is not zero."""
    x = activations(3, 40, 32) * jnp.array([1.0, 4.0, 1.0]).reshape(3, 1, 1)
    stats = statistics(x, weights=jnp.ones((3, 40)).at[2].set(0))
    w = draw(3, 3, 32, 4)
    leaf = run(lambda w, s: q.smoothquant_weight(w, STATIC, s, axes=-2), w, stats)
    s = np.float64(leaf.channel_scale)
    smoothed = np.abs(np.float64(x) / s).max((1, 2)) / 127
    smoothed[2] = 1 / 127
    np.testing.assert_allclose(
        np.ravel(leaf.inner.activation_scale), smoothed, rtol=1e-5
    )
    assert (s[2] == 1).all()


def test_the_base_sees_the_scaled_weight_and_statistics() -> None:
    w, x = draw(4, 8, 3), draw(5, 20, 8)

    def fn(w: jax.Array, x: jax.Array) -> Any:
        seen = []

        def base(w: jax.Array, fmt: Any, stats: Any, **options: Any) -> Any:
            seen.append((w, stats))
            return q.quantize(w, fmt, **options)

        stats = statistics(x, gram=True)
        leaf = q.smoothquant_weight(w, DYNAMIC, stats, base=base)
        s = leaf.channel_scale[0]
        return s, seen, statistics(x / s[None], gram=True)

    s, [(scaled, given)], divided = run(fn, w, x)
    np.testing.assert_allclose(scaled, w * s[:, None], rtol=1e-6)
    for name in ("count", "absmax", "total", "total_square", "gram"):
        a, b = getattr(given, name), getattr(divided, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_without_statistics_the_weight_is_quantized_as_it_is() -> None:
    build = lambda w: q.smoothquant_weight(w, DYNAMIC, None)
    leaf = jax.eval_shape(build, draw(6, 8, 3))
    assert isinstance(leaf, q.QuantizedArray)


def test_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        q.smoothquant_weight(draw(6, 8, 3), DYNAMIC, None, alpha=1.5)
