"""The loss against a stored top-k teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.distill._logits import (
    check_float,
    check_where,
    kept,
    softened,
    squared,
)
from jaxcompress.distill._shares import forward_shares

from ._top_k import TopK


def top_k_loss(
    student_logits: jax.Array,
    stored: TopK,
    *,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the student from a stored teacher, the rest being one class.

    .. math::
        T^2 \Big( \sum_{j \in top} p_j \log \frac{p_j}{q_j}
        + p_{rest} \log \frac{p_{rest}}{1 - \sum_{j \in top} q_j} \Big)

    The student is asked for the teacher's probabilities of the top classes and for
    their total on all others; how it divides that total is left to it.

    Args:
      student_logits: ``float[..., classes]``.
      stored: From `top_k`, of the same leading shape; no gradient flows to it.
      temperature: One of ``stored.temperatures``. Static.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example. By the chain rule of the divergence it is
      the loss of `soft_targets` less ``T^2 p_rest KL(p' || q')``, with p' and q' the
      distributions among the other classes. So it is never above the full loss, and
      below it by at most ``p_rest R^2 / 8``, where R is the range, over the other
      classes, of the teacher's logit less the student's (Hoeffding's lemma; the
      temperature cancels). Rounding the values to 16 bits adds about
      ``T^2 2**-11 log(k)`` times the range of ``log(p / q)`` over the top classes.

    Raises:
      ValueError: If shapes or vocabularies differ, or the residual was not stored at
        this temperature.

    Examples:
      >>> from jaxcompress.distill import top_k
      >>> z = jnp.array([[1.0, 3.0, 2.0, 0.0]])
      >>> loss = top_k_loss(z + 5.0, top_k(z, 2), temperature=1.0)
      >>> bool(loss[0] < 1e-3)
      True

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015, section 2. Differs: classes that
      were not stored count together, as one.
    """
    number = _check(student_logits, stored, temperature, where)
    stored = jax.lax.stop_gradient(_counted(stored, where))
    s = softened(student_logits, where, temperature)
    indices = stored.indices.astype(jnp.int32)
    top, rest = jnp.take_along_axis(s, indices, axis=-1), _rest(s, indices)
    q = jnp.concatenate([top, rest[..., None]], axis=-1)
    p = _log_teacher(stored, stored.residual[..., number, None], temperature)
    return kept(forward_shares(p, q).sum(-1) * squared(temperature), where)


def _log_teacher(stored: TopK, residual: jax.Array, temperature: float) -> jax.Array:
    """Log-probabilities of the top classes and of the rest."""
    within = jax.nn.log_softmax(stored.values.astype(jnp.float32) / temperature)
    # The top classes have at least k of `classes`, so this is never log(0).
    total = jnp.log(-jnp.expm1(residual))
    return jnp.concatenate([within + total, residual], axis=-1)


def _rest(log_q: jax.Array, indices: jax.Array) -> jax.Array:
    """The student's log-probability of all classes but the top ones.

    The lowest finite number stands where the top ones were: with -inf, the gradient
    would be 0 / 0 if nothing else were left.
    """
    lowest = float(jnp.finfo(jnp.float32).min)
    others = jnp.put_along_axis(log_q, indices, lowest, axis=-1, inplace=False)
    return jax.nn.logsumexp(others, axis=-1)


def _counted(stored: TopK, where: jax.Array | None) -> TopK:
    """Zeros where an example does not count, whose entries may be anything."""
    if where is None:
        return stored
    return jax.tree.map(
        lambda a: jnp.where(where[..., None], a, jnp.zeros_like(a)), stored
    )


def _check(
    student: jax.Array, stored: TopK, temperature: float, where: jax.Array | None
) -> int:
    """Where the temperature's residual stands."""
    who = "distill.top_k_loss"
    check_float(who, "student_logits", student)
    check_where(who, where, student.shape[:-1])
    if student.shape[-1] != stored.classes:
        raise ValueError(
            f"{who}: student_logits must have the teacher's vocabulary of "
            f"{stored.classes} classes; got {student.shape[-1]}. Drop or pad classes "
            "that only one of them has, with -inf for those that do not exist."
        )
    if student.shape[:-1] != stored.indices.shape[:-1]:
        raise ValueError(
            f"{who}: student_logits and stored must have the same leading shape; got "
            f"{student.shape[:-1]} and {stored.indices.shape[:-1]}."
        )
    if isinstance(temperature, Tracer):
        raise ValueError(
            f"{who}: temperature must be a number, not a traced value, since it "
            f"chooses among the stored residuals, at {stored.temperatures}."
        )
    if float(temperature) not in stored.temperatures:
        raise ValueError(
            f"{who}: temperature must be one that the teacher was stored at, of "
            f"{stored.temperatures}; got {temperature}. Its residual cannot be had "
            "from another's: store it with top_k(logits, k, temperature=(...))."
        )
    return stored.temperatures.index(float(temperature))
