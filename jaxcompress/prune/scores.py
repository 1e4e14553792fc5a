"""Scores of single weights: pure functions of one array and its statistics.

Each returns ``float32`` of the weight's shape; the higher, the more worth keeping.
Scores of whole structures (filters, channels, heads) return one value a structure.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.prune._structure_scores import batch_norm_scale as batch_norm_scale
from jaxcompress.prune._structure_scores import geometric_median as geometric_median
from jaxcompress.prune._structure_scores import structure_norm as structure_norm


def magnitude(w: jax.Array) -> jax.Array:
    r"""The magnitude, :math:`|w|`.

    Args:
      w: ``float[...]`` weights.

    Returns:
      ``float32`` of `w`'s shape.

    Examples:
      >>> magnitude(jnp.array([-2.0, 0.5])).tolist()
      [2.0, 0.5]

    References:
      Han et al., `Learning both Weights and Connections
      <https://arxiv.org/abs/1506.02626>`_, 2015, section 3.
    """
    return jnp.abs(w.astype(jnp.float32))


def snip(w: jax.Array, grad: jax.Array) -> jax.Array:
    r"""Connection sensitivity, :math:`|g w|`: how much the loss moves without it.

    Args:
      w: ``float[...]`` weights.
      grad: Gradient of the loss by `w`, of its shape; the mean over the data.

    Returns:
      ``float32`` of `w`'s shape.

    Raises:
      ValueError: If the shapes differ.

    Examples:
      >>> snip(jnp.array([-2.0, 0.5]), jnp.array([0.25, 4.0])).tolist()
      [0.5, 2.0]

    References:
      Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019, eq. 6. Differs: not
      divided by the sum over all weights, which changes no order.
    """
    _check_shape("snip", "grad", grad, w)
    return jnp.abs(grad.astype(jnp.float32) * w.astype(jnp.float32))


def grasp(w: jax.Array, hessian_grad: jax.Array) -> jax.Array:
    r"""Gradient flow, :math:`w (H g)`: how much of it goes with the weight.

    Setting a weight to zero, :math:`\delta = -w`, changes the squared norm of the
    gradient by :math:`2 S(\delta) = 2 \delta^\top H g` to first order. The paper
    removes the weights of highest :math:`S(-w) = -w (H g)`, whose absence leaves the
    most gradient; here the highest score is kept, hence the sign.

    Args:
      w: ``float[...]`` weights.
      hessian_grad: Hessian of the loss times its gradient, of `w`'s shape.

    Returns:
      ``float32`` of `w`'s shape, of either sign.

    Raises:
      ValueError: If the shapes differ.

    Examples:
      >>> grasp(jnp.array([-2.0, 0.5]), jnp.array([1.0, 4.0])).tolist()
      [-2.0, 2.0]

    References:
      Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient Flow
      <https://arxiv.org/abs/2002.07376>`_, 2020, eq. 8. Differs: the opposite sign.
    """
    _check_shape("grasp", "hessian_grad", hessian_grad, w)
    return w.astype(jnp.float32) * hessian_grad.astype(jnp.float32)


def taylor(w: jax.Array, grad: jax.Array) -> jax.Array:
    r"""Squared change of the loss, to first order: :math:`(g w)^2`.

    Args:
      w: ``float[...]`` weights.
      grad: Gradient of the loss by `w`, of its shape; of one batch.

    Returns:
      ``float32`` of `w`'s shape; the mean over batches is the importance.

    Raises:
      ValueError: If the shapes differ.

    Examples:
      >>> taylor(jnp.array([-2.0, 0.5]), jnp.array([0.25, 4.0])).tolist()
      [0.25, 4.0]

    References:
      Molchanov et al., `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019, section 3.1 (first order).
    """
    _check_shape("taylor", "grad", grad, w)
    return jnp.square(snip(w, grad))


def lamp(w: jax.Array, *, stack: int = 0) -> jax.Array:
    r"""Layer-adaptive magnitude: each weight's share of those at least as large.

    .. math:: s_u = \frac{w_u^2}{\sum_{|w_v| \ge |w_u|} w_v^2}

    with ties in order of position: the later counts as the larger. Comparable between
    layers; the largest weight of each scores 1, so no layer is emptied.

    Args:
      w: ``float[*stack, ...]`` weights of one layer, or of a stack of layers.
      stack: Leading axes whose entries are layers of their own. Static.

    Returns:
      ``float32`` of `w`'s shape, in [0, 1]; within a layer in the order of magnitude.
      All zeros for a layer of zeros.

    Examples:
      >>> lamp(jnp.array([1.0, -2.0, 2.0])).tolist()
      [0.111..., 0.5, 1.0]

    References:
      Lee et al., `Layer-Adaptive Sparsity for the Magnitude-based Pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021, eq. 3.
    """
    rows = magnitude(w).reshape(*w.shape[:stack], -1)
    largest = rows.max(-1, keepdims=True)
    rows = jnp.square(rows / jnp.where(largest > 0, largest, jnp.ones_like(largest)))
    order = jnp.argsort(rows, axis=-1, stable=True)
    ascending = jnp.take_along_axis(rows, order, axis=-1)
    above = jax.lax.cumsum(ascending, axis=rows.ndim - 1, reverse=True)
    share = ascending / jnp.where(above > 0, above, jnp.ones_like(above))
    place = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(share, place, axis=-1).reshape(w.shape)


def wanda(
    w: jax.Array, second_moment: jax.Array, *, axes: Axes | None = None
) -> jax.Array:
    r"""Magnitude times the norm of its input, :math:`|w_{io}| \sqrt{E x_i^2}`.

    Args:
      w: ``float[*stack, ...]`` weights.
      second_moment: ``float[*stack, K]`` mean square of each input, the contracting
        axes flattened: `Statistics.second_moment` of `calibrate`.
      axes: Roles of `w`'s axes; by default of ``[in, out]`` with stacks in front.

    Returns:
      ``float32`` of `w`'s shape.

    Raises:
      ValueError: If `second_moment` has not one value an input.

    Examples:
      >>> wanda(jnp.array([[1.0, -2.0], [3.0, 0.5]]), jnp.array([4.0, 0.25])).tolist()
      [[2.0, 4.0], [1.5, 0.25]]

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023, eq. 1. Differs: the root of the mean,
      not of the sum, over tokens, which changes no order within a layer.
    """
    axes = Axes(contract=(-2,), stack=w.ndim - 2) if axes is None else axes
    layout = Layout.of(w.shape, axes)
    stored = layout.to_storage(magnitude(w))
    expected = (*stored.shape[: axes.stack], stored.shape[-1])
    if second_moment.shape != expected:
        raise ValueError(
            f"prune.scores.wanda: second_moment must have one value an input, "
            f"{expected} for w of shape {w.shape}; got {second_moment.shape}. Pass "
            "the second_moment that calibrate found for this weight, and its axes."
        )
    norm = jnp.sqrt(second_moment.astype(jnp.float32))
    between = (1,) * len(layout.out)
    norm = norm.reshape(*expected[:-1], *between, expected[-1])
    return layout.from_storage(stored * jnp.broadcast_to(norm, stored.shape))


def _check_shape(name: str, argument: str, a: jax.Array, w: jax.Array) -> None:
    if jnp.shape(a) != jnp.shape(w):
        raise ValueError(
            f"prune.scores.{name}: {argument} must be of the shape of w; got "
            f"{jnp.shape(a)} for {jnp.shape(w)}. Pass what jax.grad gives for w."
        )
