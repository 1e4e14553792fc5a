"""Logits brought to one mean and one spread."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._logits import check_float, check_where, widened
from ._spread import unit


def standardize(logits: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    r"""Logits less their mean over the classes, in units of their standard deviation.

    .. math:: \frac{z - \bar z}{\operatorname{std}(z)}

    For student and teacher alike, before any loss of logits: the student then learns
    the order and the relative gaps of the teacher's logits, not how large they are ::

        soft_targets(standardize(student), standardize(teacher), temperature=2.0)

    Args:
      logits: ``float[..., classes]``; -inf excludes a class.
      where: ``bool[...]`` examples to count; others give zeros, also where they are
        NaN.

    Returns:
      ``float32[..., classes]`` of mean 0 and standard deviation 1 in every example, of
      the classes not excluded, which stay -inf. Zeros, and no gradient, for logits
      that are equal to within rounding.

    Raises:
      ValueError: If `logits` is not floating or `where` not of its leading axes.

    Examples:
      >>> standardize(jnp.array([[100.0, 300.0, -jnp.inf, 300.0, 100.0]])).tolist()
      [[-1.0, 1.0, -inf, 1.0, -1.0]]

    References:
      Sun et al., `Logit Standardization in Knowledge Distillation
      <https://arxiv.org/abs/2403.01427>`_, 2024, Algorithm 1. Differs: nothing is added
      to the standard deviation; the temperature is the loss's.
    """
    who = "distill.standardize"
    check_float(who, "logits", logits)
    check_where(who, where, logits.shape[:-1])
    z = widened(logits, where)
    left = z != -jnp.inf
    found = unit(z, axis=-1, among=left)
    count = left.sum(-1, keepdims=True, dtype=jnp.float32)
    return jnp.where(left, found * jnp.sqrt(count), -jnp.inf)
