"""Scores of whole structures: one value for each filter, channel or head."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def structure_norm(
    w: jax.Array,
    *,
    axes: int | tuple[int, ...],
    order: Literal[1, 2] = 2,
    keepdims: bool = False,
) -> jax.Array:
    r"""Norm of each structure: :math:`\sum |w|` or :math:`\sqrt{\sum w^2}`.

    Args:
      w: ``float[...]`` weights.
      axes: Axes that number the structures, as ``-1`` for the filters of a kernel
        ``[kh, kw, in, out]``; the norm is over all others. Static.
      order: 1 or 2. Static.
      keepdims: Keep the axes summed over, with size one, to broadcast. Static.

    Returns:
      ``float32``: the shape of `axes` in the order they have in `w`. Norms of order 2
      neither overflow nor underflow where they can be represented.

    Raises:
      ValueError: If `order` is not 1 or 2, or `axes` are out of range or repeated.

    Examples:
      >>> w = jnp.array([[3.0, 1.0], [-4.0, 1.0]])
      >>> structure_norm(w, axes=-1).tolist()
      [5.0, 1.414...]
      >>> structure_norm(w, axes=0, order=1).tolist()
      [4.0, 5.0]

    References:
      Li et al., `Pruning Filters for Efficient ConvNets
      <https://arxiv.org/abs/1608.08710>`_, 2017, section 3.1 (order 1).
    """
    if order not in (1, 2):
        raise ValueError(
            f"prune.scores.structure_norm: order must be 1 or 2; got {order}."
        )
    rest = other_axes(w.shape, axes, "prune.scores.structure_norm")
    a = jnp.abs(w.astype(jnp.float32))
    if order == 1:
        return a.sum(rest, keepdims=keepdims)
    largest = jax.lax.stop_gradient(a).max(rest, keepdims=True, initial=0.0)
    safe = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    norm = jnp.sqrt(jnp.square(a / safe).sum(rest, keepdims=True)) * largest
    return norm if keepdims else jnp.squeeze(norm, rest)


def geometric_median(w: jax.Array, *, axis: int) -> jax.Array:
    r"""Sum of the distances of each filter to the others, :math:`\sum_j |w_i - w_j|`.

    The filters of lowest score lie nearest the geometric median, so that the others
    can stand in for them.

    Args:
      w: ``float[...]`` weights.
      axis: Axis that numbers the filters. Static.

    Returns:
      ``float32[w.shape[axis]]``; zero where all filters are one and the same.

    Raises:
      ValueError: If `axis` is out of range.

    Examples:
      >>> geometric_median(jnp.array([[0.0, 1.0, 5.0]]), axis=-1).tolist()
      [6.0, 5.0, 9.0]

    References:
      He et al., `Filter Pruning via Geometric Median
      <https://arxiv.org/abs/1811.00250>`_, 2019, eq. 5 to 7 (distances to the filters
      themselves, in place of the median).
    """
    other_axes(w.shape, axis, "prune.scores.geometric_median")
    filters = jnp.moveaxis(w.astype(jnp.float32), axis, 0).reshape(w.shape[axis], -1)

    def one(own: jax.Array) -> jax.Array:
        apart = filters - jnp.broadcast_to(own, filters.shape)
        return structure_norm(apart, axes=0).sum()

    return jax.lax.map(one, filters)


def batch_norm_scale(gamma: jax.Array) -> jax.Array:
    r"""Magnitude of the scale behind a channel, :math:`|\gamma|`.

    Args:
      gamma: ``float[channels]`` scale of a batch normalization.

    Returns:
      ``float32[channels]``.

    Examples:
      >>> batch_norm_scale(jnp.array([-0.5, 0.0])).tolist()
      [0.5, 0.0]

    References:
      Liu et al., `Learning Efficient Convolutional Networks through Network Slimming
      <https://arxiv.org/abs/1708.06519>`_, 2017, section 3.
    """
    return jnp.abs(gamma.astype(jnp.float32))


def other_axes(
    shape: tuple[int, ...], axes: int | tuple[int, ...], who: str
) -> tuple[int, ...]:
    """The axes that do not number structures; `who` is named in errors."""
    chosen = (axes,) if isinstance(axes, int) else tuple(axes)
    ndim = len(shape)
    places = {a % ndim for a in chosen if -ndim <= a < ndim}
    if not chosen or len(places) < len(chosen):
        raise ValueError(
            f"{who}: axes must be distinct axes of the weight; got {axes} for shape "
            f"{tuple(shape)}. The outputs of a kernel [..., in, out] are axes=-1."
        )
    return tuple(a for a in range(ndim) if a not in places)
