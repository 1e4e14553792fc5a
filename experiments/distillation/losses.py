"""Losses that several experiments compare: what the teacher says, and the labels."""

from __future__ import annotations

from typing import Any

import jax
import optax

import jaxcompress as jc
from experiments.distillation.training import Seen


def labels_only(seen: Seen) -> jax.Array:
    """Cross entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(seen.student, seen.labels)
    return losses.mean()


def soft(seen: Seen, temperature: float) -> jax.Array:
    """Softened outputs, and the labels a little."""
    return jc.distill.mix(
        seen.student, seen.teacher, seen.labels, temperature=temperature, alpha=0.9
    ).mean()


def logit_mse(seen: Seen) -> jax.Array:
    """The teacher's logits, and the labels."""
    found = jc.distill.logit_mse(seen.student, seen.teacher)
    return labels_only(seen) + found.mean()


def decoupled(seen: Seen, temperature: float, beta: float) -> jax.Array:
    """The target class and the others apart, and the labels."""
    found = jc.distill.decoupled(
        seen.student,
        seen.teacher,
        seen.labels,
        temperature=temperature,
        alpha=1.0,
        beta=beta,
    )
    return labels_only(seen) + found.mean()


def correlations(seen: Seen) -> jax.Array:
    """DIST: correlations within an example and within a class, and the labels."""
    found = jc.distill.dist(seen.student, seen.teacher, temperature=4.0)
    return labels_only(seen) + 2.0 * found.mean()


def hints(seen: Seen, projector: Any = None) -> jax.Array:
    """The one value kept inside the teacher from the student's, and the labels.

    Args:
      seen: Of a student and a teacher with one tap each.
      projector: Of the student's value; None where widths are alike.
    """
    (student,), (teacher,) = seen.student_taps.values(), seen.teacher_taps.values()
    if projector is not None:
        student = projector.apply(seen.projectors, student)
    found = jc.distill.hint(student, teacher, normalize=True)
    return labels_only(seen) + found.mean()
