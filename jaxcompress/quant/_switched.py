"""`SwitchedArray`: a weight in training that is compressed from some step on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import (
    FROZEN,
    WEIGHT,
    LayoutOp,
    Leaf,
    Ran,
    Traits,
    component,
    leaf_type,
    relayout_array,
    relayout_mask,
)


@leaf_type
class SwitchedArray(Leaf):
    """In a view: a compressed weight where `on` is true, else the dense one.

    Attributes:
      dense: The weight before it is compressed.
      compressed: Its view.
      on: ``bool`` of the logical shape, the same everywhere.
    """

    dense: jax.Array = component(role=WEIGHT)
    compressed: Leaf = component(role=WEIGHT)
    on: jax.Array = component(role=FROZEN)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.dense.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.dense.dtype

    @property
    def method(self) -> str:
        """That of the compressed weight."""
        return self.compressed.method

    @property
    def traits(self) -> Traits:
        """Those of the compressed weight."""
        return self.compressed.traits

    @property
    def _is_on(self) -> jax.Array:
        return self.on.reshape(-1)[0]

    def materialize(self) -> jax.Array:
        """The one or the other."""
        return jnp.where(self.on, self.compressed.materialize(), self.dense)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Both alike."""
        compressed = self.compressed.relayout(op)
        if compressed is NotImplemented:
            return NotImplemented
        return self.replace(
            dense=relayout_array(self.dense, op),
            compressed=compressed,
            on=relayout_mask(self.on, op),
        )

    def stacked(self, ndim: int) -> Leaf:
        """As the compressed weight is."""
        compressed = self.compressed.stacked(ndim)
        if compressed is NotImplemented:
            return NotImplemented
        return self.replace(compressed=compressed)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """The compressed weight's rule where it is on, if it has one."""
        if not self.traits.own_matmul:
            return super().dot_general(
                x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            )

        def compressed(x: jax.Array) -> jax.Array:
            return self.compressed.dot_general(
                x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            ).out

        def dense(x: jax.Array) -> jax.Array:
            operands = (self.dense, x) if leaf_is_lhs else (x, self.dense)
            return jax.lax.dot_general(*operands, dimension_numbers, **params)

        return Ran(jax.lax.cond(self._is_on, compressed, dense, x), "training view")

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the compressed weight does, where it is on."""
        prepared = self.compressed.prepare_activations(x, axes)
        return x if prepared is x else jnp.where(self._is_on, prepared, x)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> SwitchedArray:
        """The weight's own spec, and those of the compressed one."""
        own = PartitionSpec(*spec)
        compressed = self.compressed.component_specs(spec, sizes)
        return self.replace(dense=own, compressed=compressed, on=own)


def switched_on(on: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`on` for every element, so that a stack of such leaves can be sliced."""
    return jnp.broadcast_to(on, shape)
