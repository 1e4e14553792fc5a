"""Contrastive distillation within a batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import check_positive, kept
from jaxcompress.distill._paired import (
    batch,
    check_same,
    check_where,
    products,
    unit,
)


def info_nce(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""How well a student's embedding picks out its teacher's among those of the batch.

    .. math:: -\log \frac{e^{\cos(s_i, t_i) / \tau}}{\sum_j e^{\cos(s_i, t_j) / \tau}}

    Args:
      student: ``float[batch, features]`` embeddings, of a projector if need be.
      teacher: Those of the same shape; no gradient flows to them.
      temperature: :math:`\tau`, positive; traced or not.
      where: ``bool[batch]`` examples to count; others are no negatives either.

    Returns:
      ``float32[batch]``, at least 0, and 0 for an example alone. Between examples that
      count there are no further assumptions: two of one class are each other's
      negatives.

    Raises:
      ValueError: If the shapes differ, or `temperature` is not positive.

    Examples:
      >>> x = jnp.eye(2)
      >>> info_nce(x, x, temperature=1.0).tolist()
      [0.313..., 0.313...]

    References:
      van den Oord et al., `Contrastive Predictive Coding
      <https://arxiv.org/abs/1807.03748>`_, 2018, eq. 4. Differs: the score is the
      cosine over a temperature.
    """
    who = "distill.info_nce"
    check_same(who, student, teacher)
    check_positive(who, "temperature", temperature)
    rows = batch(who, student, teacher, where)
    check_where(who, where, jnp.shape(student)[:1])
    scores = products(unit(rows.student), unit(rows.teacher)) / temperature
    candidates = rows.pairs | jnp.eye(len(scores), dtype=bool)
    total = jax.nn.logsumexp(scores, axis=-1, where=candidates)
    return kept(total - jnp.diagonal(scores), where)
