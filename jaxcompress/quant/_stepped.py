"""`SteppedArray`: a weight in training and the trained steps of its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.latent import LatentLeaf
from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import STEP, WEIGHT, component, leaf_type, static
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import Flat, split_blocks, spread
from jaxcompress.quant._quantize import encode
from jaxcompress.quant._ranged import usable
from jaxcompress.quant._wrapped import shared_spec
from jaxcompress.straight_through import StraightThrough


@leaf_type
class SteppedArray(LatentLeaf):
    """A weight in training and the steps of its grid, both trained.

    Attributes:
      latent: Array or leaf of the logical shape: the weight before the grid.
      step: ``float32[*stack, *out_blocks, G]``, used by magnitude.
      fmt: The number format.
      layout: How the axes lie in storage.
    """

    latent: Any = component(role=WEIGHT)
    step: jax.Array = component(role=STEP)
    fmt: NumberFormat = static()
    layout: Layout = static()

    @property
    def method(self) -> str:
        """``"int4 with learned steps"``."""
        return f"{self.fmt.name} with learned steps"

    def materialize(self) -> jax.Array:
        """The weight before the grid."""
        return self.weight

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> SteppedArray:
        """The weight's own spec; steps are cut where there are several."""
        full = self.layout.absorb_stack(self.ndim - len(self.layout.order))
        entries = [*(spec[a] for a in full.out), spec[full.contract[0]]]
        latent = self.latent_specs(spec, sizes)
        return self.replace(latent=latent, step=shared_spec(self.step, entries))

    def encoded(self, w: jax.Array) -> QuantizedArray:
        """Codes of a dense weight on the grid of these steps."""
        roles = Axes(
            contract=self.layout.contract, stack=self.ndim - len(self.layout.order)
        )
        step = jax.lax.stop_gradient(usable(self.step))
        w = jax.lax.stop_gradient(w)
        return encode(w, self.fmt, axes=roles, scale=step, check=False)

    def fake(self, w: jax.Array) -> StraightThrough:
        """The training view of a dense weight, with the gradients of LSQ."""
        stored = self.encoded(w)
        return StraightThrough(latent=self._surrogate(w, stored), stored=stored)

    def _surrogate(self, w: jax.Array, stored: QuantizedArray) -> jax.Array:
        """An array whose derivatives by weight and step are those of LSQ."""
        element = stored.element
        assert isinstance(element, Integer)
        laid = LaidOver.of(w, stored)
        scaled = jax.lax.stop_gradient(laid.parts / laid.scale)
        inside = (scaled >= element.low) & (scaled <= element.high)
        clipped = jnp.clip(scaled, element.low, element.high)
        slope = jnp.round(clipped) - jnp.where(inside, scaled, 0.0)
        per_step = math.prod(w.shape) / self.step.size
        factor = 1.0 / math.sqrt(per_step * element.high)
        step = spread(laid.flat.from_storage(factor * usable(self.step)), laid.dims)
        surrogate = jnp.where(inside, laid.parts, 0.0) + step * slope
        return laid.back(surrogate).astype(w.dtype)


class LaidOver(NamedTuple):
    """A dense weight and a leaf's scales, shaped to broadcast.

    Attributes:
      parts: The weight in float32, its axes split into blocks.
      scale: float32.
      zero: Zero points, or None.
      flat: The order they are in.
      dims: Shape of the weight in that order.
    """

    parts: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    flat: Flat
    dims: tuple[int, ...]

    @classmethod
    def of(cls, w: jax.Array, leaf: QuantizedArray) -> LaidOver:
        """Lay a leaf's scales over a weight of its shape."""
        flat = Flat(leaf.shape, leaf.layout)
        a = flat.flatten(w.astype(jnp.float32))
        scale = flat.from_storage(leaf.scales())
        zero = None
        if leaf.zero_point is not None:
            zero = flat.from_storage(leaf.zero_point).astype(jnp.float32)
            zero = spread(zero, a.shape)
        parts, _ = split_blocks(a, scale.shape)
        return cls(parts, spread(scale, a.shape), zero, flat, a.shape)

    def back(self, parts: jax.Array) -> jax.Array:
        """An array of the shape of `parts`, in the weight's own shape."""
        return self.flat.unflatten(parts.reshape(self.dims))
