"""Distillation of which examples of a batch a network finds alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._paired import at_least_one, batch, products, unit


def similarity_preserving(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Difference of the similarities of each example to those of its batch.

    .. math:: \frac{1}{b} \sum_{j=1}^{b} (G^s_{ij} - G^t_{ij})^2, \quad
       G_{i:} = \frac{(F F^\top)_{i:}}{\|(F F^\top)_{i:}\|_2}

    for example :math:`i` of the :math:`b` that count; each is a row of :math:`F`, its
    features flattened. Student and teacher may have features of different shapes.

    Args:
      student: ``float[batch, ...]`` features or activations.
      teacher: Those of the same examples; no gradient flows to them.
      where: ``bool[batch]`` examples to count, or a mask of more leading axes (tokens).
        What does not count is as if it were not there.

    Returns:
      ``float32[batch]``, each example's share: the mean over those that count is the
      published loss. Others have zero. Scaling either model's features changes nothing.

    Raises:
      ValueError: If the batches differ, or `where` is no mask of leading axes.

    Examples:
      >>> t = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> similarity_preserving(3.0 * t, t).tolist()
      [0.0, 0.0]
      >>> similarity_preserving(jnp.array([[1.0], [0.0]]), t).tolist()
      [0.0, 0.5]

    References:
      Tung & Mori, `Similarity-Preserving Knowledge Distillation
      <https://arxiv.org/abs/1907.09682>`_, 2019, eqs. 1 to 3.
    """
    rows = batch("distill.similarity_preserving", student, teacher, where)
    s, t = (unit(products(x, x)) for x in (rows.student, rows.teacher))
    return jnp.square(s - t).sum(-1) / at_least_one(rows.number)
