"""Losses of single vectors: invariances, learned variances, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

d = jc.distill
RNG = np.random.default_rng(5)
STUDENT = RNG.normal(size=(5, 4)).astype(np.float32)
TEACHER = RNG.normal(size=(5, 4)).astype(np.float32)


def test_directions_do_not_depend_on_lengths() -> None:
    lengths = np.array([[1e-3], [0.5], [1.0], [7.0], [1e4]], np.float32)
    cosine = jax.jit(d.cosine_embedding)
    hint = jax.jit(lambda s, t: d.hint(s, t, normalize=True))
    for f, factor in ((cosine, 1.0), (hint, 2.0)):
        np.testing.assert_allclose(
            f(lengths * STUDENT, TEACHER), factor * cosine(STUDENT, TEACHER), rtol=1e-4
        )


def test_scores_of_pairs_do_not_need_equal_sizes() -> None:
    other = jnp.zeros((5, 3))
    with pytest.raises(ValueError, match=r"pair_cosine, teacher: .* same shape"):
        d.pair_cosine((STUDENT, STUDENT), (TEACHER, other))
    with pytest.raises(ValueError, match=r"pair_cosine: .* all axes but the last"):
        d.pair_cosine((STUDENT, STUDENT), (TEACHER[:4], TEACHER[:4]))


@pytest.mark.parametrize("variance", [1e-3, 0.5, 5.0, 200.0])
def test_variances_start_where_they_are_told(variance: float) -> None:
    params = d.gaussian_variance(TEACHER, variance=variance)
    found = jax.nn.softplus(params.raw) + 1e-5
    np.testing.assert_allclose(found, np.full(4, variance), rtol=1e-4)


def test_the_best_variance_is_the_mean_squared_error_of_its_channel() -> None:
    noise = np.array([0.1, 1.0, 2.0, 0.5], np.float32)
    residual = noise * RNG.normal(size=(64, 4)).astype(np.float32)
    student = RNG.normal(size=(64, 4)).astype(np.float32)
    best = np.square(residual).mean(0)
    raw = jnp.asarray(np.log(np.expm1(best - 1e-5)), jnp.float32)

    def total(raw: jax.Array) -> jax.Array:
        params = d.GaussianVariance(raw)
        return d.variational_information(student, student + residual, params).mean()

    slope = jax.jit(jax.grad(total))
    np.testing.assert_allclose(slope(raw), np.zeros(4), atol=1e-4)
    assert (np.asarray(slope(raw + 0.5)) > 1e-3).all()
    assert (np.asarray(slope(raw - 0.5)) < -1e-3).all()


def test_variances_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4,\); got \(3,\).*gaussian_variance\(4\)"):
        d.variational_information(STUDENT, TEACHER, d.gaussian_variance(3))
    with pytest.raises(
        ValueError, match=r"more than min_variance, .* got 0\.1 and 0\.2"
    ):
        d.gaussian_variance(3, variance=0.1, min_variance=0.2)


@pytest.mark.parametrize(
    "loss", [d.hint, d.embedding_mse, d.cosine_embedding, d.similarity_preserving]
)
def test_features_that_are_not_finite_or_not_floats_are_refused(loss: Any) -> None:
    bad = TEACHER.copy()
    bad[2, 1], bad[3, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"teacher must be finite; got 2 NaN or infin"):
        loss(STUDENT, bad)
    with pytest.raises(ValueError, match=r"student must be floating, .* int32\[5, 4\]"):
        loss(np.ones((5, 4), np.int32), TEACHER)
    kept = np.array([True, True, False, False, True])
    masked = jax.jit(lambda s: loss(s, bad, where=kept))
    assert np.isfinite(masked(STUDENT)).all()


@pytest.mark.parametrize("loss", [d.hint, d.embedding_mse, d.cosine_embedding])
def test_features_of_other_shapes_are_refused_with_a_remedy(loss: Any) -> None:
    with pytest.raises(
        ValueError, match=r"\(5, 4\) and \(5, 3\).* distill.linear_projector"
    ):
        loss(STUDENT, TEACHER[:, :3])
    with pytest.raises(ValueError, match=r"where must be bool of shape \(5,\)"):
        loss(STUDENT, TEACHER, where=np.ones((5, 4), bool))
