"""`fit_hashed`: the buckets nearest a trained weight."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.hashing._array import HashedArray
from jaxcompress.hashing._size import ELEMENTS, bucket_count, check_hashing
from jaxcompress.layout import Layout, resolve_axes
from jaxcompress.values import check_weight
from kernels_pallas.hashed_matmul import Hashing, exact_sums, places


def fit_hashed(
    w: jax.Array,
    *,
    ratio: float,
    hashing: Hashing = ELEMENTS,
    importance: jax.Array | None = None,
    axes: Any = None,
    path: str = "w",
) -> HashedArray:
    r"""Share the values of a weight by hashing, with the least squared error.

    .. math:: b_i = \frac{\sum_{h(n,k) = i} g_{nk}\, \xi(n,k)\, w_{nk}}
        {\sum_{h(n,k) = i} g_{nk}}

    Args:
      w: ``float[*stack, *core]`` weight.
      ratio: Weights for each bucket, at least 1. Static.
      hashing: Block, seed and form of the hash. Static.
      importance: ``float[*stack, *core]`` not negative, `g`: the diagonal of a Hessian,
        say; by default ones. Buckets all of whose weights have none take the mean.
      axes: Contracting axes, or `Axes`; needed above rank 2. Static.
      path: Named in errors. Static.

    Returns:
      A leaf with buckets of the dtype of `w`; of all buckets those of least
      :math:`\sum g (w - \xi b)^2`, up to rounding, and zero where nothing falls.
      Weights that are already shared so come back bit for bit. Sums are in fixed point:
      the same on any number of devices.

    Raises:
      TypeError: If `w` does not float.
      ValueError: If `w` is empty or not finite, or an option is out of range.

    Examples:
      >>> w = jnp.array([[1.0, 2.0], [3.0, 5.0]])
      >>> leaf = fit_hashed(w, ratio=2.0)
      >>> leaf
      HashedArray(hashed to 2 buckets, float32[2, 2])
      >>> again = fit_hashed(leaf.materialize(), ratio=2.0)
      >>> (again.buckets == leaf.buckets).all().item()
      True

    References:
      Chen et al., `Compressing Neural Networks with the Hashing Trick
      <https://arxiv.org/abs/1504.04788>`_, 2015, eq. 3 and 7, for what is fitted.
    """
    who = "fit_hashed"
    check_weight(w, path, who)
    check_hashing(hashing, who)
    if importance is not None and importance.shape != w.shape:
        raise ValueError(
            f"{who}: importance must be of the shape of {path!r}, {w.shape}; got "
            f"{importance.shape}."
        )
    leaf = without_buckets(w, axes, hashing, who=who, path=path)
    count = bucket_count(leaf.sizes, ratio, hashing, who=who, path=path)
    buckets = nearest(w, importance, leaf.layout, hashing, count)
    return leaf.replace(buckets=buckets)


def without_buckets(
    w: jax.Array, axes: Any, hashing: Hashing, *, who: str, path: str
) -> HashedArray:
    """A leaf like a weight, whose buckets are still to come."""
    roles = resolve_axes(w.shape, axes, who=who, path=path)
    layout = Layout.of(w.shape, roles)
    core = w.shape[roles.stack :]
    return HashedArray(
        buckets=None,
        hashing=hashing,
        layout=layout,
        sizes=(
            *(core[a] for a in layout.out),
            math.prod(core[a] for a in layout.contract),
        ),
        dtype_name=np.dtype(w.dtype).name,
    )


@functools.partial(jax.jit, static_argnames=("layout", "hashing", "count"))
def nearest(
    w: jax.Array,
    importance: jax.Array | None,
    layout: Layout,
    hashing: Hashing,
    count: int,
) -> jax.Array:
    """The best buckets ``[*stack, count]`` of a weight ``[*stack, *core]``."""
    stack = w.ndim - len(layout.order)
    stored = [layout.to_storage(a) for a in (w, importance) if a is not None]
    k = stored[0].shape[-1]
    flat = [a.reshape(*a.shape[:stack], -1, k).astype(jnp.float32) for a in stored]
    rows = jnp.arange(flat[0].shape[-2], dtype=jnp.int32)[:, None]
    columns = jnp.arange(k, dtype=jnp.int32)[None]
    at, negative = places(rows, columns, hashing, buckets=count)

    def means(w: jax.Array, *importance: jax.Array) -> jax.Array:
        return bucket_means(jnp.where(negative, -w, w), at, count, *importance)

    for _ in range(stack):
        means = jax.vmap(means)
    return means(*flat).astype(w.dtype)


def bucket_means(
    values: jax.Array, at: jax.Array, count: int, importance: jax.Array | None = None
) -> jax.Array:
    """The mean of each bucket's values: its first, and the mean of what differs.

    Args:
      values: ``float32[...]``, their signs undone.
      at: ``int32[...]``, the bucket of each.
      count: Buckets.
      importance: ``float32[...]``, what each counts; by default one.

    Returns:
      ``float32[count]``; exactly the value of a bucket whose values are all the same.
    """
    values, at = values.reshape(-1), at.reshape(-1)
    n = len(values)
    order = jnp.arange(n, dtype=jnp.int32)
    first = jnp.full(count, n, jnp.int32).at[at].min(order)
    base = jnp.where(first < n, values[jnp.minimum(first, n - 1)], 0.0)
    other = values - base[at]
    counted = jnp.ones_like(values)
    sums, total = exact_sums(jnp.stack([other, counted], -1), at, count).T
    mean = sums / jnp.maximum(total, 1.0)
    if importance is not None:
        g = importance.reshape(-1)
        sums, total = exact_sums(jnp.stack([g * other, g], -1), at, count).T
        some = total > 0
        mean = jnp.where(some, sums / jnp.where(some, total, 1.0), mean)
    return base + mean
