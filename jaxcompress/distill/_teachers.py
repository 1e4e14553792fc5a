"""Teachers: several averaged, and the deeper exits of the student.

The unquantized weights teach their quantized selves with one apply function: the
teacher runs on the params, the student on the scheme's view of them.

Examples:
  >>> import jaxcompress as jc
  >>> scheme = jc.select({"w": jc.quant.int2()})
  >>> params, state = scheme.init({"w": jnp.array([[1.0, 0.3], [0.2, -1.0]])})
  >>> apply = jc.lift(lambda p, x: x @ p["w"])
  >>> x = jnp.array([[1.0, -1.0]])
  >>> def loss(p):
  ...     teacher, student = apply(p, x), apply(scheme.view(p, state), x)
  ...     return jc.distill.soft_targets(student, teacher, temperature=1.0).sum()
  >>> bool(loss(params) > 0), jax.grad(loss)(params)["w"].shape
  (True, (2, 2))

This teacher moves with the student; for one that stays, keep the params from before
``scheme.init``. To stop when a measure no longer improves, use
``flax.training.early_stopping.EarlyStopping``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ._logits import check_float, check_positive
from ._soft_targets import soft_targets


def average(
    teachers: Sequence[jax.Array],
    *,
    weights: Sequence[float] | jax.Array | None = None,
    space: Literal["logits", "probabilities"] = "logits",
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    r"""One teacher's logits from several teachers'.

    .. math::
        z = \sum_i w_i z_i \quad \text{or} \quad
        z = T \log \sum_i w_i \, \sigma(z_i / T)

    The first is the geometric mean of their probabilities, the second the arithmetic
    mean, at one temperature: use its result in a loss at that temperature.

    Args:
      teachers: Logits ``float[..., classes]`` of each, all of one shape.
      weights: ``float[teachers]``, or ``float[teachers, ...]`` for weights that
        differ by example (or by task); not negative. They are divided by their sum.
        Equal if None.
      space: What is averaged. Static.
      temperature: Of the probabilities; logits do not need it.

    Returns:
      ``float32[..., classes]`` logits, through which no gradient flows. A teacher of
      weight zero counts for nothing, even if it is NaN; an example in which all
      weights are zero gets zeros, the uniform distribution.

    Raises:
      ValueError: If shapes differ, weights do not fit, or `space` is unknown.

    Examples:
      >>> a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
      >>> average([a, b], weights=[3.0, 1.0]).tolist()
      [1.5, 0.5]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015, section 1: an ensemble's arithmetic
      or geometric mean.
    """
    who = "distill.average"
    z = _stacked(who, teachers)
    check_positive(who, "temperature", temperature)
    w = _shares(who, weights, z)
    if space == "logits":
        mean = (w * jnp.where(w > 0, z, 0.0)).sum(0)
    elif space == "probabilities":
        t = jnp.asarray(temperature, jnp.float32)
        log_p = jax.nn.log_softmax(z / t)
        mean = t * jax.nn.logsumexp(log_p, axis=0, b=w)
        mean = jnp.where(w.sum(0) > 0, mean, 0.0)
    else:
        raise ValueError(
            f'{who}: space must be "logits" or "probabilities"; got {space!r}.'
        )
    return jax.lax.stop_gradient(mean)


def _stacked(who: str, teachers: Sequence[jax.Array]) -> jax.Array:
    if not len(teachers):
        raise ValueError(f"{who}: teachers must be one or more; got none.")
    for i, z in enumerate(teachers):
        check_float(who, f"teachers[{i}]", z)
        if z.shape != teachers[0].shape:
            raise ValueError(
                f"{who}: teachers must have one shape; got {teachers[0].shape} and, of "
                f"teacher {i}, {z.shape}. Reorder or pad its classes with -inf."
            )
    z = jnp.stack([jnp.asarray(z).astype(jnp.float32) for z in teachers])
    return jax.lax.stop_gradient(z)


def _shares(
    who: str, weights: Sequence[float] | jax.Array | None, z: jax.Array
) -> jax.Array:
    """Weights that sum to one, or are all zero, of the rank of the stacked logits."""
    w = jnp.ones(len(z)) if weights is None else jnp.asarray(weights)
    if w.shape not in (z.shape[:1], z.shape[:-1]):
        raise ValueError(
            f"{who}: weights must have shape {z.shape[:1]}, one a teacher, or "
            f"{z.shape[:-1]}, one a teacher and example; got {w.shape}."
        )
    w = jax.lax.stop_gradient(w).astype(jnp.float32)
    total = w.sum(0, keepdims=True)
    w = w / jnp.where(total > 0, total, 1.0)
    return jnp.broadcast_to(
        w.reshape(w.shape + (1,) * (z.ndim - w.ndim)), (*z.shape[:-1], 1)
    )


def deepest_exit(
    exits: Sequence[jax.Array],
    *,
    temperature: float | jax.Array,
    weights: Sequence[float] | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The last of a network's classifiers teaches those at shallower exits.

    .. math:: \sum_{i < C} w_i \, T^2 \, \mathrm{KL}(\sigma(z_C / T) \,\|\,
       \sigma(z_i / T))

    Args:
      exits: Logits ``float[..., classes]`` of each exit, the deepest last.
      temperature: Positive; traced or not.
      weights: Of the shallower exits, all 1 if None.
      where: ``bool[...]`` examples to count.

    Returns:
      ``float32[...]``, a loss an example, with no gradient to the deepest exit. Add
      the cross entropy of all exits with the labels, and `hint` for their features.

    Raises:
      ValueError: If there are not two exits, or `weights` are not one a shallower exit.

    References:
      Zhang et al., `Be Your Own Teacher <https://arxiv.org/abs/1905.08094>`_, 2019,
      section 3.1, the second of its three losses. Differs: weights of their own, and
      the square of the temperature.
    """
    shallow = exits[:-1]
    if not shallow or (weights is not None and len(weights) != len(shallow)):
        raise ValueError(
            "distill.deepest_exit: exits must be two or more, with one of weights for "
            f"each but the last; got {len(exits)} exits and weights {weights}."
        )
    w = [1.0] * len(shallow) if weights is None else weights
    losses = [
        wi * soft_targets(z, exits[-1], temperature=temperature, where=where)
        for wi, z in zip(w, shallow, strict=True)
    ]
    return jnp.stack(losses).sum(0)
