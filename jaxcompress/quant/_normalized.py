"""`NormalizedArray`: a leaf whose channels have a mean and a deviation of their own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, WEIGHT, Leaf, Place, component, leaf_type, static
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._wrapped import WrappedArray, shared_spec


@leaf_type
class NormalizedArray(WrappedArray):
    """``w[..., k] = inner[..., k] * deviation[k] + mean[k]``; `kv_cache` makes it.

    In a matmul the other operand is multiplied by the deviations, and its product with
    the means is added.

    Attributes:
      inner: The leaf of the normalized vectors.
      mean: ``float32[*stack, *out, K]``, with ones where it is shared.
      deviation: As `mean`, positive.
      layout: How the axes lie in storage.
    """

    inner: Leaf = component(role=WEIGHT)
    mean: jax.Array = component(role=FROZEN)
    deviation: jax.Array = component(role=FROZEN)
    layout: Layout = static()

    @property
    def method(self) -> str:
        """``"int8 of normalized channels"``."""
        return f"{self.inner.method} of normalized channels"

    def _weight(self, inner: jax.Array) -> jax.Array:
        return inner * self.deviation + self.mean

    def _shared(self) -> tuple[Any, ...]:
        return (self.mean, self.deviation)

    def _enter(self, rows: jax.Array, site: Site) -> jax.Array:
        return rows.astype(jnp.float32) * self._for_rows(self.deviation, site)

    def _leave(self, entered: jax.Array, rows: jax.Array, site: Site) -> jax.Array:
        del rows
        entered = entered.astype(jnp.float32)
        return entered / self._for_rows(self.deviation, site)

    def _beside(self, rows: jax.Array, site: Site, precision: Any) -> jax.Array:
        del precision  # A sum of float32 products.
        means = self._for_rows(self.mean, site)
        product = (rows.astype(jnp.float32) * means).sum(-1)
        outputs = self._outputs - len(site.batch)
        return product.reshape(*product.shape, *(1,) * outputs)

    def stacked(self, ndim: int) -> Leaf:
        """What is shared along the first axes is repeated along them."""
        sizes = self.shape[:ndim]
        grown = {
            name: jnp.broadcast_to(a, (*sizes, *a.shape[ndim:]))
            for name, a in (("mean", self.mean), ("deviation", self.deviation))
        }
        return WrappedArray.stacked(self.replace(**grown), ndim)

    def written(self, values: jax.Array, place: Place) -> Leaf:
        """The inner leaf with the normalized values written into it."""
        mean, deviation = place.read(self.mean), place.read(self.deviation)
        if mean is NotImplemented or deviation is NotImplemented:
            return NotImplemented
        of_values = self.layout.from_storage
        normal = values.astype(jnp.float32) - of_values(mean)
        normal = (normal / of_values(deviation)).astype(values.dtype)
        inner = self.inner.written(normal, place)
        return inner if inner is NotImplemented else self.replace(inner=inner)

    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        del sizes
        entries = [*out, major]
        return {
            name: shared_spec(getattr(self, name), entries)
            for name in ("mean", "deviation")
        }
