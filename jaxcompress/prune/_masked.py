"""`MaskedArray`: a weight in training, some of whose entries are held at zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import (
    CODEBOOK,
    FROZEN,
    WEIGHT,
    LayoutOp,
    Leaf,
    OrderError,
    Ran,
    Traits,
    component,
    leaf_type,
    map_value,
    relayout,
    relayout_mask,
    traits,
)
from jaxcompress.straight_through import straight_through
from jaxcompress.tree import flatten
from jaxcompress.values import check_weights


@leaf_type
class MaskedArray(Leaf):
    """``where(mask, inner, 0)``; the gradient outside `backward` is zero.

    Attributes:
      inner: Array or leaf of the logical shape: the values.
      mask: ``bool`` of the logical shape; true where a weight is kept.
      backward: ``bool`` of the logical shape, true where a weight gets the gradient
        of its entry whether it is kept or not; None: where it is kept.
    """

    inner: Any = component(role=WEIGHT)
    mask: jax.Array = component(role=FROZEN)
    backward: jax.Array | None = component(role=FROZEN, default=None)

    @property
    def traits(self) -> Traits:
        """A mask's; the values' own matmul, if zeros pass through it unchanged."""
        inner = traits(self.inner)
        return Traits(
            preserves_zeros=True,
            elementwise=True,
            own_matmul=inner.own_matmul and inner.preserves_zeros,
        )

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
        """``"masked"`` and the method of its values."""
        inner = self.inner.method if isinstance(self.inner, Leaf) else "dense"
        return f"masked {inner}"

    def materialize(self) -> jax.Array:
        """The dense values, exactly zero where masked."""
        values = self.inner
        dense = values.materialize() if isinstance(values, Leaf) else values
        kept = jnp.where(self.mask, dense, jnp.zeros_like(dense))
        if self.backward is None:
            return kept
        return straight_through(_gated(dense, self.backward), kept)

    def values(self) -> tuple[Any, ...]:
        """The values, zero where masked."""
        if isinstance(self.inner, Leaf):
            return self.inner.values()
        return (self.materialize(),)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """`f` of the masked values, under the same mask; masks intersect."""
        if isinstance(self.inner, Leaf):
            return self.replace(inner=map_value(f, self.inner))
        return masked(f(self.materialize()), self.mask, self.backward)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Values and mask alike."""
        values = relayout(self.inner, op)
        if values is NotImplemented:
            return NotImplemented
        backward = self.backward
        return self.replace(
            inner=values,
            mask=relayout_mask(self.mask, op),
            backward=None if backward is None else relayout_mask(backward, op),
        )

    def stacked(self, ndim: int) -> Leaf:
        """As the values are."""
        if not isinstance(self.inner, Leaf):
            return self
        values = self.inner.stacked(ndim)
        return values if values is NotImplemented else self.replace(inner=values)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """The rule of the values if they have one, since masked values are zeros."""
        rule = super().dot_general
        if self.traits.own_matmul:
            allowed = self.mask if self.backward is None else self.backward
            rule = _gated(self.inner, allowed).dot_general
        return rule(x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params)

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the values do."""
        inner = self.inner
        return inner.prepare_activations(x, axes) if isinstance(inner, Leaf) else x

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> MaskedArray:
        """Values and mask alike."""
        own = PartitionSpec(*spec)
        inner = self.inner
        values = inner.component_specs(spec, sizes) if isinstance(inner, Leaf) else own
        backward = None if self.backward is None else own
        return self.replace(inner=values, mask=own, backward=backward)


def check_maskable(params: Any, *, who: str) -> None:
    """`check_weights`; and refuse weights that share entries of a codebook.

    Raises:
      OrderError: If the values of a leaf are entries: a mask is of weights.
      ValueError: As `check_weights` does.
      TypeError: As `check_weights` does.
    """
    check_weights(params, who=who)
    for path, leaf in flatten(params)[0].items():
        if _has_entries(leaf):
            raise OrderError(
                f"{who} at {path!r}: weights share the entries of {leaf.method}, and a "
                "mask is of weights; chain it before the codebook."
            )


def _has_entries(value: Any) -> bool:
    """Whether a leaf, or one in it, has entries in place of weights."""
    if not isinstance(value, Leaf):
        return False
    parts = value.components().values()
    roles = {role for _, role in parts}
    own = CODEBOOK in roles and WEIGHT not in roles
    return own or any(_has_entries(part) for part, _ in parts)


def masked(
    value: Any, mask: jax.Array, backward: jax.Array | None = None
) -> MaskedArray:
    """A value under a mask; of a value that is masked already, the intersection.

    Raises:
      OrderError: If `value` is a leaf that does not keep zeros where they are.
    """
    if isinstance(value, MaskedArray):
        return value.replace(
            mask=value.mask & mask, backward=_both(value, mask, backward)
        )
    if not traits(value).elementwise:
        raise OrderError(
            f"{value.method} does not keep each weight where it is, so it would undo "
            "the mask; put it before the mask in the chain."
        )
    return MaskedArray(inner=value, mask=mask, backward=backward)


def _both(
    value: MaskedArray, mask: jax.Array, backward: jax.Array | None
) -> jax.Array | None:
    """Where two masks both let the gradient through; None: where both keep."""
    if value.backward is None and backward is None:
        return None
    own = value.mask if value.backward is None else value.backward
    return own & (mask if backward is None else backward)


def _gated(value: Any, allowed: jax.Array) -> Any:
    """The same value; its trained weights get a gradient where `allowed` alone."""
    if not isinstance(value, Leaf):
        return jnp.where(allowed, value, jax.lax.stop_gradient(value))
    weights = {
        name: _gated(part, allowed)
        for name, (part, role) in value.components().items()
        if role == WEIGHT and tuple(part.shape) == tuple(allowed.shape)
    }
    return value.replace(**weights)
