"""Relational knowledge distillation: distances and angles between examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._paired import (
    Batch,
    at_least_one,
    batch,
    norm,
    products,
    unit,
)


def relational_distance(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Difference of the distances from each example to the others of its batch.

    .. math:: \frac{1}{b-1} \sum_{j \ne i} \ell_\delta
       \left(\frac{\|s_i - s_j\|}{\mu_s}, \frac{\|t_i - t_j\|}{\mu_t}\right)

    with the Huber loss :math:`\ell_\delta`, quadratic up to 1, and the mean distance
    :math:`\mu` of the pairs that count.

    Args:
      student: ``float[batch, ...]`` features, flattened for each example.
      teacher: Those of the same examples, of any size; no gradient flows to them.
      where: ``bool[batch]`` examples to count, or a mask of more leading axes (tokens).

    Returns:
      ``float32[batch]``, each example's share: the mean over those that count is the
      mean over pairs. Zero for others, and where fewer than two count. Moving, turning
      or scaling all features changes nothing; equal examples are at distance zero and
      get no gradient from each other. No temporary is ``[batch, batch, features]``.

    Raises:
      ValueError: If the batches differ, or `where` is no mask of leading axes.

    Examples:
      >>> t = jnp.array([[0.0], [1.0], [3.0]])
      >>> relational_distance(5.0 * t + 1.0, t).tolist()
      [0.0, 0.0, 0.0]
      >>> relational_distance(t, jnp.array([[0.0], [2.0], [4.0]])).tolist()
      [0.015625, 0.03125, 0.015625]

    References:
      Park et al., `Relational Knowledge Distillation
      <https://arxiv.org/abs/1904.05068>`_, 2019, eqs. 5 to 8. Differs: the mean over
      pairs of different examples; the authors' code also counts each with itself.
    """
    rows = batch("distill.relational_distance", student, teacher, where)
    s, t = (_distances(x, rows.pairs) for x in (rows.student, rows.teacher))
    loss = jnp.where(rows.pairs, _huber(s - t), 0.0).sum(-1)
    return loss / at_least_one(rows.number - 1.0)


def _distances(x: jax.Array, pairs: jax.Array) -> jax.Array:
    """Distances between rows, over their mean over the pairs."""
    # One row at a time, else gradients keep all differences: [batch, batch, features].
    row = jax.checkpoint(lambda start: norm(x - start[None]))
    distances = jnp.where(pairs, jax.lax.map(row, x), 0.0)
    mean = distances.sum() / at_least_one(pairs.sum(dtype=jnp.float32))
    return distances / jnp.where(mean > 0, mean, 1.0)


def relational_angle(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Difference of the angles that pairs of examples make at each example.

    .. math:: \frac{1}{(b-1)(b-2)} \sum_{i, k} \ell_\delta
       \big(\cos \angle s_i s_j s_k, \cos \angle t_i t_j t_k\big)

    for example :math:`j`, over different :math:`i` and :math:`k`, with the Huber loss.

    Args:
      student: ``float[batch, ...]`` features, flattened for each example.
      teacher: Those of the same examples, of any size; no gradient flows to them.
      where: ``bool[batch]`` examples to count, or a mask of more leading axes (tokens).

    Returns:
      ``float32[batch]``, the share of each example as the vertex: the mean over those
      that count is the mean over triplets. Zero for others, and where fewer than three
      count. Moving, turning or scaling all features changes nothing; the angle at equal
      examples has cosine 0. One vertex is computed at a time: the largest temporaries
      are ``[batch, batch]`` and ``[batch, features]``.

    Raises:
      ValueError: If the batches differ, or `where` is no mask of leading axes.

    Examples:
      >>> t = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> relational_angle(2.0 * t, t).tolist()
      [0.0, 0.0, 0.0]
      >>> relational_angle(jnp.array([[0.0], [1.0], [2.0]]), t)[0].item()
      0.5

    References:
      Park et al., `Relational Knowledge Distillation
      <https://arxiv.org/abs/1904.05068>`_, 2019, eqs. 9 and 10. Differs: the mean over
      triplets of different examples; the authors' code counts all.
    """
    rows = batch("distill.relational_angle", student, teacher, where)
    vertex = jax.checkpoint(lambda own: _at_vertex(rows, *own))
    loss = jax.lax.map(vertex, (rows.student, rows.teacher, rows.pairs))
    return loss / at_least_one((rows.number - 1.0) * (rows.number - 2.0))


def _at_vertex(rows: Batch, s: jax.Array, t: jax.Array, others: jax.Array) -> jax.Array:
    """Sum of the differences of all angles at one example."""
    sides = unit(rows.student - s[None]), unit(rows.teacher - t[None])
    angles, targets = (products(x, x) for x in sides)
    counted = rows.pairs & others[:, None] & others[None, :]
    return jnp.where(counted, _huber(angles - targets), 0.0).sum()


def _huber(gap: jax.Array) -> jax.Array:
    size = jnp.abs(gap)
    return jnp.where(size <= 1.0, 0.5 * jnp.square(gap), size - 0.5)
