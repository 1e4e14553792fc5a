"""Correlations in place of divergences: what the teacher ranks, not how surely."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ._logits import check_logits, kept, softened
from ._spread import unit


def dist(
    student: jax.Array,
    teacher: jax.Array,
    *,
    inter: float | jax.Array = 1.0,
    intra: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Distance of correlations, within an example and within a class (DIST).

    .. math::
        \beta \frac{1}{N} \sum_{i=1}^{N} \big(1 - \rho(s_{i:}, t_{i:})\big) +
        \gamma \frac{1}{K} \sum_{k=1}^{K} \big(1 - \rho(s_{:k}, t_{:k})\big)

    of the softened outputs :math:`s` and :math:`t`, N by K, with Pearson's correlation
    :math:`\rho`. Since :math:`1 - \rho = \frac{1}{2} |u - v|^2` for the centred vectors
    of unit norm, the second sum is shared out among the examples: that of example i is
    :math:`\frac{N}{2K} \sum_k (u_{ik} - v_{ik})^2`.

    Args:
      student: ``float[..., classes]`` logits. All leading axes together are the batch.
      teacher: Logits of the same shape; no gradient flows to them.
      inter: :math:`\beta`, weight of the relations between the classes of an example.
      intra: :math:`\gamma`, weight of the relations between the examples of a class.
      temperature: Positive; traced or not.
      where: ``bool[...]`` examples to count; the loss of others is zero, and they are
        in no relation.

    Returns:
      ``float32[...]``, a loss an example, not negative. Its mean over the examples
      that count is the formula's; a mean over parts of a batch, each on its own, is
      not. Outputs that are constant to within rounding have no correlation, give no
      gradient, and cost half of what uncorrelated ones do, or nothing if both are.

    Raises:
      ValueError: If the shapes differ, `temperature` is not positive, or the teacher's
        logits define no distribution.

    Examples:
      >>> z = jnp.array([[0.0, 1.0], [2.0, 0.0]])
      >>> dist(z, z).tolist()
      [0.0, 0.0]

    References:
      Huang et al., `Knowledge Distillation from A Stronger Teacher
      <https://arxiv.org/abs/2205.10536>`_, 2022, section 4. Differs: nothing is added
      to the norms; a loss an example. A correlation does not shrink with the
      temperature, so there is no factor of its square.
    """
    check_logits("distill.dist", student, teacher, where, temperature)
    shape = student.shape
    counts = jnp.ones(shape[:-1], bool) if where is None else where
    among = jnp.broadcast_to(counts.reshape(-1, 1), (counts.size, shape[-1]))
    s = jnp.exp(softened(student, where, temperature)).reshape(-1, shape[-1])
    t = jnp.exp(softened(teacher, where, temperature)).reshape(-1, shape[-1])
    t = jax.lax.stop_gradient(t)
    rows = _apart(s, t, 1, among).sum(1)
    columns = _apart(s, t, 0, among).sum(1)
    share = counts.sum(dtype=jnp.float32) / shape[-1]
    loss = _weight(inter) * rows + _weight(intra) * share * columns
    return kept(loss.reshape(shape[:-1]), where)


def _apart(s: jax.Array, t: jax.Array, axis: int, among: jax.Array) -> jax.Array:
    """Half the squared distance of centred vectors of unit norm, by entry."""
    gap = unit(s, axis=axis, among=among) - unit(t, axis=axis, among=among)
    return 0.5 * jnp.square(gap)


def _weight(weight: float | jax.Array) -> jax.Array:
    return jnp.asarray(weight, jnp.float32)
