"""Leaves of weights whose static activations have a trained range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import (
    STEP,
    WEIGHT,
    LayoutOp,
    Leaf,
    Ran,
    Traits,
    component,
    dense_dot_general,
    leaf_type,
    map_value,
    materialize,
    static,
    traits,
)
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.straight_through import StraightThrough, straight_through
from jaxcompress.values import values

_SMALLEST = 2.0**-60


def usable(step: jax.Array) -> jax.Array:
    """A trained step as it is used: its magnitude, and never so small as to overflow.

    At zero the derivative is that of a positive step, so that it can grow again.
    """
    size = jnp.where(step < 0, -step, step)
    return straight_through(size, jnp.maximum(size, _SMALLEST))


@leaf_type
class RangedArray(Leaf):
    """In params: a weight, and the trained range of what it is multiplied with.

    Attributes:
      inner: The weight, an array or leaf.
      step: ``float32[*stack]``: the step, or the value clipped at.
      offset: ``float32[*stack]``: the lowest value, of asymmetric ranges.
      gradient: Whose gradients the range has.
    """

    inner: Any = component(role=WEIGHT)
    step: jax.Array = component(role=STEP)
    offset: jax.Array | None = component(role=STEP, default=None)
    gradient: str = static()

    @property
    def traits(self) -> Traits:
        """Those of the weight, but for its matmul."""
        return traits(self.inner)._replace(own_matmul=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.inner.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.inner.dtype

    @property
    def method(self) -> str:
        """That of the weight, with the range."""
        return f"{getattr(self.inner, 'method', 'dense')} with a learned range"

    def materialize(self) -> jax.Array:
        """The weight."""
        return materialize(self.inner)

    def values(self) -> tuple[Any, ...]:
        """Those of the weight."""
        return values(self.inner)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the weight, beside the same range."""
        return self.replace(inner=map_value(f, self.inner))

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> RangedArray:
        """The weight's own; ranges are cut along stack axes."""
        inner = self.inner
        own = (
            inner.component_specs(spec, sizes)
            if isinstance(inner, Leaf)
            else PartitionSpec(*spec)
        )
        lead = PartitionSpec(*spec[: self.step.ndim])
        offset = None if self.offset is None else lead
        return self.replace(inner=own, step=lead, offset=offset)


@leaf_type
class TrainedActivations(Leaf):
    """In a view: a quantized weight whose static activations have a trained range.

    Attributes:
      inner: The weight's view; its stored form quantizes activations with the range.
      step: As in `RangedArray`, in the shape of the stored ``activation_scale``.
      offset: Likewise.
      gradient: Whose gradients the range has.
    """

    inner: StraightThrough = component(role=WEIGHT)
    step: jax.Array = component(role=STEP)
    offset: jax.Array | None = component(role=STEP, default=None)
    gradient: str = static()

    @property
    def traits(self) -> Traits:
        """Those of the weight, with a matmul of its own."""
        return self.inner.traits._replace(own_matmul=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.inner.shape

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.inner.dtype

    @property
    def method(self) -> str:
        """That of the weight."""
        return self.inner.method

    @property
    def _stored(self) -> QuantizedArray:
        assert isinstance(self.inner.stored, QuantizedArray)
        return self.inner.stored

    def materialize(self) -> jax.Array:
        """The weight's view."""
        return self.inner.materialize()

    def relayout(self, op: LayoutOp) -> Leaf:
        """As the weight; the range stays."""
        inner = self.inner.relayout(op)
        return inner if inner is NotImplemented else self.replace(inner=inner)

    def stacked(self, ndim: int) -> Leaf:
        """As the weight; the range in the shape of the stored one."""
        inner = self.inner.stacked(ndim)
        if not isinstance(inner, StraightThrough):
            return NotImplemented
        assert isinstance(inner.stored, QuantizedArray)
        assert inner.stored.activation_scale is not None
        shape = inner.stored.activation_scale.shape
        grow = lambda a: None if a is None else jnp.broadcast_to(a, shape)
        return self.replace(inner=inner, step=grow(self.step), offset=grow(self.offset))

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """The stored form's own rule; gradients as of the prepared operand's dot."""
        contracted = tuple(dimension_numbers[0][1 if leaf_is_lhs else 0])

        @jax.custom_jvp
        def run(view: TrainedActivations, x: jax.Array) -> jax.Array:
            return view._stored.dot_general(
                x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            ).out

        @run.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            def reference(view: TrainedActivations, x: jax.Array) -> jax.Array:
                x = view.prepare_activations(x, contracted)
                return dense_dot_general(
                    view, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
                ).out

            return run(*primals), jax.jvp(reference, primals, tangents)[1]

        return Ran(run(self, x), "training view")

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the stored form does, differentiable by the range."""
        value = self._stored.prepare_activations(jax.lax.stop_gradient(x), axes)
        return straight_through(self._surrogate(x), value)

    def _surrogate(self, x: jax.Array) -> jax.Array:
        """An array whose derivatives by `x` and the range are the method's."""
        ones = (1,) * x.ndim
        step = usable(self.step.reshape(ones))
        wide = x.astype(jnp.float32)
        if self.gradient == "pact":
            return jnp.where(wide >= step, step, jnp.where(wide > 0, wide, 0.0)).astype(
                x.dtype
            )
        stored = self._stored
        assert stored.activations is not None
        assert stored.activation_scale is not None
        element = stored.activations.element
        zero = stored.activation_zero
        shift = 0.0 if zero is None else zero.reshape(ones)
        scaled = jax.lax.stop_gradient(wide) / stored.activation_scale.reshape(ones)
        low, high = (end - shift for end in element.range)
        below, above = scaled < low, scaled > high
        inside = ~(below | above)
        # Beyond, the value is offset + code * step, whatever the zero point is.
        bound = jnp.where(below, element.range[0], element.range[1])
        slope = jnp.where(inside, jnp.round(scaled) - scaled, bound)
        features = x.size // (x.shape[0] if x.ndim > 1 else 1)
        factor = 1.0 / math.sqrt(max(features, 1) * element.range[1])
        slope = jax.lax.stop_gradient(slope)
        found = jnp.where(inside, wide, 0.0) + factor * step * slope
        if self.offset is not None:
            beyond = (~inside).astype(jnp.float32)
            found = found + factor * self.offset.reshape(ones) * beyond
        return found.astype(x.dtype)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> TrainedActivations:
        """The weight's own; the range as it is stored."""
        inner = self.inner.component_specs(spec, sizes)
        assert isinstance(inner.stored, QuantizedArray)
        lead: Any = inner.stored.activation_scale
        offset = None if self.offset is None else lead
        return self.replace(inner=inner, step=lead, offset=offset)
