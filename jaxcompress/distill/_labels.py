"""Hard labels: which class is the target, and what missing it costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._logits import kept, widened


def targets(
    who: str, labels: jax.Array, shape: tuple[int, ...], where: jax.Array | None
) -> jax.Array:
    """``bool[..., classes]``, true at the label; all false for a label out of range.

    Labels of examples that do not count may be anything, as -1 for padding.
    """
    if labels.shape != shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"{who}: labels must be integers of shape {shape[:-1]}; got "
            f"{labels.dtype}{list(labels.shape)}. Take the argmax of probabilities."
        )
    _check_range(who, labels, shape[-1], where)
    labels = jnp.asarray(labels).astype(jnp.int32)
    if where is not None:
        labels = jnp.where(where, labels, 0)
    classes = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return classes == labels[..., None]


def _check_range(
    who: str, labels: jax.Array, classes: int, where: jax.Array | None
) -> None:
    if isinstance(labels, Tracer) or isinstance(where, Tracer):
        return
    given = np.asarray(labels) if where is None else np.asarray(labels)[where]
    wrong = given[(given < 0) | (given >= classes)]
    if wrong.size:
        raise ValueError(
            f"{who}: labels must be in [0, {classes}); got {wrong[0]}, and "
            f"{wrong.size} like it of {given.size}. Leave padding out with where=."
        )


def defined(loss: jax.Array, target: jax.Array) -> jax.Array:
    """The loss, NaN for the examples whose label is out of range."""
    return jnp.where(target.any(-1), loss, jnp.nan)


def cross_entropy(
    who: str, student: jax.Array, labels: jax.Array, where: jax.Array | None
) -> jax.Array:
    """Cross entropy an example, from classes or from probabilities."""
    log_p = jax.nn.log_softmax(widened(student, where))
    if labels.shape == student.shape:
        given = labels.astype(jnp.float32)
        # A class that is never right costs nothing, also where its log is -inf.
        cost = jnp.where(given != 0, given * log_p, 0.0)
        return kept(-cost.sum(-1), where)
    if labels.shape != student.shape[:-1] or not jnp.issubdtype(
        labels.dtype, jnp.integer
    ):
        raise ValueError(
            f"{who}: labels must be integers of shape "
            f"{student.shape[:-1]} or probabilities of shape {student.shape}; got "
            f"{labels.dtype}{list(labels.shape)}. Take the argmax of one-hot rows of "
            "other classes."
        )
    target = targets(who, labels, student.shape, where)
    return kept(defined(-jnp.where(target, log_p, 0.0).sum(-1), target), where)
