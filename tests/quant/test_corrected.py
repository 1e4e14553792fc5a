"""Low-rank corrections: of all of their rank the best for the outputs."""

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

K, OUT = 16, 8
RANKS = (1, 2, 5, 8)


def rows(seed: int = 0) -> jax.Array:
    """Correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, K)) @ rng.normal(size=(K, K)) * 2.0 ** np.arange(-8, 8)
    return jnp.asarray(x / 100, jnp.float32)


def test_the_output_error_is_the_tail_of_the_singular_values() -> None:
    """Eckart and Young in the metric of the outputs, for every rank."""
    w, x = draw(0, K, OUT), rows()

    def fn(w: jax.Array, x: jax.Array) -> Any:
        stats = statistics(x, gram=True)
        correct = lambda r, s: q.low_rank_correction_weight(
            w, q.int3(), s, rank=r, dtype=jnp.float32
        )
        leaves = [correct(r, stats) for r in RANKS]
        plain = [correct(r, None) for r in RANKS]
        return jc.materialize([leaves, plain, leaves[0].inner])

    found, plain, inner = jax.tree.map(np.float64, run(fn, w, x))
    error = np.float64(x) @ (np.float64(w) - inner)
    values = np.linalg.svd(error, compute_uv=False)
    errors = [np.square(np.float64(x) @ (a - w)).sum() for a in found]
    for rank, found_error in zip(RANKS, errors, strict=True):
        tail = np.square(values[rank:]).sum()
        assert found_error == pytest.approx(tail, rel=1e-2, abs=1e-4 * values[0] ** 2)
    assert errors == sorted(errors, reverse=True)
    # Without data it is the best for the weight, and worse for the outputs.
    weight = np.linalg.svd(np.float64(w) - inner, compute_uv=False)
    for rank, a, best in zip(RANKS[:3], plain, errors, strict=False):
        tail = np.square(weight[rank:]).sum()
        assert np.square(a - w).sum() == pytest.approx(tail, rel=1e-3)
        assert np.square(np.float64(x) @ (a - w)).sum() > 1.5 * best


def test_a_singular_gram_and_no_rows_are_defined() -> None:
    """Two rows for sixteen channels; an expert that saw none gets the plain SVD."""
    x = jnp.stack([rows()[:2], rows()[:2]])
    w = draw(1, 2, K, OUT)

    def fn(w: jax.Array, x: jax.Array) -> Any:
        stats = statistics(x, weights=jnp.ones((2, 2)).at[1].set(0), gram=True)
        stack = q.low_rank_correction_weight(
            w, q.int3(), stats, rank=2, axes=-2, dtype=jnp.float32
        )
        alone = q.low_rank_correction_weight(
            w[1], q.int3(), None, rank=2, dtype=jnp.float32
        )
        blank = q.low_rank_correction_weight(
            jnp.zeros_like(w[0]), q.int3(), statistics(x[0]), rank=2
        )
        return jc.materialize([stack, alone, blank])

    stack, alone, blank = run(fn, w, x)
    np.testing.assert_allclose(x[0] @ stack[0], x[0] @ w[0], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(stack[1], alone, rtol=1e-4, atol=1e-4)
    assert not blank.any()


def test_factors_are_rounded_or_quantized_and_counted() -> None:
    w, x = draw(2, K, OUT), rows(1)

    def fn(w: jax.Array, x: jax.Array) -> Any:
        stats = statistics(x)
        correct = lambda **options: q.low_rank_correction_weight(
            w, q.int4(), stats, rank=4, **options
        )
        leaves = correct(), correct(factors=q.int8())
        error = [
            (jnp.square(jc.materialize(a) - w) * stats.total_square[:, None]).sum()
            for a in (leaves[0].inner, *leaves)
        ]
        return leaves, error

    (half, coded), (base, *errors) = run(fn, w, x)
    assert half.down.dtype == half.up.dtype == jnp.bfloat16
    assert half.stored_bytes - half.inner.stored_bytes == 2 * 4 * (K + OUT)
    assert isinstance(coded.down, q.QuantizedArray)
    # A byte a code, and a float32 scale for each of 4 ranks and 8 outputs.
    assert coded.stored_bytes - coded.inner.stored_bytes == 4 * (K + OUT) + 4 * (4 + 8)
    assert all(float(e) < 0.6 * float(base) for e in errors)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be from 1 to 8"):
        q.low_rank_correction_weight(draw(3, K, OUT), q.int4(), None, rank=rank)
