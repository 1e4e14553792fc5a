"""What the algorithms that wrap a quantized weight share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import Cast, Leaf
from jaxcompress.lift import Statistics
from jaxcompress.quant._activations import Activations
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._calibrators import activation_range
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._quantize import encode
from jaxcompress.values import check_weight

Base = Callable[..., Leaf]
"""``(w, fmt, stats, *, axes, path) -> leaf``: how the changed weight is quantized."""


class Frame(NamedTuple):
    """A weight's axes, in storage terms.

    Attributes:
      roles: Roles of its axes.
      layout: How they lie in storage.
      shape: Logical shape.
      dtype: Logical dtype.
    """

    roles: Axes
    layout: Layout
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(
        cls, w: jax.Array, fmt: NumberFormat, *, axes: Any, path: str, who: str
    ) -> Frame:
        """Check a weight and lay out its axes.

        Raises:
          ValueError: If the weight or its axes cannot be quantized.
          TypeError: If it is not real floating.
        """
        check_weight(w, path, who)
        stated = fmt.axes if fmt.axes is not None else axes
        roles = resolve_axes(w.shape, stated, who=who, path=path)
        return cls(roles, Layout.of(w.shape, roles), w.shape, np.dtype(w.dtype))

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.shape[: self.roles.stack]

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the output axes, in storage order."""
        return tuple(self.shape[a] for a in self.layout.out)

    @property
    def inputs(self) -> int:
        """``K``: size of the contracting axes, flattened."""
        return math.prod(self.shape[a] for a in self.layout.contract)

    def check_rank(self, rank: int, path: str, who: str) -> None:
        """Refuse a rank above the inputs or the outputs.

        Raises:
          ValueError: If it is, or is not positive.
        """
        most = min(self.inputs, math.prod(self.outputs))
        if not 1 <= rank <= most:
            raise ValueError(
                f"{who}: rank must be from 1 to {most}, the smaller of the "
                f"{self.inputs} inputs and {math.prod(self.outputs)} outputs of "
                f"{path!r}; got {rank}."
            )

    def storage(self, w: jax.Array) -> jax.Array:
        """``float32[*stack, *out, K]`` of the weight."""
        return self.layout.to_storage(jnp.asarray(w).astype(jnp.float32))

    def weight(self, a: jax.Array) -> jax.Array:
        """Undo `storage`, in float32."""
        return self.layout.from_storage(a)

    def shared(self, v: jax.Array, trailing: int = 1) -> jax.Array:
        """``[*stack, ...]`` with size one along each output axis before `trailing`."""
        n = len(self.stack)
        ones = (1,) * len(self.layout.out)
        assert v.ndim == n + trailing
        return v.reshape(*v.shape[:n], *ones, *v.shape[n:])

    def quantized(
        self, base: Base, w: jax.Array, fmt: NumberFormat, stats: Any, path: str
    ) -> Leaf:
        """The base algorithm on a float32 weight, as a leaf of the weight's dtype."""
        leaf = base(w, fmt, stats, axes=self.roles, path=path)
        if leaf.dtype == self.dtype:
            return leaf
        cast = leaf.relayout(Cast(dtype=self.dtype))
        if cast is NotImplemented:
            cast = base(w.astype(self.dtype), fmt, stats, axes=self.roles, path=path)
        return cast


def round_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
) -> QuantizedArray:
    """`quantize`, with what statistics of the inputs add.

    Static activations get their scale, and a search by `mse` minimizes errors of the
    outputs, each block for itself, in place of the weight's.
    """
    scale = zero = importance = None
    if stats is not None:
        importance = moments(stats)
        if fmt.activations is not None and fmt.activations.static:
            scale, zero = static_range(stats, fmt.activations)
    leaf = encode(
        w,
        fmt,
        axes=axes,
        path=path,
        activation_scale=scale,
        activation_zero=zero,
        importance=importance,
    )
    return leaf.pack()


def moments(stats: Statistics) -> jax.Array:
    """What errors count for: second moments; without data every input alike."""
    none = stats.total_square.max(-1, keepdims=True) == 0
    if stats.gram is None:
        return jnp.where(none, 1.0, stats.total_square)
    k = stats.gram.shape[-1]
    return jnp.where(none[..., None], jnp.eye(k, dtype=jnp.float32), stats.gram)


def static_range(
    stats: Statistics, activations: Activations
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of static activations that reach the largest magnitude.

    Statistics of scaled or rotated inputs know no more than that.
    """
    if stats.low is not None:
        return activation_range(stats, activations)
    top = stats.absmax.max(-1)
    top = jnp.where(top > 0, top, 1.0)  # No data: any scale that is not zero.
    element = activations.element
    if isinstance(element, Integer) and not element.symmetric:
        scale = 2.0 * top / (element.high - element.low)
        return scale, element.low + jnp.round(top / scale)
    return top / element.largest, None


def output_error(delta: jax.Array, stats: Statistics, stack: int) -> jax.Array:
    r"""Squared error of the outputs, :math:`\operatorname{tr}(\Delta G \Delta^T)`.

    Args:
      delta: ``float32[*stack, *out, K]`` error of the weight.
      stats: Of its inputs; without a gram its diagonal stands for it.
      stack: Number of stack axes.

    Returns:
      ``float32[*stack]``.
    """
    delta = delta.reshape(*delta.shape[:stack], -1, delta.shape[-1])
    if stats.gram is None:
        moved = delta * stats.total_square[..., None, :]
    else:
        moved = jnp.matmul(delta, stats.gram, precision="highest")
    return (moved * delta).sum((-2, -1))


def divided(stats: Statistics, s: jax.Array) -> Statistics:
    """Statistics of ``x / s``, s ``float32[*stack, K]``."""
    gram = stats.gram
    if gram is not None:
        gram = gram / s[..., :, None] / s[..., None, :]
    return Statistics(
        count=stats.count,
        absmax=stats.absmax / s,
        total=stats.total / s,
        total_square=stats.total_square / jnp.square(s),
        gram=gram,
    )
