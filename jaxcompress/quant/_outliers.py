"""`SplitArray` and `split_outliers_weight`: a few input channels kept dense."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, WEIGHT, Leaf, Traits, component, leaf_type, static
from jaxcompress.lift import Statistics
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Base, Frame, round_weight
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._wrapped import WrappedArray, side_dot


@leaf_type
class SplitArray(WrappedArray):
    """``w[..., index[c]] = rows[..., c]`` for a few input channels, `inner` elsewhere.

    The two parts are two matmuls. Activations that the inner leaf quantizes are
    quantized without the dense channels.

    Attributes:
      inner: The leaf of the weight, whose dense channels are zeros.
      index: ``int32[*stack, *1, C]``: which of the flattened inputs are dense; ``K``
        where a slot is not used.
      rows: ``float[*stack, *out, C]``: their weights.
      layout: How the axes lie in storage.
    """

    inner: Leaf = component(role=WEIGHT)
    index: jax.Array = component(role=FROZEN)
    rows: jax.Array = component(role=WEIGHT)
    layout: Layout = static()

    @property
    def traits(self) -> Traits:
        """Dense channels have no element in the inner leaf, so masks do not survive."""
        return self.inner.traits._replace(elementwise=False, own_matmul=True)

    @property
    def method(self) -> str:
        """``"int8 + 4 dense channels"``."""
        return f"{self.inner.method} + {self.index.shape[-1]} dense channels"

    def _weight(self, inner: jax.Array) -> jax.Array:
        hot = _one_hot(self.index, inner.shape[-1])
        slot = jnp.broadcast_to(hot.argmax(-2), inner.shape)
        dense = jnp.take_along_axis(self.rows.astype(jnp.float32), slot, axis=-1)
        return jnp.where(hot.any(-2), dense, inner)

    def _shared(self) -> tuple[Any, ...]:
        return (self.index,)

    def _dense_channels(self, rows: jax.Array, site: Site) -> jax.Array:
        """Where the last axis of ``[*batch, *free, K]`` is a dense channel."""
        index = self._for_rows(self.index, site)
        return _one_hot(index, rows.shape[-1]).any(-2)

    def _enter(self, rows: jax.Array, site: Site) -> jax.Array:
        return jnp.where(self._dense_channels(rows, site), jnp.zeros_like(rows), rows)

    def _leave(self, entered: jax.Array, rows: jax.Array, site: Site) -> jax.Array:
        return jnp.where(self._dense_channels(rows, site), rows, entered)

    def _beside(self, rows: jax.Array, site: Site, precision: Any) -> jax.Array:
        index = self._for_rows(self.index, site)
        shape = (*rows.shape[: len(site.batch)], *index.shape[len(site.batch) :])
        index = jnp.broadcast_to(index, shape)  # A batch axis it is shared by.
        picked = jnp.take_along_axis(rows, index, axis=-1, mode="fill", fill_value=0)
        return side_dot(picked, self.rows, [s for _, s in site.batch], precision)

    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        del sizes
        if major is not None:
            raise ValueError(
                f"{self.method}: the contracting axes cannot be sharded, since dense "
                f"channels are numbered along them; got {major!r}."
            )
        lead = zip(self.index.shape[:-1], out, strict=True)
        return {
            "index": PartitionSpec(*(None if n == 1 else e for n, e in lead), None),
            "rows": PartitionSpec(*out, None),
        }


def _one_hot(index: jax.Array, k: int) -> jax.Array:
    """``[..., C] -> bool[..., C, K]``; all false for an index of K."""
    return index[..., None] == jnp.arange(k, dtype=index.dtype).reshape(
        (1,) * index.ndim + (k,)
    )


def split_outliers_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
    capacity: int | float = 0.01,
    threshold: float | None = 6.0,
    dtype: Any = jnp.bfloat16,
    base: Base = round_weight,
) -> Leaf:
    """Quantize a weight but for the input channels whose activations are outliers.

    A channel is an outlier if the largest magnitude of its activations exceeds the
    threshold. Their number is static, so the largest of them are taken.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of the other channels. Static.
      stats: Of the rows that entered the matmul; None quantizes all of `w`.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      capacity: Most channels kept dense: a number, or a fraction of the inputs, rounded
        up. Static.
      threshold: Largest magnitude of what is no outlier; None takes the `capacity`
        channels of largest magnitudes. Static.
      dtype: Of the dense channels. Static.
      base: How the rest is quantized; weights and statistics of dense channels are
        zero there. Static.

    Returns:
      A leaf in which outlier channels equal those of `w` rounded to `dtype`.

    Raises:
      ValueError: As `quantize` does; if `capacity` is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.lift import statistics
      >>> w = jnp.array([[0.5], [-1.0], [0.25], [0.7]])
      >>> x = jnp.array([[1.0, 2.0, 60.0, 0.0]])
      >>> split = lambda w, x: split_outliers_weight(w, jc.quant.int4(), statistics(x))
      >>> leaf = jax.jit(split)(w, x)
      >>> leaf.index.tolist(), leaf.rows.tolist()
      ([[2]], [[0.25]])

    References:
      Dettmers et al., `LLM.int8() <https://arxiv.org/abs/2208.07339>`_, 2022, section
      3.2, eq. 8. Differs: outliers are found in calibration, of one weight, and their
      number is bounded, so that shapes are static.
    """
    who = f"split_outliers_weight to {fmt.name}"
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    a = frame.storage(w)
    k = a.shape[-1]
    count = _count(capacity, k, who)
    if stats is None:
        return base(w, fmt, None, axes=frame.roles, path=path)
    top, index = jax.lax.top_k(stats.absmax, count)
    limit = 0.0 if threshold is None else threshold
    index = jnp.where(top > limit, index, k).astype(jnp.int32)
    dense = _one_hot(index, k).any(-2)
    slots = jnp.broadcast_to(frame.shared(index), (*a.shape[:-1], count))
    rows = jnp.take_along_axis(a, slots, axis=-1, mode="fill", fill_value=0)
    rest = jnp.where(frame.shared(dense), 0.0, a)
    inner = frame.quantized(base, frame.weight(rest), fmt, _without(stats, dense), path)
    return SplitArray(
        inner=inner,
        index=frame.shared(index),
        rows=rows.astype(dtype),
        layout=frame.layout,
    )


def _count(capacity: int | float, k: int, who: str) -> int:
    whole = isinstance(capacity, int | np.integer)
    count = int(capacity) if whole else math.ceil(capacity * k)
    if not 1 <= count <= k:
        raise ValueError(
            f"{who}: capacity must be from 1 to the {k} inputs, or a fraction of them; "
            f"got {capacity}."
        )
    return count


def _without(stats: Statistics, dense: jax.Array) -> Statistics:
    """Statistics with some channels zero."""
    keep = 1.0 - dense.astype(jnp.float32)
    gram = stats.gram
    if gram is not None:
        gram = gram * keep[..., :, None] * keep[..., None, :]
    return Statistics(
        count=stats.count,
        absmax=stats.absmax * keep,
        total=stats.total * keep,
        total_square=stats.total_square * keep,
        gram=gram,
    )
