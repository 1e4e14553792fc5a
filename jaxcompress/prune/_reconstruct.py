"""A weight made ready for the pruning that weighs errors by a second moment.

It works on one weight at a time as ``[K, R]``, its contracting axes flattened by its
output axes flattened.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import mean_gram
from jaxcompress.prune._allocation import check_sparsity
from jaxcompress.prune._bitmask import store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._pattern import Pattern
from jaxcompress.values import check_weight

AxesOption = Axes | int | tuple[int, ...] | None


class Laid(NamedTuple):
    """A weight made ready.

    Attributes:
      w: ``float32[S, K, R]``, of every stack entry.
      gram: ``float32[S, K, K]`` mean of ``x x^T``; zero without data.
      axes: Roles of its axes.
      shape: Logical shape.
      dtype: Logical dtype.
    """

    w: jax.Array
    gram: jax.Array
    axes: Axes
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def layout(self) -> Layout:
        """How the axes lie in storage."""
        return Layout.of(self.shape, self.axes)

    def weight(self, a: jax.Array) -> jax.Array:
        """``[S, K, R]`` in the logical shape."""
        layout = self.layout
        sizes = (self.shape[axis] for axis in layout.out)
        storage = (*self.shape[: self.axes.stack], *sizes, a.shape[-2])
        return layout.from_storage(jnp.matrix_transpose(a).reshape(storage))

    def columns(self, a: jax.Array) -> jax.Array:
        """Undo `weight`."""
        a = self.layout.to_storage(a)
        entries = math.prod(self.shape[: self.axes.stack])
        a = a.reshape(entries, a.size // (entries * a.shape[-1]), a.shape[-1])
        return jnp.matrix_transpose(a)

    def leaf(
        self,
        values: jax.Array,
        kept: jax.Array,
        sparsity: float | Pattern,
        capacity: int | None = None,
    ) -> Leaf:
        """The stored form of values and mask ``[S, K, R]``."""
        values = self.weight(values).astype(self.dtype)
        masked = MaskedArray(inner=values, mask=self.weight(kept))
        if isinstance(sparsity, Pattern):
            return sparsity.store(masked, self.axes)
        return store(masked, self.layout, capacity=capacity)


def lay(
    w: jax.Array,
    stats: Statistics | None,
    *,
    axes: AxesOption,
    path: str,
    who: str,
) -> Laid:
    """Check a weight and its statistics, and bring them to ``[S, K, R]``.

    Raises:
      ValueError: If the weight, its axes or its statistics cannot be used.
      TypeError: If it is not real floating.
    """
    check_weight(w, path, who)
    roles = resolve_axes(w.shape, axes, who=who, path=path)
    stack = w.shape[: roles.stack]
    k = math.prod(w.shape[a] for a in roles.contract)
    empty = Laid(w, w, roles, w.shape, np.dtype(w.dtype))
    gram = mean_gram(stats, stack, k, who=who, path=path)
    return empty._replace(w=empty.columns(w.astype(jnp.float32)), gram=gram)


def check_target(sparsity: float | Pattern, who: str) -> None:
    """Refuse what is neither a fraction nor a pattern that stays as it is.

    Raises:
      ValueError: If it is out of range or follows a schedule.
    """
    if isinstance(sparsity, Pattern):
        if sparsity.scheduled:
            raise ValueError(
                f"{who}: sparsity must be a number or a pattern with a constant one, "
                f"since pruning after training has no steps; got {sparsity!r}."
            )
        return
    if callable(sparsity):
        raise ValueError(
            f"{who}: sparsity must be a number or a pattern, since pruning after "
            "training has no steps; got a schedule."
        )
    check_sparsity(sparsity, who)
