"""Distances between the outputs of student and teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._logits import check_logits, kept, softened, squared, widened
from ._shares import excluded, jensen_shannon_shares, reverse_shares


def check_beta(who: str, beta: float | jax.Array) -> None:
    """Refuse what is known and no mixture of both."""
    if not isinstance(beta, Tracer) and not 0.0 < float(beta) < 1.0:
        raise ValueError(
            f"{who}: beta must be between 0 and 1, both excluded; got {beta}. The "
            "limits are the divergences of soft_targets and of reverse_kl."
        )


def logit_mse(
    student: jax.Array,
    teacher: jax.Array,
    *,
    centred: bool = False,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Mean squared difference of the logits.

    .. math:: \frac{1}{K} \sum_{k=1}^{K} (z_{s,k} - z_{t,k})^2

    Args:
      student: ``float[..., classes]`` logits.
      teacher: Logits of the same shape; no gradient flows to them.
      centred: Compare logits less their mean over the classes, so that a shift of
        all of them costs nothing, as in a softmax. Static.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example; of the classes that the teacher does not
      exclude by -inf. Centred, half of it is the limit of `soft_targets` for a high
      temperature.

    Raises:
      ValueError: If the shapes differ, or the teacher's logits are not finite.

    Examples:
      >>> z = jnp.array([[1.0, 2.0, 3.0]])
      >>> logit_mse(z + 2.0, z).tolist(), logit_mse(z + 2.0, z, centred=True).tolist()
      ([4.0], [0.0])

    References:
      Ba & Caruana, `Do Deep Nets Really Need to be Deep?
      <https://arxiv.org/abs/1312.6184>`_, 2014, eq. 1; Kim et al., `Comparing
      Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation
      <https://arxiv.org/abs/2105.08919>`_, 2021, section 3. Differs: the mean over the
      classes, not their sum.
    """
    check_logits("distill.logit_mse", student, teacher, where)
    s, t = widened(student, where), jax.lax.stop_gradient(widened(teacher, where))
    possible = t != -jnp.inf
    gap = jnp.where(possible, s, 0.0) - jnp.where(possible, t, 0.0)
    classes = possible.sum(-1, keepdims=True, dtype=jnp.float32)
    if centred:
        mean = gap.sum(-1, keepdims=True) / jnp.maximum(classes, 1.0)
        gap = jnp.where(possible, gap - mean, 0.0)
    return kept(jnp.square(gap).sum(-1) / jnp.maximum(classes[..., 0], 1.0), where)


def reverse_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of the teacher's softened outputs from the student's.

    .. math::
        T^2 \, \mathrm{KL}\big(\sigma(z_s / T) \,\|\, \sigma(z_t / T)\big)

    A student too small to cover all that the teacher does is drawn to a part of it,
    where `soft_targets` spreads it over all.

    Args:
      student: ``float[..., classes]`` logits.
      teacher: Logits of the same shape; no gradient flows to them. What they exclude
        by -inf is excluded from the student's softmax too: any probability there
        would cost infinitely much.
      temperature: Positive; traced or not.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example, zero where the outputs agree.

    Raises:
      ValueError: If the shapes differ, `temperature` is not positive, or the teacher's
        logits define no distribution.

    Examples:
      >>> t = jnp.array([[1.0, 2.0, -jnp.inf]])
      >>> reverse_kl(jnp.array([[3.0, 4.0, 9.0]]), t, temperature=2.0).tolist()
      [0.0]

    References:
      Gu et al., `MiniLLM: Knowledge Distillation of Large Language Models
      <https://arxiv.org/abs/2306.08543>`_, 2024, eq. 1. Differs: for a position, on
      given outputs; temperature squared.
    """
    check_logits("distill.reverse_kl", student, teacher, where, temperature)
    t = jax.lax.stop_gradient(softened(teacher, where, temperature))
    s = softened(excluded(widened(student, where), t), None, temperature)
    return reverse_shares(t, s).sum(-1) * squared(temperature)


def jensen_shannon(
    student: jax.Array,
    teacher: jax.Array,
    *,
    beta: float | jax.Array = 0.5,
    temperature: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Divergence of both softened outputs from their mixture.

    .. math::
        T^2 \big( \beta\, \mathrm{KL}(p_t \,\|\, m) + (1 - \beta)\,
        \mathrm{KL}(p_s \,\|\, m) \big), \quad m = \beta p_t + (1 - \beta) p_s

    Args:
      student: ``float[..., classes]`` logits.
      teacher: Logits of the same shape; no gradient flows to them.
      beta: Weight of the teacher in the mixture, in (0, 1); traced or not.
      temperature: Positive; traced or not.
      where: ``bool[...]`` examples to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an example, zero where the outputs agree, bounded also
      where one excludes a class. Divided by ``beta`` it tends to `soft_targets` for
      ``beta`` to 0, divided by ``1 - beta`` to `reverse_kl` for ``beta`` to 1.

    Raises:
      ValueError: If the shapes differ, `beta` or `temperature` is out of range, or the
        teacher's logits define no distribution.

    Examples:
      >>> opposite = jnp.array([[0.0, -jnp.inf]]), jnp.array([[-jnp.inf, 0.0]])
      >>> float(jensen_shannon(*opposite, temperature=1.0)[0] / jnp.log(2.0))
      1.0

    References:
      Agarwal et al., `On-Policy Distillation of Language Models
      <https://arxiv.org/abs/2306.13649>`_, 2024, section 2 (generalized JSD). Differs:
      temperature squared.
    """
    who = "distill.jensen_shannon"
    check_logits(who, student, teacher, where, temperature)
    check_beta(who, beta)
    t = jax.lax.stop_gradient(softened(teacher, where, temperature))
    s = softened(student, where, temperature)
    return jensen_shannon_shares(beta)(t, s).sum(-1) * squared(temperature)
