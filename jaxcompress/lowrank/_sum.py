"""`SumArray`: a weight as the sum of two leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    WEIGHT,
    LayoutOp,
    Leaf,
    Ran,
    component,
    dequantize,
    leaf_type,
    relayout,
    result_dtype,
)
from jaxcompress.lowrank._factors import CompositeLeaf, factor_specs, narrowed, wide


@leaf_type
class SumArray(CompositeLeaf):
    """``first + second``: a matmul is the sum of their matmuls, each by its own rule.

    Attributes:
      first: A leaf of the logical shape.
      second: Another: what corrects it, or what it corrects.
    """

    first: Any = component(role=WEIGHT)
    second: Any = component(role=WEIGHT)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.first.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.first.dtype

    @property
    def method(self) -> str:
        """``"int4 g32 + rank 8"``."""
        names = (getattr(part, "method", "dense") for part in self.parts())
        return " + ".join(names)

    def parts(self) -> tuple[Any, ...]:
        """Both."""
        return self.first, self.second

    def with_parts(self, parts: Sequence[Any]) -> SumArray:
        """Others."""
        first, second = parts
        return self.replace(first=first, second=second)

    def part_axes(self) -> tuple[Axes | None, ...]:
        """Those of the weight, which is not known here."""
        return None, None

    def materialize(self) -> jax.Array:
        """The dense sum."""
        return (wide(self.first) + wide(self.second)).astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Of both, if both can follow."""
        return self._each(lambda part: relayout(part, op))

    def stacked(self, ndim: int) -> Leaf:
        """Of both, if both can."""
        return self._each(lambda part: part.stacked(ndim))

    def map_leading(self, f: Callable[[jax.Array], jax.Array], ndim: int) -> Leaf:
        """Of both, if both can."""
        return self._each(lambda part: part.map_leading(f, ndim))

    def _each(self, f: Callable[[Any], Any]) -> Leaf:
        parts = [f(part) for part in self.parts()]
        if any(part is NotImplemented for part in parts):
            return NotImplemented
        return self.with_parts(parts)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """The sum of both, in float32."""

        def one(part: Leaf, wanted: dict[str, Any]) -> Ran:
            return part.dot_general(
                x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **wanted
            )

        return self._sum(one, x, params)

    def conv_general_dilated(self, x: jax.Array, **params: Any) -> Ran:
        """The sum of both, in float32."""
        return self._sum(lambda part, wanted: _convolution(part, x, wanted), x, params)

    def _sum(
        self,
        run: Callable[[Any, dict[str, Any]], Ran],
        x: jax.Array,
        params: dict[str, Any],
    ) -> Ran:
        rans = [
            run(part, params | {"preferred_element_type": jnp.float32})
            for part in self.parts()
        ]
        dtype = result_dtype(x, self, params)
        how = " + ".join(ran.how for ran in rans)
        return Ran(narrowed(rans[0].out + rans[1].out, dtype), how)

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> SumArray:
        """Of both."""
        return self.with_parts([factor_specs(p, spec, sizes) for p in self.parts()])


def _convolution(part: Leaf, x: jax.Array, params: dict[str, Any]) -> Ran:
    """By the part's own rule, or of the dense part."""
    ran = part.conv_general_dilated(x, **params)
    if ran is not NotImplemented:
        return ran
    x = part.prepare_activations(x, (params["dimension_numbers"].lhs_spec[1],))
    out = jax.lax.conv_general_dilated(x, dequantize(part), **params)
    return Ran(out, "dequantized")
