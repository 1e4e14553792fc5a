"""Variational information distillation: a Gaussian of learned variance."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import kept
from jaxcompress.distill._paired import check_same, check_where, pair

_MIN_VARIANCE = 1e-5


class GaussianVariance(NamedTuple):
    """Variance of each teacher channel given the student; part of the student's params.

    Attributes:
      raw: ``float32[features]``; the variance is its softplus plus a minimum.
    """

    raw: jax.Array


def gaussian_variance(
    features: int | jax.Array | jax.ShapeDtypeStruct,
    *,
    variance: float = 5.0,
    min_variance: float = _MIN_VARIANCE,
) -> GaussianVariance:
    r"""Equal variances for `variational_information`, to be trained with the student.

    Args:
      features: Number of teacher channels, or an example of the teacher's features.
      variance: Of each channel at the start; more than `min_variance`.
      min_variance: As for `variational_information`.

    Returns:
      Params of which :math:`\log(1 + e^{\alpha}) + \epsilon` is `variance`.

    Raises:
      ValueError: If the variances are not in order.

    Examples:
      >>> gaussian_variance(3).raw.tolist()
      [4.993..., 4.993..., 4.993...]

    References:
      Ahn et al., `Variational Information Distillation
      <https://arxiv.org/abs/1904.05835>`_, 2019, section 2.
    """
    if not 0.0 <= min_variance < variance:
        raise ValueError(
            "distill.gaussian_variance: variance must be more than min_variance, and "
            f"that at least 0; got {variance} and {min_variance}."
        )
    size = features if isinstance(features, int) else features.shape[-1]
    excess = variance - min_variance
    # The inverse of softplus, without the overflow of exp.
    raw = excess + math.log(-math.expm1(-excess))
    return GaussianVariance(jnp.full(size, raw, jnp.float32))


def variational_information(
    student: jax.Array,
    teacher: jax.Array,
    params: GaussianVariance,
    *,
    min_variance: float = _MIN_VARIANCE,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Negative log likelihood of the teacher's features around the student's.

    .. math:: \frac{1}{d} \sum_{c=1}^{d} \log \sigma_c +
       \frac{(t_c - s_c)^2}{2 \sigma_c^2}, \quad
       \sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon

    of a Gaussian. Channels that the student cannot predict get a large variance and
    count for little.

    Args:
      student: ``float[..., features]``: the mean, from a projector (the paper's has
        layers of its own: `mlp_projector`).
      teacher: Features of the same shape; no gradient flows to them.
      params: :math:`\alpha`, from `gaussian_variance`, trained with the student.
      min_variance: :math:`\epsilon`, which bounds the loss from below.
      where: ``bool[...]`` examples or positions to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss a vector, without the constant; it may be negative.

    Raises:
      ValueError: If the shapes differ, or `params` have not one entry a feature.

    Examples:
      >>> params = gaussian_variance(2, variance=1.0)
      >>> x, t = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])
      >>> variational_information(x, t, params).tolist()
      [2.5]

    References:
      Ahn et al., `Variational Information Distillation
      <https://arxiv.org/abs/1904.05835>`_, 2019, section 2 (the
      Gaussian of a variance for each channel). Differs: the mean over channels, and
      none over positions, instead of sums.
    """
    who = "distill.variational_information"
    check_same(who, student, teacher)
    check_where(who, where, jnp.shape(student)[:-1])
    if jnp.shape(params.raw) != jnp.shape(teacher)[-1:]:
        raise ValueError(
            f"{who}: params must have one entry a feature, {jnp.shape(teacher)[-1:]}; "
            f"got {jnp.shape(params.raw)}. Make them with distill.gaussian_variance("
            f"{jnp.shape(teacher)[-1]})."
        )
    s, t = pair(who, student, teacher, where)
    variance = jax.nn.softplus(params.raw.astype(jnp.float32)) + min_variance
    variance = jnp.broadcast_to(variance, s.shape)
    loss = 0.5 * (jnp.log(variance) + jnp.square(t - s) / variance)
    return kept(loss.mean(-1), where)
