"""Leaves of training: a weight and what is trained beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import Leaf, Traits, map_value


class LatentLeaf(Leaf):
    """A weight in training, of which a subclass makes what the model sees.

    Attributes:
      latent: Array or leaf of the logical shape; a component, of role ``WEIGHT``.
    """

    latent: Any

    @property
    def traits(self) -> Traits:
        """Those of a dense array."""
        return Traits(preserves_zeros=True, elementwise=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.latent.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.latent.dtype

    @property
    def weight(self) -> jax.Array:
        """The weight as an array."""
        inner = self.latent
        return inner.materialize() if isinstance(inner, Leaf) else inner

    def values(self) -> tuple[Any, ...]:
        """Those of the weight."""
        return self.latent.values() if isinstance(self.latent, Leaf) else (self.latent,)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the weight, under the same parameters."""
        return self.replace(latent=map_value(f, self.latent))

    def latent_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Any:
        """Specs of the weight's components."""
        if isinstance(self.latent, Leaf):
            return self.latent.component_specs(spec, sizes)
        return PartitionSpec(*spec)
