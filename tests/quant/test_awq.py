"""AWQ: the search for channel scales against its definition, and what it gains."""

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

K, OUT, ALPHAS = 16, 8, 5


def data(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Weights, and correlated rows of which a few channels are large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, K)) + rng.normal(size=(64, 1))
    x[:, [2, 11]] *= 30
    w = rng.normal(size=(K, OUT))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def rounded(w: np.ndarray, group: int) -> np.ndarray:
    """int4, one scale for `group` inputs of an output."""
    result = np.zeros_like(w)
    for o in range(w.shape[1]):
        for start in range(0, len(w), group):
            block = w[start : start + group, o]
            scale = np.abs(block).max() / 7
            result[start : start + group, o] = np.rint(block / scale) * scale
    return result


def searched(w: np.ndarray, x: np.ndarray, group: int) -> tuple[np.ndarray, list]:
    """Channel scales of each alpha, and the errors of the outputs."""
    size = np.sqrt(np.square(x).mean(0))
    blocks = np.abs(w).reshape(-1, group, w.shape[1])
    share = (blocks / blocks.max(1, keepdims=True)).reshape(w.shape).mean(1)
    alphas = np.linspace(0, 1, ALPHAS + 1)
    scales, errors = [], []
    for alpha, beta in [(a, 0) for a in alphas] + [(a, 1 - a) for a in alphas]:
        s = (size / np.sqrt(size.max() * size.min())) ** alpha
        s = s / (share / np.sqrt(share.max() * share.min())) ** beta
        q_w = rounded(w * s[:, None], group) / s[:, None]
        scales.append(s)
        errors.append(np.square(x @ (q_w - w)).sum())
    return np.array(scales), errors


@pytest.mark.parametrize("group", [K, 4])
def test_the_scales_are_those_of_least_output_error(group: int) -> None:
    w, x = data()
    fmt = q.int4(group_size=group)
    build = lambda w, x: q.awq_weight(
        w, fmt, statistics(x, gram=True), alphas=ALPHAS, clipping=None
    )
    leaf = run(build, w, x)
    scales, errors = searched(np.float64(w), np.float64(x), group)
    best = int(np.argmin(errors))
    assert best > 0  # The data are such that scaling helps.
    np.testing.assert_allclose(np.ravel(leaf.channel_scale), scales[best], rtol=1e-4)
    dense = np.float64(run(jc.materialize, leaf))
    error = np.square(np.float64(x) @ (dense - w)).sum()
    assert error == pytest.approx(errors[best], rel=2e-2)


def test_it_beats_rounding_on_outputs_and_clipping_helps_further() -> None:
    w, x = data(1)
    w = w.at[5].multiply(6.0)  # Ranges that are worth cutting, at 3 bits.

    def errors(w: jax.Array, x: jax.Array) -> Any:
        stats = statistics(x, gram=True)
        leaves = (
            q.quantize(w, q.int3()),
            q.awq_weight(w, q.int3(), stats, alphas=8, clipping=None),
            q.awq_weight(w, q.int3(), stats, alphas=8),
        )
        return [jnp.square(x @ (jc.materialize(leaf) - w)).sum() for leaf in leaves]

    plain, scaled, clipped = map(float, run(errors, w, x))
    assert scaled < plain / 3
    assert clipped < 0.95 * scaled


def test_each_entry_of_a_stack_is_searched_alone_and_without_data_rounded() -> None:
    pairs = [data(seed) for seed in (2, 3)]
    w = jnp.stack([w for w, _ in pairs] + [pairs[0][0]])
    x = jnp.stack([x for _, x in pairs] + [pairs[0][1]])
    x = x.at[1, :, 4].set(0.0)
    fmt = q.int4(symmetric=False, group_size=4)
    options: Any = {"alphas": 3, "clipping": q.mse(steps=2, shrink=0.5)}

    def fn(w: jax.Array, x: jax.Array, rows: jax.Array) -> Any:
        stats = statistics(x, weights=rows, gram=True)
        stack = q.awq_weight(w, fmt, stats, axes=-2, **options)
        alone = q.awq_weight(w[1], fmt, statistics(x[1], gram=True), **options)
        plain = q.quantize(w[2], fmt.replace(search=options["clipping"]))
        return stack, jc.materialize([stack, alone, plain])

    rows = jnp.ones(x.shape[:2]).at[2].set(0)
    stack, (found, alone, plain) = run(fn, w, x, rows)
    np.testing.assert_allclose(found[1], alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[2], plain)
    s = np.asarray(stack.channel_scale)[:, 0]
    assert (s[2] == 1).all()  # No rows.
    assert s[1, 4] == 1  # A channel that was never active.
    assert (s[1] != 1).any()


def test_the_base_sees_the_scaled_weight_and_statistics() -> None:
    """So that another algorithm can round in place of rounding."""

    def fn(w: jax.Array, x: jax.Array) -> Any:
        seen = []

        def base(w: jax.Array, fmt: Any, stats: Any, **options: Any) -> Any:
            seen.append((w, stats.gram))
            return q.quantize(w, fmt, **options)

        stats = statistics(x, gram=True)
        leaf = q.awq_weight(w, q.int3(), stats, alphas=2, base=base)
        return leaf.channel_scale[0], seen[0], stats.gram

    w, x = data(4)
    s, (scaled, given), gram = run(fn, w, x)
    np.testing.assert_allclose(scaled, w * s[:, None], rtol=1e-6)
    np.testing.assert_allclose(given, gram / np.outer(s, s), rtol=1e-5)


def test_any_format_and_dead_inputs_are_defined() -> None:
    """Better than rounding by the diagonal, in bf16, with zero rows and channels."""
    w = draw(5, 32, 4).at[:, 1].set(0).at[3].set(0).astype(jnp.bfloat16)
    x, fmt = draw(6, 20, 32).at[:, 7].set(0), q.mxfp4()

    def errors(w: jax.Array, x: jax.Array) -> Any:
        stats = statistics(x)
        awq = q.awq_weight(w, fmt, stats, alphas=3)
        weigh = lambda leaf: (
            jnp.square(jc.materialize(leaf).astype(jnp.float32) - w.astype(jnp.float32))
            * stats.total_square[:, None]
        ).sum()
        return awq, weigh(awq), weigh(q.quantize(w, fmt))

    leaf, error, plain = run(errors, w, x)
    assert leaf.dtype == jnp.bfloat16
    assert float(error) <= 1.02 * float(plain)


def test_without_statistics_the_weight_is_rounded() -> None:
    leaf = jax.eval_shape(lambda w: q.awq_weight(w, q.int4(), None), draw(0, 8, 2))
    assert isinstance(leaf, q.QuantizedArray)


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="alphas must be positive; got 0"):
        q.awq_weight(draw(0, 8, 2), q.int4(), None, alphas=0)
