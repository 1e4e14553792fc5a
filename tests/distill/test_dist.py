"""Correlations and z-scores against their definitions in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.distill import logit_oracles as oracle
from tests.distill.logit_oracles import STUDENT, TEACHER, WHERE

SETTINGS = {"inter": 0.7, "intra": 2.0, "temperature": 3.0}
ROWS = STUDENT.reshape(6, 5), TEACHER.reshape(6, 5)
dist = oracle.compiled("dist")
standardize = jax.jit(jc.distill.standardize)


def test_the_mean_of_the_shares_is_the_definition() -> None:
    loss, grad = dist(*ROWS, **SETTINGS)
    of = lambda z: oracle.dist(z, ROWS[1], **SETTINGS)
    assert loss.shape == (6,)
    assert loss.dtype == jnp.float32
    assert (np.asarray(loss) >= 0).all()
    np.testing.assert_allclose(loss.mean(), of(ROWS[0]), rtol=1e-5)
    np.testing.assert_allclose(grad / 6, oracle.slope(of, ROWS[0]), atol=1e-5)


def test_shares_are_half_the_squared_distance_of_normalized_vectors() -> None:
    s, t = (np.array([oracle.softmax((r / 3).tolist()) for r in z]) for z in ROWS)
    expected = np.zeros(6)
    for i in range(6):
        expected[i] += 0.7 * (1 - oracle.pearson(s[i], t[i]))
        for k in range(5):
            u, v = (p[:, k] - p[:, k].mean() for p in (s, t))
            u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
            expected[i] += 2.0 * 6 / 5 * 0.5 * (u[i] - v[i]) ** 2
    np.testing.assert_allclose(dist(*ROWS, **SETTINGS)[0], expected, rtol=1e-4)


def test_examples_left_out_are_in_no_relation() -> None:
    s, t = oracle.hidden(STUDENT), oracle.hidden(TEACHER)
    loss, grad = dist(s, t, where=WHERE, **SETTINGS)
    kept = STUDENT[WHERE], TEACHER[WHERE]
    of = lambda z: oracle.dist(z, kept[1], **SETTINGS)
    assert loss.shape == WHERE.shape
    assert not np.asarray(loss)[~WHERE].any()
    assert not np.asarray(grad)[~WHERE].any()
    np.testing.assert_allclose(loss.sum() / 4, of(kept[0]), rtol=1e-5)
    slopes = oracle.slope(of, kept[0])
    np.testing.assert_allclose(np.asarray(grad)[WHERE] / 4, slopes, atol=1e-5)


def test_the_order_of_the_batch_does_not_matter() -> None:
    order = np.array([3, 0, 5, 1, 4, 2])
    loss, grad = dist(*ROWS, **SETTINGS)
    other, turned = dist(*(z[order] for z in ROWS), **SETTINGS)
    np.testing.assert_allclose(other, np.asarray(loss)[order], rtol=1e-4)
    np.testing.assert_allclose(turned, np.asarray(grad)[order], atol=1e-5)


def test_a_linear_map_of_the_outputs_costs_nothing() -> None:
    """Which the divergence does not forgive: a student half as sure."""
    p = np.array([oracle.softmax(z.tolist()) for z in ROWS[1]], np.float32)
    half = np.log(0.5 * p + 0.5 / 5)
    one = {"inter": 1.0, "intra": 1.0, "temperature": 1.0}
    np.testing.assert_allclose(dist(half, ROWS[1], **one)[0], np.zeros(6), atol=1e-5)
    soft, _ = oracle.compiled("soft_targets")(half, ROWS[1], temperature=1.0)
    assert (np.asarray(soft) > 0.01).all()


@pytest.mark.parametrize("above", [8.0, np.nextafter(np.float32(8), np.float32(9))])
def test_constant_outputs_have_no_correlation_and_no_gradient(above: float) -> None:
    """As those of a head that begins at zero; also where rounding tells them apart."""
    student = np.where(np.indices((6, 5)).sum(0) % 2, above, 8.0).astype(np.float32)
    loss, grad = dist(student, ROWS[1], **SETTINGS)
    np.testing.assert_allclose(loss.mean(), 0.5 * 0.7 + 0.5 * 2.0, rtol=1e-5)
    assert not np.asarray(grad).any()


def test_standardized_logits_are_z_scores() -> None:
    loss = lambda z: (jc.distill.standardize(z) * TEACHER).sum()
    grad = jax.jit(jax.grad(loss))(STUDENT)
    of = lambda z: (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)
    np.testing.assert_allclose(standardize(STUDENT), of(STUDENT), atol=1e-5)
    slopes = oracle.slope(lambda z: (of(z) * TEACHER).sum(), STUDENT)
    np.testing.assert_allclose(grad, slopes, atol=1e-4)


@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
def test_z_scores_do_not_depend_on_the_size(size: float) -> None:
    got = standardize(STUDENT * np.float32(size))
    np.testing.assert_allclose(got, standardize(STUDENT), rtol=1e-5)


def test_excluded_classes_and_constant_logits_in_z_scores() -> None:
    z = np.where(np.arange(5) == 2, -np.inf, STUDENT[0])
    z[0] = np.where(np.arange(5) == 2, -np.inf, np.float32(0.1))
    got = np.asarray(standardize(z))
    assert (got[:, 2] == -np.inf).all()
    left = np.delete(z, 2, -1).astype(np.float64)[1:]
    expected = (left - left.mean(-1, keepdims=True)) / left.std(-1, keepdims=True)
    np.testing.assert_allclose(np.delete(got, 2, -1)[1:], expected, atol=1e-5)
    assert not np.delete(got, 2, -1)[0].any()


def test_nan_in_an_example_that_counts_comes_through() -> None:
    z = STUDENT.copy()
    z[0, 1, 2] = np.nan
    with jax.debug_nans(False):
        got = np.isnan(standardize(z)).all(-1)
    assert got.tolist() == [[False, True, False], [False] * 3]


def test_z_scores_and_then_soft_targets() -> None:
    """Any size and shift of the student's logits is as good, with NaN left out."""

    @jax.jit
    def run(s: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(s: jax.Array) -> tuple[jax.Array, jax.Array]:
            z_s, z_t = (jc.distill.standardize(z, where=WHERE) for z in (s, t))
            each = jc.distill.soft_targets(z_s, z_t, temperature=2.0, where=WHERE)
            return each.sum(), each

        grad, each = jax.grad(loss, has_aux=True)(s)
        return each, grad

    s, t = oracle.hidden(STUDENT), oracle.hidden(TEACHER)
    each, grad = run(s, t)
    of = lambda z: (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)
    scored = lambda z: oracle.soft_targets(of(z), of(TEACHER), temperature=2.0)[WHERE]
    np.testing.assert_allclose(np.asarray(each)[WHERE], scored(STUDENT), rtol=1e-4)
    np.testing.assert_allclose(grad, oracle.slope(scored, STUDENT), atol=1e-4)
    np.testing.assert_allclose(run(3 * s + 7, t)[0], each, atol=1e-4)
    assert not np.asarray(each)[~WHERE].any()
