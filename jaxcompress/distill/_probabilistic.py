"""Distillation of the probability that examples of a batch are neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._paired import batch, products, unit


def probabilistic_transfer(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Divergence of the student's distribution over neighbours from the teacher's.

    .. math:: \sum_{j \ne i} p_{j|i} \log \frac{p_{j|i}}{q_{j|i}}, \quad
       p_{j|i} = \frac{K(t_i, t_j)}{\sum_{k \ne i} K(t_i, t_k)}, \quad
       K(a, b) = \frac{1}{2} \left(\frac{a \cdot b}{\|a\| \|b\|} + 1\right)

    and :math:`q` the same of the student.

    Args:
      student: ``float[batch, ...]`` features, flattened for each example.
      teacher: Those of the same examples, of any size; no gradient flows to them.
      where: ``bool[batch]`` examples to count, or a mask of more leading axes (tokens).

    Returns:
      ``float32[batch]``, each example's share: the sum over those that count is the
      published loss. Zero for others. Scaling any vector changes nothing. A zero vector
      is as far from all others; a student's kernel of 0 counts as the least positive
      float.

    Raises:
      ValueError: If the batches differ, or `where` is no mask of leading axes.

    Examples:
      >>> t = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
      >>> s = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
      >>> probabilistic_transfer(3.0 * t, t).tolist()
      [0.0, 0.0, 0.0]
      >>> bool((probabilistic_transfer(s, t) > 0).all())
      True

    References:
      Passalis & Tefas, `Learning Deep Representations with Probabilistic Knowledge
      Transfer <https://arxiv.org/abs/1803.10837>`_, 2018, section 3
      (cosine kernel). Differs: the authors' code counts each example as its own
      neighbour.
    """
    rows = batch("distill.probabilistic_transfer", student, teacher, where)
    log_q, log_p = (
        _log_neighbours(x, rows.pairs) for x in (rows.student, rows.teacher)
    )
    return jnp.where(rows.pairs, jnp.exp(log_p) * (log_p - log_q), 0.0).sum(-1)


def _log_neighbours(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """Logs of the conditional probabilities, a distribution a row; 0 elsewhere."""
    directions = unit(x)
    kernel = 0.5 * (products(directions, directions) + 1.0)
    kernel = jnp.maximum(kernel, jnp.finfo(jnp.float32).tiny)
    total = jnp.where(pairs, kernel, 0.0).sum(-1, keepdims=True)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(pairs, jnp.log(kernel) - log_total, 0.0)
