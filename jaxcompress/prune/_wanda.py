"""Wanda: the smallest products of a weight and its input's norm go, in each output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.prune import scores
from jaxcompress.prune._bitmask import store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._pattern import Pattern, pruned_count
from jaxcompress.prune._reconstruct import AxesOption, check_target
from jaxcompress.prune._threshold import lowest, rank
from jaxcompress.values import check_weight

InputScore = Callable[..., jax.Array]
"""``(w, second_moment, *, axes) -> float32`` of `w`'s shape; the lowest are pruned.

`second_moment` is ``float32[*stack, K]``, the mean square of each input.
"""


def wanda_weight(
    w: jax.Array,
    sparsity: float | Pattern,
    stats: Statistics | None,
    *,
    axes: AxesOption = None,
    path: str = "w",
    score: InputScore = scores.wanda,
) -> Leaf:
    r"""Prune one weight by :math:`|W_{ij}| \cdot \lVert X_i \rVert_2`, no value moved.

    Args:
      w: ``float[*stack, *core]`` weight.
      sparsity: Fraction of every output's weights to prune, in [0, 1); or a `Pattern`,
        which says what is compared. Static.
      stats: Of the rows that entered its matmul; None: every input alike.
      axes: Contracting axes, or `Axes`; as for `magnitude`. Static.
      path: Named in errors. Static.
      score: What the lowest of are pruned: ``(w, second_moment, *, axes)``. Static.

    Returns:
      A `BitmaskArray`, or what the pattern stores, of `w`'s shape and dtype. Exactly
      :math:`\lfloor s K + 1/2 \rfloor` weights of every output are zero; the others
      are those of `w`, bit for bit.

    Raises:
      ValueError: If `sparsity` is out of range, the weight is not finite, its axes are
        unknown or the statistics are not of this weight.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> stats = statistics(jnp.array([[1.0, 10.0]]))
      >>> w = jnp.array([[3.0, 8.0], [0.5, 0.7]])
      >>> wanda_weight(w, 0.5, stats).materialize().tolist()
      [[0.0, 8.0], [0.5, 0.0]]

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023, eq. 1 and section 3 (comparison per
      output).
    """
    who = "prune.wanda"
    check_target(sparsity, who)
    check_weight(w, path, who)
    roles = resolve_axes(w.shape, axes, who=who, path=path)
    layout = Layout.of(w.shape, roles)
    scored = score(w, _second_moment(stats, layout, w, roles), axes=roles)
    if isinstance(sparsity, Pattern):
        kept = sparsity.keep_one(scored, roles)
        return sparsity.store(MaskedArray(inner=w, mask=kept), roles)
    outputs = layout.to_storage(scored)
    k = outputs.shape[-1]
    count = pruned_count(sparsity, k)
    low = lowest([rank(outputs)], count, stack=outputs.ndim - 1)[0]
    masked = MaskedArray(inner=w, mask=layout.from_storage(~low))
    room = int(np.prod(outputs.shape[roles.stack : -1])) * (k - count)
    return store(masked, layout, capacity=room)


def _second_moment(
    stats: Statistics | None, layout: Layout, w: Any, axes: Axes
) -> jax.Array:
    """``float32[*stack, K]``; ones without data, for each stack entry."""
    k = int(np.prod([w.shape[a] for a in layout.contract]))
    if stats is None:
        return jnp.ones((*w.shape[: axes.stack], k), jnp.float32)
    seen = (stats.count > 0)[..., None]
    return jnp.where(seen, stats.second_moment, jnp.ones_like(stats.second_moment))
