"""A leaf that stores its array as it is: what differs from dense is lift's doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.leaf import (
    WEIGHT,
    LayoutOp,
    Leaf,
    component,
    leaf_type,
    relayout_array,
)


@leaf_type
class Disguise(Leaf):
    """An array in the clothes of a compressed leaf."""

    array: jax.Array = component(role=WEIGHT)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def method(self) -> str:
        return "disguise"

    def materialize(self) -> jax.Array:
        return self.array

    def relayout(self, op: LayoutOp) -> Leaf:
        return self.replace(array=relayout_array(self.array, op))

    def stacked(self, ndim: int) -> Leaf:
        del ndim
        return self

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Disguise:
        del sizes
        return self.replace(array=PartitionSpec(*spec))


def disguise(tree: Any, where: Any = lambda path, x: np.ndim(x) > 1) -> Any:
    """The tree with the arrays that `where` chooses disguised."""
    from jaxcompress.tree import flatten, unflatten

    flat, structure = flatten(tree)
    return unflatten(
        structure,
        {p: Disguise(array=x) if where(p, x) else x for p, x in flat.items()},
    )
