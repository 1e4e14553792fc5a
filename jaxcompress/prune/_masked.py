"""A weight and the mask of what is left of it: the training view of pruning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.leaf import (
    FROZEN,
    WEIGHT,
    Leaf,
    LayoutOp,
    OrderError,
    Ran,
    StraightThrough,
    component,
    dense_dot_general,
    leaf_type,
    map_value,
    relayout,
    relayout_array,
)


@leaf_type
class MaskedArray(Leaf):
    """``w[i] = value[i] if mask[i] else 0``; the gradient is masked alike.

    Attributes:
      value: The weights, an array or a leaf that codes each element by itself.
      mask: ``bool``, of the shape of `value`; true where a weight is kept.
    """

    value: Any = component(role=WEIGHT)
    mask: jax.Array = component(role=FROZEN)

    preserves_zeros = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.mask.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.value.dtype

    @property
    def method(self) -> str:
        """``"mask"``, then the method of the kept values."""
        inner = getattr(self.value, "method", None)
        return "mask" if inner is None else f"mask, {inner}"

    def materialize(self) -> jax.Array:
        """The dense array; pruned weights are ``+0``."""
        return self._masked(
            self.value.materialize() if isinstance(self.value, Leaf) else self.value
        )

    def _masked(self, w: jax.Array) -> jax.Array:
        return jnp.where(self.mask, w, jnp.zeros_like(w))

    def values(self) -> tuple[Any, ...]:
        """The masked weights."""
        if isinstance(self.value, Leaf):
            return tuple(self._masked(v) for v in self.value.values())
        return (self._masked(self.value),)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> MaskedArray:
        """`f` of the masked weights, under the same mask.

        Raises:
          OrderError: If `f` stores weights in a form that has no element for each
            of them (low rank, hashing), which a mask cannot lie over.
        """
        value = map_value(lambda v: f(self._masked(v)), self.value)
        if isinstance(value, MaskedArray):
            return MaskedArray(value=value.value, mask=self.mask & value.mask)
        if isinstance(value, Leaf) and not is_elementwise(value):
            raise OrderError(
                f"{value.method} has no element for each weight, so the mask of a "
                "pruned weight would be lost in it; chain it before pruning."
            )
        return self.replace(value=value)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Relayout the values and the mask alike."""
        value = relayout(self.value, op)
        if value is NotImplemented:
            return NotImplemented
        return self.replace(value=value, mask=relayout_array(self.mask, op))

    def stacked(self, ndim: int) -> Leaf:
        """Stacked as the values are."""
        if not isinstance(self.value, Leaf):
            return self
        value = self.value.stacked(ndim)
        return value if value is NotImplemented else self.replace(value=value)

    def dot_general(
        self,
        x: jax.Array,
        dimension_numbers: Any,
        *,
        leaf_is_lhs: bool,
        **params: Any,
    ) -> Ran:
        """The rule of the values, where their own zeros are the mask's; else dense."""
        run = dense_dot_general
        operand: Leaf = self
        if holds_zeros(self.value):
            run, operand = type(self.value).dot_general, self.value
        else:
            x = self.prepare_activations(x)
        return run(operand, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params)

    def prepare_activations(self, x: jax.Array) -> jax.Array:
        """As the values do."""
        if isinstance(self.value, Leaf):
            return self.value.prepare_activations(x)
        return x

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Self:
        """The logical array's spec for the mask, and for the values as they say."""
        own = jax.sharding.PartitionSpec(*spec)
        value = self.value
        if isinstance(value, Leaf):
            value = value.component_specs(spec, sizes)
        else:
            value = own
        return self.replace(value=value, mask=own)


def is_elementwise(leaf: Leaf) -> bool:
    """Whether a leaf codes each weight by itself: the protocol of `BitmaskArray`."""
    stored = leaf.stored if isinstance(leaf, StraightThrough) else leaf
    return hasattr(stored, "elements")


def holds_zeros(value: Any) -> bool:
    """Whether `value` is a leaf whose elements alone say which weights are zero.

    Then its own matmul rule needs no mask. That takes a code for zero which is the
    same everywhere, for `BitmaskArray` to put back where nothing is stored.
    """
    stored = value.stored if isinstance(value, StraightThrough) else value
    return (
        isinstance(stored, Leaf)
        and stored.preserves_zeros
        and getattr(stored, "zero_element", None) is not None
    )
