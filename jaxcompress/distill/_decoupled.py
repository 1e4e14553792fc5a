"""Soft targets taken apart: the target class, and the others among themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._labels import defined, targets
from ._logits import check_logits, kept, softened, squared
from ._shares import forward_shares


def decoupled(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Decoupled distillation (DKD).

    .. math::
        T^2 \big( \alpha\, \mathrm{KL}(b_t \,\|\, b_s) +
        \beta\, \mathrm{KL}(\hat p_t \,\|\, \hat p_s) \big)

    where :math:`b = (p_y, 1 - p_y)` is what a softened output gives to the label and to
    all else, and :math:`\hat p_k = p_k / (1 - p_y)`, for :math:`k \ne y`, how it shares
    out the latter.

    Args:
      student: ``float[..., classes]`` logits of two classes or more.
      teacher: Logits of the same shape; no gradient flows to them. What they exclude
        by -inf costs nothing.
      labels: ``int[...]`` classes. Those of examples that do not count may be anything.
      temperature: Positive; traced or not.
      alpha: Weight of the part of the target class; a scalar or ``float32[...]``.
      beta: Weight of the part of the others; a scalar or ``float32[...]``. The paper
        uses 1 to 10.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example; NaN for a traced label out of range. It is
      `soft_targets` where ``alpha = 1`` and ``beta`` is the :math:`1 - p_y` of the
      teacher.

    Raises:
      ValueError: If shapes do not agree, there is one class alone, `temperature` or a
        label is out of range, or the teacher's logits define no distribution.

    Examples:
      >>> student, teacher = jnp.array([[9.0, 1.0, 1.0]]), jnp.array([[3.0, 2.0, 2.0]])
      >>> others = {"temperature": 1.0, "alpha": 0.0, "beta": 1.0}
      >>> decoupled(student, teacher, jnp.array([0]), **others).tolist()
      [0.0]

    References:
      Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_,
      2022, eq. 6 and 7. Differs: temperature squared, as in the authors' experiments.
    """
    who = "distill.decoupled"
    check_logits(who, student, teacher, where, temperature)
    if student.shape[-1] < 2:
        raise ValueError(
            f"{who}: there must be two classes or more; got {student.shape[-1]}. Give "
            "a binary output a second logit, of 0."
        )
    target = targets(who, labels, student.shape, where)
    t_binary, t_others = _parts(softened(teacher, where, temperature), target)
    s_binary, s_others = _parts(softened(student, where, temperature), target)
    t_binary, t_others = jax.lax.stop_gradient((t_binary, t_others))
    loss = _weight(alpha) * forward_shares(t_binary, s_binary).sum(-1)
    loss += _weight(beta) * forward_shares(t_others, s_others).sum(-1)
    return kept(defined(loss, target), where) * squared(temperature)


def _parts(log_p: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logs of the target's and all others' probability, and of the others' shares."""
    others = jnp.where(target, -jnp.inf, log_p)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    own = jnp.where(target, log_p, 0.0).sum(-1, keepdims=True)
    # Where no other class is left, there is nothing to share out.
    shares = others - jnp.where(rest > -jnp.inf, rest, 0.0)
    return jnp.concatenate([own, rest], axis=-1), shares


def _weight(weight: float | jax.Array) -> jax.Array:
    return jnp.asarray(weight, jnp.float32)
