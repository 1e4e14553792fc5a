"""`ScaledArray`: a leaf whose input channels are divided by scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, WEIGHT, Leaf, Traits, component, leaf_type, static
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._wrapped import WrappedArray, shared_spec


@leaf_type
class ScaledArray(WrappedArray):
    """``w[k, ...] = inner[k, ...] / channel_scale[k]``; activations are divided.

    Activations that the inner leaf quantizes are quantized after the division.

    Attributes:
      inner: The leaf of the scaled weight.
      channel_scale: ``float32[*stack, *1, K]``, positive.
      layout: How the axes lie in storage.
    """

    inner: Leaf = component(role=WEIGHT)
    channel_scale: jax.Array = component(role=FROZEN)
    layout: Layout = static()

    @property
    def traits(self) -> Traits:
        """Those of the inner leaf, with a matmul of its own."""
        return self.inner.traits._replace(own_matmul=True)

    @property
    def method(self) -> str:
        """``"int4 g128 of scaled channels"``."""
        return f"{self.inner.method} of scaled channels"

    def _weight(self, inner: jax.Array) -> jax.Array:
        return inner / self.channel_scale

    def _shared(self) -> tuple[Any, ...]:
        return (self.channel_scale,)

    def _enter(self, rows: jax.Array, site: Site) -> jax.Array:
        return rows.astype(jnp.float32) / self._for_rows(self.channel_scale, site)

    def _leave(self, entered: jax.Array, rows: jax.Array, site: Site) -> jax.Array:
        del rows
        entered = entered.astype(jnp.float32)
        return entered * self._for_rows(self.channel_scale, site)

    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        del sizes
        return {"channel_scale": shared_spec(self.channel_scale, [*out, major])}
