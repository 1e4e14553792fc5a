"""Distillation of how the vectors of a transformer's layer relate to each other."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import kept
from jaxcompress.distill._paired import (
    check_leading,
    check_where,
    pair,
    products,
)

# Finite, so that differences of logs of what is masked are finite too.
_MASKED = -1e30


def relation(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: int,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the student's relations between positions from the teacher's.

    .. math:: \frac{1}{A} \sum_{a=1}^{A} \mathrm{KL}(R^t_{a,i} \,\|\, R^s_{a,i}),
       \quad R_a = \operatorname{softmax}\left(\frac{X_a X_a^\top}{\sqrt{d_a}}\right)

    for position :math:`i`, where :math:`X_a` is the part of relation head :math:`a` of
    the queries, of the keys, or of the values: one call for each, summed. The models
    may differ in width and in their own heads.

    Args:
      student: ``float[..., positions, features]``, all heads side by side.
      teacher: The same of the teacher; no gradient flows to them.
      heads: :math:`A`, the number of relation heads, of both; divides the features of
        each. Static.
      where: ``bool[..., positions]`` tokens to count. Others, padding, are related to
        nothing and their loss is zero.

    Returns:
      ``float32[..., positions]``, a loss a position, zero where the relations agree.

    Raises:
      ValueError: If leading axes or positions differ, or `heads` does not divide.

    Examples:
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> relation(x[:, ::-1], x, heads=1).tolist()
      [0.0, 0.0]
      >>> relation(x[:, ::-1], x, heads=2).tolist()
      [0.115..., 0.964...]

    References:
      Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`_, 2020, section 3.2
      (values, with the model's heads as relation heads); `MiniLMv2
      <https://arxiv.org/abs/2012.15828>`_, 2021, section 3.1. Differs: not averaged
      over positions. For the attention of MiniLM see `attention_matrices`.
    """
    who = "distill.relation"
    check_leading(who, student, teacher)
    _check_heads(who, heads, jnp.shape(student), jnp.shape(teacher))
    check_where(who, where, jnp.shape(student)[:-1])
    s, t = pair(who, student, teacher, where)
    counts = jnp.ones(s.shape[:-1], bool) if where is None else jnp.asarray(where)
    log_s, log_t = (_log_relations(x, heads, counts) for x in (s, t))
    loss = (jnp.exp(log_t) * (log_t - log_s)).sum(-1).mean(-2)
    return kept(loss, where)


def _log_relations(x: jax.Array, heads: int, counts: jax.Array) -> jax.Array:
    """Logs of relations, ``float32[..., heads, positions, positions]``."""
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -2, -3)
    scores = products(x, x) / math.sqrt(x.shape[-1])
    itself = jnp.eye(x.shape[-2], dtype=bool)
    related = jnp.expand_dims(counts, (-3, -2)) | jnp.broadcast_to(itself, scores.shape)
    return jax.nn.log_softmax(jnp.where(related, scores, _MASKED))


def _check_heads(
    who: str, heads: int, student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    if len(student) < 2:
        raise ValueError(
            f"{who}: student must be [..., positions, features]; got {student}. Put "
            "the heads side by side in the last axis."
        )
    if heads < 1 or student[-1] % heads or teacher[-1] % heads:
        common = math.gcd(student[-1], teacher[-1])
        raise ValueError(
            f"{who}: heads must divide the features of both; got {heads} for "
            f"{student[-1]} and {teacher[-1]}. Any divisor of {common} will do."
        )
