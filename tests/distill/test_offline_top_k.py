"""The loss from stored top-k logits against the full one, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distill.offline import TopK

RNG = np.random.default_rng(0)
TEACHER = RNG.normal(size=(2, 4, 40)).astype(np.float32) * 4
STUDENT = TEACHER + RNG.normal(size=(2, 4, 40)).astype(np.float32) * 2
WHERE = np.array([[True, False, True, True], [False, True, True, False]])
K, TEMPERATURES = 6, (1.0, 3.0)

loss_of = jax.jit(jc.distill.top_k_loss, static_argnames="temperature")
STORED = jax.jit(lambda z: jc.distill.top_k(z, K, TEMPERATURES))(TEACHER)
EVERYTHING = jax.jit(lambda z: jc.distill.top_k(z, 40, TEMPERATURES))(TEACHER)


def softmax(z: Any) -> np.ndarray:
    p = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def lumped(student: Any, teacher: Any, temperature: float, k: int = K) -> np.ndarray:
    """The top classes one by one and all others as one, from the definition."""
    loss = np.zeros(teacher.shape[:-1])
    for i in np.ndindex(*loss.shape):
        p = softmax(np.asarray(teacher[i], np.float64) / temperature)
        q = softmax(np.asarray(student[i], np.float64) / temperature)
        top = np.argsort(-p)[:k]
        rest = np.setdiff1d(np.arange(p.size), top)
        loss[i] = sum(p[j] * np.log(p[j] / q[j]) for j in top)
        if rest.size:
            loss[i] += p[rest].sum() * np.log(p[rest].sum() / q[rest].sum())
    return temperature**2 * loss


def full(student: Any, teacher: Any, temperature: float) -> np.ndarray:
    return lumped(student, teacher, temperature, teacher.shape[-1])


def rounding(student: Any, teacher: Any, temperature: float, k: int) -> np.ndarray:
    """What 16-bit values may change the loss by, to first order and a quarter more."""
    p, q = (
        softmax(np.asarray(z, np.float64) / temperature) for z in (teacher, student)
    )
    top = np.argsort(-p, -1)[..., :k]
    gap = np.take_along_axis(np.log(p / q), top, -1)
    bound = 2.0**-11 * np.log(k) * (gap.max(-1) - gap.min(-1))
    return 1.25 * temperature**2 * bound + 1e-5


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_what_is_stored(temperature: float) -> None:
    p = softmax(TEACHER.astype(np.float64) / temperature)
    top = np.argsort(-TEACHER, -1)[..., :K]
    kept = np.take_along_axis(p, top, -1).sum(-1)
    ranked = np.take_along_axis(TEACHER, top, -1).astype(np.float64)
    np.testing.assert_array_equal(STORED.indices, top)
    np.testing.assert_allclose(STORED.values, ranked - ranked[..., :1], rtol=2**-11)
    residual = STORED.residual[..., TEMPERATURES.index(temperature)]
    np.testing.assert_allclose(np.exp(residual), 1 - kept, rtol=1e-5)
    assert (STORED.indices.dtype, STORED.values.dtype) == (jnp.uint16, jnp.float16)
    assert STORED.residual.dtype == jnp.float32


def test_many_classes_have_wider_indices() -> None:
    form = jax.eval_shape(
        lambda z: jc.distill.top_k(z, 2),
        jax.ShapeDtypeStruct((2**16 + 1,), jnp.float32),
    )
    assert form.indices.dtype == jnp.uint32


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_loss_is_the_divergence_with_one_class_for_the_rest(
    temperature: float,
) -> None:
    loss = loss_of(STUDENT, STORED, temperature=temperature)
    exact = lumped(STUDENT, TEACHER, temperature)
    assert loss.dtype == jnp.float32
    error = np.abs(np.asarray(loss, np.float64) - exact)
    assert (error <= rounding(STUDENT, TEACHER, temperature, K)).all()
    assert (error > 1e-6).any()  # Values were rounded.


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_full_loss_is_above_it_by_less_than_the_bound(temperature: float) -> None:
    rounded = rounding(STUDENT, TEACHER, temperature, K)
    loss = np.asarray(loss_of(STUDENT, STORED, temperature=temperature), np.float64)
    missing = full(STUDENT, TEACHER, temperature) - loss
    others = np.argsort(TEACHER, -1)[..., : 40 - K]
    gap = np.take_along_axis(TEACHER.astype(np.float64) - STUDENT, others, -1)
    residual = np.exp(STORED.residual[..., TEMPERATURES.index(temperature)])
    bound = residual * np.square(gap.max(-1) - gap.min(-1)) / 8
    assert (missing >= -rounded).all()
    assert (missing <= bound + rounded).all()
    assert (missing > 10 * rounded).any()  # Something was left out.


def test_all_classes_give_the_full_loss() -> None:
    loss = np.asarray(loss_of(STUDENT, EVERYTHING, temperature=3.0), np.float64)
    error = np.abs(loss - full(STUDENT, TEACHER, 3.0))
    assert (error <= rounding(STUDENT, TEACHER, 3.0, 40)).all()
    assert np.isneginf(EVERYTHING.residual).all()


@pytest.mark.parametrize("stored", [STORED, EVERYTHING], ids=["some", "all"])
def test_the_gradient_is_that_of_the_definition(stored: TopK) -> None:
    """``T (q - p)`` on top classes; others share out the gap of the rest as q does."""
    k, temperature = stored.indices.shape[-1], 3.0
    total = lambda s, t: loss_of(s, t, temperature=temperature).sum()
    grad = jax.grad(total)(STUDENT, stored)
    p, q = (softmax(z.astype(np.float64) / temperature) for z in (TEACHER, STUDENT))
    others = np.argsort(np.argsort(-TEACHER, -1), -1) >= k
    ratio = (p * others).sum(-1) / np.maximum((q * others).sum(-1), 1e-30)
    target = np.where(others, q * ratio[..., None], p)
    np.testing.assert_allclose(grad, temperature * (q - target), atol=2e-3)


def test_no_gradient_flows_to_the_teacher() -> None:
    total = lambda values: loss_of(
        STUDENT, dataclasses.replace(STORED, values=values), temperature=1.0
    ).sum()
    assert not np.asarray(jax.grad(total)(STORED.values)).any()


def test_examples_left_out_may_hold_anything() -> None:
    student = np.where(WHERE[..., None], STUDENT, np.nan)
    spoiled = TopK(
        indices=np.where(WHERE[..., None], STORED.indices, np.uint16(999)),
        values=np.where(WHERE[..., None], STORED.values, np.float16("nan")),
        residual=np.where(WHERE[..., None], STORED.residual, np.float32("nan")),
        temperatures=TEMPERATURES,
        classes=40,
    )
    total = lambda s: loss_of(s, spoiled, temperature=3.0, where=WHERE)
    loss, pull = jax.vjp(total, student)
    (grad,) = pull(np.ones((2, 4), np.float32))
    expected = np.where(WHERE, loss_of(STUDENT, STORED, temperature=3.0), 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.any(grad, -1), WHERE)


def test_a_peaked_and_a_flat_teacher_and_excluded_classes() -> None:
    teacher = np.zeros((4, 8), np.float32)
    teacher[0, 5], teacher[1, 2:], teacher[3, 2:] = 300.0, -np.inf, -np.inf
    student = RNG.normal(size=(4, 8)).astype(np.float32)
    student[3, 2:] = -np.inf
    stored = jax.jit(lambda z: jc.distill.top_k(z, 3))(teacher)
    q = softmax(student)
    expected = [
        -np.log(q[0, 5]),
        0.5 * np.log(0.25 / (q[1, 0] * q[1, 1])),
        lumped(student[2:3], teacher[2:3], 1.0, 3)[0],
        0.5 * np.log(0.25 / (q[3, 0] * q[3, 1])),
    ]
    loss, grad = jax.value_and_grad(
        lambda s: loss_of(s, stored, temperature=1.0).sum()
    )(student)
    np.testing.assert_allclose(loss, sum(expected), rtol=1e-5)
    assert np.isfinite(grad).all()


def test_a_temperature_that_was_not_stored_is_refused() -> None:
    message = r"stored at, of \(1\.0, 3\.0\); got 2\.0.*temperature=\(\.\.\.\)"
    with pytest.raises(ValueError, match=message):
        jc.distill.top_k_loss(STUDENT, STORED, temperature=2.0)
    with pytest.raises(ValueError, match="not a traced value"):
        jax.jit(jc.distill.top_k_loss)(STUDENT, STORED, temperature=1.0)
    with pytest.raises(ValueError, match="not a traced value"):
        jax.jit(lambda t: jc.distill.top_k(TEACHER, 2, t))(1.0)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (STUDENT[..., :39], "vocabulary of 40 classes; got 39"),
        (STUDENT[:1], r"same leading shape; got \(1, 4\) and \(2, 4\)"),
    ],
)
def test_another_shape_is_refused(student: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"distill\.top_k_loss: .*{message}"):
        jc.distill.top_k_loss(student, STORED, temperature=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be between 1 and the number of classes, 40; got 0"),
        ({"k": 41}, "got 41"),
        ({"k": 2, "temperature": 0.0}, "temperature must be positive"),
        ({"k": 2, "temperature": ()}, "one or several; got none"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"distill\.top_k: .*{message}"):
        jc.distill.top_k(TEACHER, **settings)


def test_a_teacher_with_nan_is_refused() -> None:
    teacher = TEACHER.copy()
    teacher[1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"distill\.top_k: .*\(1, 2\)"):
        jc.distill.top_k(teacher, 2)
