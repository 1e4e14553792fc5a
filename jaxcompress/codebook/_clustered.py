"""`ClusteredArray`: a weight in training that is replaced by trained centroids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.latent import LatentLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    CODEBOOK,
    WEIGHT,
    OrderError,
    component,
    leaf_type,
    map_value,
    static,
)
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Site, map_values


@leaf_type
class ClusteredArray(LatentLeaf):
    """A weight as it was clustered, and the centroids that stand for it, trained.

    Attributes:
      latent: Array or leaf of the logical shape: the weight that was clustered. Masks
        act on it; it gets no gradient.
      codebooks: ``float[*stack, 1, 1, E, 1]``.
      layout: How the axes lie in storage.
      code_bits: Bits of a code.
      zero_entry: Whether entry 0 is held at zero.
    """

    latent: Any = component(role=WEIGHT)
    codebooks: jax.Array = component(role=CODEBOOK)
    layout: Layout = static()
    code_bits: int = static()
    zero_entry: bool = static(default=False)

    @property
    def method(self) -> str:
        """``"codebook 4 bit with trained centroids"``."""
        return f"codebook {self.code_bits} bit with trained centroids"

    def materialize(self) -> jax.Array:
        """The weight as it was."""
        return self.weight

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> ClusteredArray:
        """The weight's own spec; codebooks are cut along stack axes alone."""
        own = PartitionSpec(*spec[: self.codebooks.ndim - 4])
        return self.replace(latent=self.latent_specs(spec, sizes), codebooks=own)

    def coded(self, codes: jax.Array, *, packed: bool = False) -> Any:
        """What the model sees: the centroids of ``uint8[*stack, *out, 1, K]`` codes.

        Args:
          codes: Of each weight.
          packed: Whether to pack them.

        Raises:
          OrderError: If a later transform put trained leaves into the weight.
        """
        if isinstance(self.latent, LatentLeaf):
            raise OrderError(
                f"{self.latent.method} trains what clusters have replaced; put it "
                "before codebook.kmeans, or leave it out."
            )

        def one(w: jax.Array) -> CodebookArray:
            leaf = CodebookArray(
                words=codes,
                codebooks=self.codebooks,
                layout=self.layout,
                code_bits=self.code_bits,
                packed=False,
                zero_entry=self.zero_entry,
                dtype_name=w.dtype.name,
            )
            return leaf.pack() if packed else leaf

        return map_value(one, self.latent)


def at_clusters(
    f: Callable[[ClusteredArray, str, int], Any],
    otherwise: Callable[[jax.Array, Site], Any],
    params: Any,
    *,
    by: str,
) -> Any:
    """`f(leaf, path, number)` of every `ClusteredArray`, however deep in a leaf.

    Args:
      f: The number counts those of one path.
      otherwise: Of the values of leaves without one.
      params: Any pytree.
      by: Name of the transform, for errors.
    """
    flat, structure = flatten(params)

    def one(path: str, leaf: Any) -> Any:
        if not clusters(leaf):
            return map_values(otherwise, {path: leaf}, by=by)[path]
        numbers = iter(range(len(clusters(leaf))))
        try:
            return jax.tree.map(
                lambda x: f(x, path, next(numbers)) if is_clustered(x) else x,
                leaf,
                is_leaf=is_clustered,
            )
        except OrderError as error:
            raise OrderError(f"{by} at {path!r}: {error}") from None

    return unflatten(structure, {path: one(path, leaf) for path, leaf in flat.items()})


def clusters(leaf: Any) -> list[ClusteredArray]:
    """Every `ClusteredArray` of a leaf, in order."""
    found = jax.tree.leaves(leaf, is_leaf=is_clustered)
    return [x for x in found if is_clustered(x)]


def is_clustered(x: Any) -> bool:
    """Whether `x` is a `ClusteredArray`."""
    return isinstance(x, ClusteredArray)
