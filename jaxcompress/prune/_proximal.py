"""Penalties that make exact zeros: proximal steps behind an optimizer, group lasso."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.prune._structure_scores import other_axes, structure_norm
from jaxcompress.schedules import Schedule
from jaxcompress.tree import path_str

Rate = float | Schedule


class ProximalState(NamedTuple):
    """State of a proximal step.

    Attributes:
      step: ``int32`` updates so far; schedules are read at it.
    """

    step: jax.Array


def proximal_l1(strength: float, learning_rate: Rate) -> optax.GradientTransformation:
    r"""The proximal step of an L1 penalty: small weights become exact zeros.

    .. math:: w \leftarrow \operatorname{sign}(v) \max(|v| - \eta \lambda, 0)

    for :math:`v` the weights after the updates before it. It stands last in a chain,
    ``optax.chain(optax.sgd(0.1), proximal_l1(1e-4, 0.1))``, and acts on every array it
    is given; ``optax.masked(proximal_l1(...), jc.weight_decay_mask)`` leaves out biases
    and what is not a weight.

    Args:
      strength: :math:`\lambda`, of the penalty :math:`\lambda \sum |w|`.
      learning_rate: :math:`\eta`, the optimizer's; or its schedule.

    Returns:
      A transformation whose updates, added to the params, give exact zeros where the
      step does, and elsewhere its result to the rounding of one addition.

    Raises:
      ValueError: If `strength` or `learning_rate` is negative; from ``update``, if it
        gets no params.

    Examples:
      >>> tx = optax.chain(optax.sgd(1.0), proximal_l1(0.5, 1.0))
      >>> w = jnp.array([2.0, -0.25])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
      >>> optax.apply_updates(w, updates).tolist()
      [1.5, 0.0]

    References:
      Parikh & Boyd, `Proximal Algorithms
      <https://doi.org/10.1561/2400000003>`_, 2014, section 6.5.2 (soft thresholding).
    """

    def shrink(path: str, v: jax.Array, threshold: jax.Array) -> jax.Array:
        del path
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0.0)

    return _proximal(shrink, strength, learning_rate, "prune.proximal_l1")


def proximal_group(
    strength: float, learning_rate: Rate, *, axes: int | tuple[int, ...]
) -> optax.GradientTransformation:
    r"""The proximal step of `group_lasso`: small structures become exact zeros whole.

    .. math::
        w_g \leftarrow v_g \max\left(1 - \frac{\eta \lambda \sqrt{n_g}}{\|v_g\|_2},
        0\right)

    Args:
      strength: :math:`\lambda`.
      learning_rate: As for `proximal_l1`.
      axes: Axes that number the structures, as ``-1`` for output features; each is
        all weights of one index along them. Static.

    Returns:
      A transformation, as `proximal_l1`.

    Raises:
      ValueError: As for `proximal_l1`; from ``update``, if a weight lacks an axis.

    Examples:
      >>> tx = proximal_group(0.5, 2.0**-0.5, axes=-1)
      >>> w = jnp.array([[3.0, 0.25], [4.0, 0.25]])
      >>> updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
      >>> optax.apply_updates(w, updates).tolist()
      [[2.699..., 0.0], [3.599..., 0.0]]

    References:
      Yuan & Lin, `Model Selection and Estimation in Regression with Grouped Variables
      <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006, eq. 2.1; Parikh &
      Boyd, 2014, section 6.5.4 (block soft thresholding).
    """
    by = "prune.proximal_group"

    def shrink(path: str, v: jax.Array, threshold: jax.Array) -> jax.Array:
        norm, root = _norms(v, axes, f"{by} at {path!r}")
        safe = jnp.where(norm > 0, norm, jnp.ones_like(norm))
        factor = jnp.maximum(1.0 - threshold * root / safe, 0.0)
        return v * jnp.broadcast_to(factor, v.shape)

    return _proximal(shrink, strength, learning_rate, by)


def group_lasso(params: Any, *, axes: int | tuple[int, ...]) -> jax.Array:
    r"""Sum of the norms of all structures, :math:`\sum_g \sqrt{n_g} \|w_g\|_2`.

    Args:
      params: Pytree of ``float`` arrays that all have the axes; choose them first.
      axes: Axes that number the structures, of :math:`n_g` weights each. Static.

    Returns:
      ``float32[]`` penalty; its gradient is zero at structures of zeros.

    Raises:
      ValueError: If an array lacks an axis; the path is named.

    Examples:
      >>> float(group_lasso({"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, axes=-1))
      7.07106...

    References:
      Yuan & Lin, 2006, eq. 2.1; Wen et al., `Learning Structured Sparsity in Deep
      Neural Networks <https://arxiv.org/abs/1608.03665>`_, 2016, eq. 2.
    """
    total = jnp.zeros((), jnp.float32)
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        norm, root = _norms(w, axes, f"prune.group_lasso at {path_str(path)!r}")
        total += root * norm.sum()
    return total


def _norms(
    w: jax.Array, axes: int | tuple[int, ...], who: str
) -> tuple[jax.Array, float]:
    """Norms of the structures, and the root of their size; no gradient at zeros."""
    rest = other_axes(w.shape, axes, who)
    root = math.sqrt(math.prod(w.shape[a] for a in rest))
    dead = structure_norm(jax.lax.stop_gradient(w), axes=axes, keepdims=True) == 0
    lively = jnp.where(jnp.broadcast_to(dead, w.shape), 1.0, w)
    norm = structure_norm(lively, axes=axes, keepdims=True)
    return jnp.where(dead, 0.0, norm), root


def _proximal(
    shrink: Callable[[str, jax.Array, jax.Array], jax.Array],
    strength: float,
    learning_rate: Rate,
    by: str,
) -> optax.GradientTransformation:
    """Replace the updates by those that reach ``shrink(path, params + updates, t)``."""
    for name, value in (("strength", strength), ("learning_rate", learning_rate)):
        if not callable(value) and not 0.0 <= value < math.inf:
            raise ValueError(
                f"{by}: {name} must be finite and not negative; got {value}."
            )

    def init(params: Any) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, ProximalState]:
        if params is None:
            raise ValueError(
                f"{by}: update needs the parameters; call tx.update(grads, state, "
                "params)."
            )
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        threshold = jnp.asarray(rate, jnp.float32) * strength

        def one(path: Any, update: jax.Array, w: jax.Array) -> jax.Array:
            moved = (w + update.astype(w.dtype)).astype(jnp.float32)
            held = shrink(path_str(path), moved, threshold).astype(w.dtype)
            return held - w

        emitted = jax.tree_util.tree_map_with_path(one, updates, params)
        return emitted, ProximalState(state.step + 1)

    return optax.GradientTransformation(init, update)
