"""Distillation from where a network looks: maps of activations, and attention."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress.distill._paired import (
    at_least_one,
    check_where,
    pair,
    unit,
)


def attention_transfer(
    student: jax.Array,
    teacher: jax.Array,
    *,
    power: float = 2.0,
    position_axes: int = 2,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Difference of the normalized maps of how active each position is.

    .. math:: \frac{1}{P} \left\| \frac{Q(s)}{\|Q(s)\|_2} - \frac{Q(t)}{\|Q(t)\|_2}
       \right\|_2^2, \quad Q(a)_j = \sum_c |a_{jc}|^p

    over :math:`P` positions. The channels are summed over, so student and teacher may
    have different numbers of them.

    Args:
      student: ``float[..., *positions, channels]`` activations.
      teacher: The same, of any number of channels; no gradient flows to them.
      power: :math:`p \ge 1`; the higher, the more the strongest channel
        counts. Static.
      position_axes: How many axes hold positions: 2 for images, 1 for sequences.
        Static.
      where: ``bool[...]`` examples to count, or ``bool[..., *positions]`` positions;
        others have no activity, and an example without any has zero loss.

    Returns:
      ``float32[...]``, a loss an example, at most ``2 / P``. Scaling either model's
      activations does not change it; a map of zeros stays zero and gets no gradient.

    Raises:
      ValueError: If positions or leading axes differ, or `power` is below 1.

    Examples:
      >>> s, t = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0, 0.0], [3.0, 1.0]]])
      >>> attention_transfer(s, t, position_axes=1).tolist()
      [1.0]

    References:
      Zagoruyko & Komodakis, `Paying More Attention to Attention
      <https://arxiv.org/abs/1612.03928>`_, 2017, eq. 2 with :math:`F_{sum}^p`. Differs:
      the mean square, as in the authors' code, instead of half the norm.
    """
    who = "distill.attention_transfer"
    _check_maps(who, student, teacher, power, position_axes)
    axis = jnp.ndim(student) - 1 - position_axes
    shape = jnp.shape(student)
    check_where(who, where, shape[:axis], shape[:-1])
    s, t = pair(who, student, teacher, where)
    gap = _activity(s, power, axis) - _activity(t, power, axis)
    return jnp.square(gap).sum(-1) / _positions(shape, axis, where)


def _check_maps(
    who: str,
    student: jax.Array,
    teacher: jax.Array,
    power: float,
    position_axes: int,
) -> None:
    s, t = jnp.shape(student), jnp.shape(teacher)
    if position_axes < 1 or len(s) < position_axes + 1:
        raise ValueError(
            f"{who}: position_axes must be 1 or more, with an axis of channels after "
            f"them; got {position_axes} for {s}."
        )
    if s[:-1] != t[:-1]:
        raise ValueError(
            f"{who}: student and teacher must have the same positions; got {s} and "
            f"{t}. Resize one with jax.image.resize, or take layers of one resolution."
        )
    if power < 1:
        raise ValueError(f"{who}: power must be 1 or more; got {power}.")


def _activity(x: jax.Array, power: float, axis: int) -> jax.Array:
    """Map of activity, flattened from `axis` on, of length 1."""
    # The scale has no influence on the result; without it, high powers overflow.
    largest = jax.lax.stop_gradient(jnp.abs(x)).max(
        tuple(range(axis, x.ndim)), keepdims=True
    )
    x = x / jnp.where(largest > 0, largest, 1.0)
    activity = jnp.square(x) if power == 2 else jnp.abs(x) ** power
    return unit(activity.sum(-1).reshape(*x.shape[:axis], -1))


def _positions(
    shape: tuple[int, ...], axis: int, where: jax.Array | None
) -> float | jax.Array:
    """How many positions of each example count."""
    flat = jnp.ones(shape[:-1], bool).reshape(*shape[:axis], -1)
    if where is None or jnp.shape(where) == shape[:axis]:
        return float(flat.shape[-1])
    counted = jnp.reshape(where, flat.shape)
    return at_least_one(counted.sum(-1, dtype=jnp.float32))


def attention_matrices(
    student: jax.Array,
    teacher: jax.Array,
    *,
    divergence: Literal["kl", "mse"] = "kl",
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Difference of the attention of transformers, for each query.

    .. math:: \sum_k t_k \log \frac{t_k}{s_k}
       \quad\text{or}\quad \frac{1}{K} \sum_{k=1}^{K} (s_k - t_k)^2

    Args:
      student: ``float[..., queries, keys]`` attention probabilities; for ``"mse"`` the
        scores before the softmax, or probabilities.
      teacher: The same of the teacher; no gradient flows to them.
      divergence: Which of the two. Static.
      where: Boolean, broadcast to the shape of `student` (a mask of attention): pairs
        of query and key to count. Others may be infinite.

    Returns:
      ``float32[..., queries]``, a loss a query; zero for one without keys. A student's
      probability below the least positive float counts as that.

    Raises:
      ValueError: If the shapes differ (numbers of heads, for instance), `where` does
        not broadcast, or `divergence` is unknown.

    Examples:
      >>> s, t = jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])
      >>> attention_matrices(s, t).tolist()
      [0.693147...]
      >>> attention_matrices(s, t, divergence="mse").tolist()
      [0.25]

    References:
      Sun et al., `MobileBERT <https://arxiv.org/abs/2004.02984>`_, 2020, section 3
      (attention transfer); Jiao et al., `TinyBERT <https://arxiv.org/abs/1909.10351>`_,
      2020, eq. 7. Differs: not averaged over heads and queries; the mean, over keys.
    """
    who = "distill.attention_matrices"
    _check_matrices(who, student, teacher, divergence)
    where = _over_pairs(who, where, jnp.shape(student))
    s, t = pair(who, student, teacher, where)
    if divergence == "mse":
        keys = at_least_one(where.sum(-1, dtype=jnp.float32))
        return jnp.square(s - t).sum(-1) / keys
    # What the teacher does not attend to counts for nothing, also where s is zero.
    some = t > 0
    least = jnp.finfo(jnp.float32).tiny
    log_t = jnp.log(jnp.where(some, t, 1.0))
    return (t * (log_t - jnp.log(jnp.where(some, jnp.maximum(s, least), 1.0)))).sum(-1)


def _check_matrices(
    who: str, student: jax.Array, teacher: jax.Array, divergence: str
) -> None:
    if divergence not in ("kl", "mse"):
        raise ValueError(
            f"{who}: divergence must be 'kl' or 'mse'; got {divergence!r}."
        )
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"{who}: student and teacher must have the same shape; got "
            f"{jnp.shape(student)} and {jnp.shape(teacher)}. For other numbers of "
            "heads take the mean over heads first, or use distill.relation."
        )


def _over_pairs(who: str, where: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    if where is None:
        return jnp.ones(shape, bool)
    found, dtype = jnp.shape(where), jnp.asarray(where).dtype
    fits = len(found) == len(shape) and all(
        n in (1, size) for n, size in zip(found, shape, strict=True)
    )
    if not fits or dtype != jnp.bool_:
        raise ValueError(
            f"{who}: where must be bool of as many axes as student and "
            f"broadcast to {shape}; got {dtype}{list(found)}. For padded keys pass "
            "mask[:, None, None, :]."
        )
    return jnp.broadcast_to(where, shape)
