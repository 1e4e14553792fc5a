"""Distillation from softened outputs, alone and mixed with hard labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def soft_targets(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the student's softened outputs from the teacher's.

    .. math::
        T^2 \, \mathrm{KL}\big(\sigma(z_t / T) \,\|\, \sigma(z_s / T)\big)

    Args:
      student: ``float[..., classes]`` logits.
      teacher: Logits of the same shape; no gradient flows to them.
      temperature: Positive; traced or not.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example, zero where the outputs agree. Its gradient
      does not shrink with the temperature.

    Raises:
      ValueError: If the shapes differ, or `temperature` is not positive.

    Examples:
      >>> z = jnp.array([[1.0, 2.0, 3.0]])
      >>> soft_targets(z + 5.0, z, temperature=4.0).tolist()
      [0.0]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015, eq. 1 and section 2. Differs: KL
      divergence instead of cross entropy, which differ by a constant.
    """
    _check("distill.soft_targets", student, teacher, temperature)
    teacher = jax.lax.stop_gradient(teacher)
    student, teacher = counted(student, where), counted(teacher, where)
    s = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    t = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    # A class that the teacher excludes counts for nothing, also where its log is -inf.
    possible = t > -jnp.inf
    gap = jnp.where(possible, t, 0.0) - jnp.where(possible, s, 0.0)
    loss = (jnp.exp(t) * gap).sum(-1)
    return loss * jnp.square(jnp.float32(temperature))


def counted(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """The logits of the examples that count; zeros for others, which may be NaN."""
    if where is None:
        return logits
    return jnp.where(where[..., None], logits, jnp.zeros_like(logits))


def mix(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array,
    alpha: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Soft targets mixed with hard labels.

    .. math:: \alpha\, L_{soft} + (1 - \alpha)\, L_{cross\,entropy}

    Args:
      student: ``float[..., classes]`` logits.
      teacher: Logits of the same shape.
      labels: ``int[...]`` classes, or ``float[..., classes]`` probabilities.
      temperature: Of the soft part; the hard part is at temperature 1.
      alpha: Weight of the soft part, in [0, 1].
      where: ``bool[...]`` examples to count.

    Returns:
      ``float32[...]``, a loss an example.

    Raises:
      ValueError: If shapes do not agree, or `temperature` or `alpha` is out of range.

    References:
      Hinton et al., 2015, section 2.
    """
    _check("distill.mix", student, teacher, temperature)
    if isinstance(alpha, int | float) and not 0.0 <= alpha <= 1.0:
        raise ValueError(f"distill.mix: alpha must be in [0, 1]; got {alpha}.")
    soft = soft_targets(student, teacher, temperature=temperature, where=where)
    return alpha * soft + (1.0 - alpha) * _cross_entropy(student, labels, where)


def _cross_entropy(
    student: jax.Array, labels: jax.Array, where: jax.Array | None
) -> jax.Array:
    log_p = jax.nn.log_softmax(counted(student, where).astype(jnp.float32))
    if labels.shape == student.shape:
        loss = -(labels.astype(jnp.float32) * log_p).sum(-1)
    elif labels.shape == student.shape[:-1] and jnp.issubdtype(
        labels.dtype, jnp.integer
    ):
        loss = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    else:
        raise ValueError(
            "distill.mix: labels must be integers of shape "
            f"{student.shape[:-1]} or probabilities of shape {student.shape}; got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    return loss if where is None else jnp.where(where, loss, 0.0)


def _check(
    who: str, student: jax.Array, teacher: jax.Array, temperature: float | jax.Array
) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{who}: student and teacher must have the same shape (and vocabulary); "
            f"got {student.shape} and {teacher.shape}."
        )
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"{who}: temperature must be positive; got {temperature}.")
