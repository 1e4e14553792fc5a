"""Distillation from softened outputs, alone and mixed with hard labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._labels import cross_entropy
from ._logits import check_logits, kept, softened, squared
from ._shares import forward_shares


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
      teacher: Logits of the same shape; no gradient flows to them. What they exclude
        by -inf costs nothing.
      temperature: Positive; traced or not.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example, zero where the outputs agree. Its gradient
      does not shrink with the temperature.

    Raises:
      ValueError: If the shapes differ, `temperature` is not positive, or the teacher's
        logits define no distribution (see `check_teacher`).

    Examples:
      >>> z = jnp.array([[1.0, 2.0, 3.0]])
      >>> soft_targets(z + 5.0, z, temperature=4.0).tolist()
      [0.0]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015, eq. 1 and section 2. Differs: KL
      divergence instead of cross entropy, which differ by a constant.
    """
    check_logits("distill.soft_targets", student, teacher, where, temperature)
    t = jax.lax.stop_gradient(softened(teacher, where, temperature))
    s = softened(student, where, temperature)
    return kept(forward_shares(t, s).sum(-1) * squared(temperature), where)


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
      labels: ``int[...]`` classes, or ``float[..., classes]`` probabilities. Those of
        examples that do not count may be anything.
      temperature: Of the soft part; the hard part is at temperature 1.
      alpha: Weight of the soft part, in [0, 1].
      where: ``bool[...]`` examples to count.

    Returns:
      ``float32[...]``, a loss an example; NaN for a traced label out of range.

    Raises:
      ValueError: If shapes do not agree, `temperature`, `alpha` or a label is out of
        range, or the teacher's logits define no distribution.

    Examples:
      >>> z = jnp.array([[0.0, 0.0]])
      >>> loss = mix(z, z, jnp.array([1]), temperature=4.0, alpha=0.5)
      >>> float(loss[0] / jnp.log(2.0))
      0.5

    References:
      Hinton et al., 2015, section 2.
    """
    who = "distill.mix"
    check_logits(who, student, teacher, where, temperature)
    if not isinstance(alpha, Tracer) and not 0.0 <= float(alpha) <= 1.0:
        raise ValueError(
            f"{who}: alpha must be in [0, 1]; got {alpha}. Add the losses with weights "
            "of your own where they need no sum of 1."
        )
    hard = cross_entropy(who, student, labels, where)
    soft = soft_targets(student, teacher, temperature=temperature, where=where)
    a = jnp.asarray(alpha, jnp.float32)
    return a * soft + (1.0 - a) * hard
