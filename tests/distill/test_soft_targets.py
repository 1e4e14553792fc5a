"""Distillation losses against the definitions in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RNG = np.random.default_rng(0)
STUDENT = RNG.normal(size=(5, 7)).astype(np.float32) * 3
TEACHER = RNG.normal(size=(5, 7)).astype(np.float32) * 3
LABELS = np.array([0, 6, 2, 2, 5])
WHERE = np.array([True, False, True, True, False])


def softmax(z: Any) -> np.ndarray:
    p = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def divergence(student: Any, teacher: Any, temperature: float) -> np.ndarray:
    """Squared temperature times the sum of ``p log(p / q)``."""
    p = softmax(np.asarray(teacher, np.float64) / temperature)
    q = softmax(np.asarray(student, np.float64) / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1)


soft = jax.jit(jc.distill.soft_targets)
mix = jax.jit(jc.distill.mix)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_are_the_scaled_divergence(temperature: float) -> None:
    loss = soft(STUDENT, TEACHER, temperature=temperature)
    expected = divergence(STUDENT, TEACHER, temperature)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_any_leading_axes_and_a_static_temperature() -> None:
    student, teacher = STUDENT.reshape(1, 5, 7), TEACHER.reshape(1, 5, 7)
    loss = jc.distill.soft_targets(
        jnp.asarray(student), jnp.asarray(teacher), temperature=2
    )
    np.testing.assert_allclose(loss, [divergence(STUDENT, TEACHER, 2)], rtol=1e-5)


def test_half_precision_logits_are_widened_first() -> None:
    student, teacher = (jnp.asarray(z, jnp.bfloat16) for z in (STUDENT, TEACHER))
    loss = soft(student, teacher, temperature=4.0)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, divergence(student, teacher, 4.0), rtol=1e-4)


def test_shifted_logits_give_the_same_loss_and_equal_ones_give_none() -> None:
    rows = np.array([[-40.0], [3.0], [0.0], [11.0], [80.0]], np.float32)
    loss = soft(STUDENT, TEACHER, temperature=4.0)
    shifted = soft(STUDENT + rows, TEACHER - rows, temperature=4.0)
    np.testing.assert_allclose(shifted, loss, rtol=1e-3)
    np.testing.assert_allclose(
        soft(TEACHER + rows, TEACHER, temperature=4.0), 0, atol=1e-4
    )


def test_large_logits_do_not_overflow() -> None:
    student, teacher = 1e4 * STUDENT, 1e4 * TEACHER
    gap = (
        student.max(-1)
        - np.take_along_axis(student, teacher.argmax(-1)[:, None], -1)[:, 0]
    )
    np.testing.assert_allclose(
        soft(student, teacher, temperature=1.0), gap, rtol=1e-5, atol=1e-2
    )


def test_classes_that_both_exclude_count_for_nothing() -> None:
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, 2] = teacher[:, 2] = -np.inf
    others = np.delete(STUDENT, 2, -1), np.delete(TEACHER, 2, -1)
    loss = soft(student, teacher, temperature=4.0)
    np.testing.assert_allclose(loss, divergence(*others, 4.0), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 500.0])
def test_gradients_do_not_shrink_with_the_temperature(temperature: float) -> None:
    """``T (q - p)``, which tends to the difference of centred logits by classes."""
    total = lambda s: jc.distill.soft_targets(s, TEACHER, temperature=temperature).sum()
    grad = jax.grad(total)(jnp.asarray(STUDENT))
    q, p = softmax(STUDENT / temperature), softmax(TEACHER / temperature)
    np.testing.assert_allclose(grad, temperature * (q - p), rtol=1e-3, atol=1e-4)
    if temperature == 500.0:
        centred = [z - z.mean(-1, keepdims=True) for z in (STUDENT, TEACHER)]
        limit = (centred[0] - centred[1]) / 7
        np.testing.assert_allclose(grad, limit, atol=0.02 * np.abs(limit).max())


@pytest.mark.parametrize("loss", ["soft_targets", "mix"])
def test_no_gradient_flows_to_the_teacher(loss: str) -> None:
    total = {
        "soft_targets": lambda t: soft(STUDENT, t, temperature=3.0).sum(),
        "mix": lambda t: mix(STUDENT, t, LABELS, temperature=3.0, alpha=0.5).sum(),
    }[loss]
    assert not np.asarray(jax.grad(total)(jnp.asarray(TEACHER))).any()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mix_weighs_soft_against_hard_targets(alpha: float) -> None:
    hard = -np.log(softmax(STUDENT)[np.arange(5), LABELS])
    expected = alpha * divergence(STUDENT, TEACHER, 4.0) + (1 - alpha) * hard
    loss = mix(STUDENT, TEACHER, LABELS, temperature=4.0, alpha=alpha)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_labels_may_be_probabilities() -> None:
    smooth = (0.9 * np.eye(7)[LABELS] + 0.1 / 7).astype(np.float32)
    hard = -(smooth * np.log(softmax(STUDENT))).sum(-1)
    expected = 0.3 * divergence(STUDENT, TEACHER, 4.0) + 0.7 * hard
    loss = mix(STUDENT, TEACHER, smooth, temperature=4.0, alpha=0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_examples_left_out_count_for_nothing() -> None:
    settings: dict[str, Any] = {"temperature": 4.0, "where": WHERE}
    loss = soft(STUDENT, TEACHER, **settings)
    mixed = mix(STUDENT, TEACHER, LABELS, alpha=0.3, **settings)
    grad = jax.grad(lambda s: mix(s, TEACHER, LABELS, alpha=0.3, **settings).sum())(
        STUDENT
    )
    hard = -np.log(softmax(STUDENT)[np.arange(5), LABELS])
    expected = divergence(STUDENT, TEACHER, 4.0)
    np.testing.assert_allclose(loss, np.where(WHERE, expected, 0), rtol=1e-4)
    np.testing.assert_allclose(
        mixed, np.where(WHERE, 0.3 * expected + 0.7 * hard, 0), rtol=1e-4
    )
    np.testing.assert_array_equal(np.any(grad, axis=-1), WHERE)


@pytest.mark.parametrize("temperature", [0.0, -1])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    message = rf"temperature must be positive and finite; got {temperature}"
    with pytest.raises(ValueError, match=rf"distill\.soft_targets: {message}"):
        jc.distill.soft_targets(STUDENT, TEACHER, temperature=temperature)
    with pytest.raises(ValueError, match=rf"distill\.mix: {message}"):
        jc.distill.mix(STUDENT, TEACHER, LABELS, temperature=temperature, alpha=0.5)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same shape .* \(5, 7\) and \(5, 6\)"):
        jc.distill.soft_targets(STUDENT, TEACHER[:, :6], temperature=1.0)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha must be in \[0, 1\]; got {alpha}"):
        jc.distill.mix(STUDENT, TEACHER, LABELS, temperature=1.0, alpha=alpha)


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (LABELS[:4], r"int64\[4\]"),
        (LABELS.astype(np.float32), r"float32\[5\]"),
        (TEACHER[:, :6], r"float32\[5, 6\]"),
    ],
    ids=["too few", "not integers", "other classes"],
)
def test_labels_of_another_shape_are_refused(labels: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"labels must be integers .* got {got}"):
        jc.distill.mix(STUDENT, TEACHER, labels, temperature=1.0, alpha=0.5)
