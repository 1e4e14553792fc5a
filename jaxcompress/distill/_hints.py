"""Distillation from intermediate features."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import kept
from jaxcompress.distill._paired import check_same, check_where, pair, unit


def hint(
    student: jax.Array,
    teacher: jax.Array,
    *,
    normalize: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Mean squared difference of features.

    .. math:: \frac{1}{d} \sum_{c=1}^{d} (s_c - t_c)^2

    Args:
      student: ``float[..., features]``, of a projector where the sizes differ.
      teacher: Features of the same shape; no gradient flows to them.
      normalize: Whether vectors are first scaled to a mean square of 1, so that the
        loss is the squared distance between vectors of length 1. Static.
      where: ``bool[...]`` examples or positions to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss a vector. With `normalize` it is ``2 - 2 cos``, unless
      a vector is zero, which stays zero and gets no gradient.

    Raises:
      ValueError: If the shapes differ, or `where` is no mask of the leading axes.

    Examples:
      >>> hint(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])).tolist()
      [2.0]
      >>> hint(jnp.array([0.0, 2.0]), jnp.array([3.0, 0.0]), normalize=True).item()
      2.0

    References:
      Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`_, 2015, eq. 3. Differs:
      the mean over features instead of half the sum. Normalized: Sun et al., `Patient
      Knowledge Distillation <https://arxiv.org/abs/1908.09355>`_, 2019, eq. 7.
    """
    who = "distill.hint"
    check_same(who, student, teacher)
    check_where(who, where, jnp.shape(student)[:-1])
    s, t = pair(who, student, teacher, where)
    if normalize:
        return kept(jnp.square(unit(s) - unit(t)).sum(-1), where)
    return jnp.square(s - t).mean(-1)
