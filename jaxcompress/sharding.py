"""Partition specs of a compressed tree, from those of its logical arrays."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxcompress.leaf import Leaf
from jaxcompress.tree import flatten, unflatten


def shardings(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Partition specs of every component of every leaf.

    Args:
      tree: Parameter pytree, compressed leaves included.
      specs: A `PartitionSpec` for each array or leaf of `tree`, as for the logical
        arrays; one spec may stand for a whole subtree.
      mesh: The mesh that the specs refer to.

    Returns:
      A pytree of `tree`'s structure with a `PartitionSpec` for each component, for
      `jax.device_put` (as ``NamedSharding(mesh, spec)``) or `jax.shard_map`.

    Raises:
      ValueError: If a spec would cut a packed word, a group or a padded axis; the
        message names the leaf and the sizes that can be cut.
    """
    sizes = dict(mesh.shape)
    is_spec = lambda s: isinstance(s, PartitionSpec)
    flat, structure = flatten(tree)
    whole = jax.tree.unflatten(structure, range(structure.num_leaves))
    full = jax.tree.leaves(jax.tree.broadcast(specs, whole, is_leaf=is_spec), is_spec)

    return unflatten(
        structure,
        {
            path: _specs(path, leaf, spec, sizes)
            for (path, leaf), spec in zip(flat.items(), full, strict=True)
        },
    )


def _specs(path: str, leaf: Any, spec: PartitionSpec, sizes: dict[Any, int]) -> Any:
    if not isinstance(leaf, Leaf):
        return spec
    _check(spec, leaf, sizes, path)
    try:
        return leaf.component_specs((*spec, *[None] * (leaf.ndim - len(spec))), sizes)
    except ValueError as error:
        raise ValueError(f"shardings: at {path!r}: {error}") from None


def _check(spec: PartitionSpec, leaf: Leaf, sizes: dict[Any, int], path: str) -> None:
    if len(spec) > leaf.ndim:
        raise ValueError(
            f"shardings: at {path!r}: a spec has at most one entry for each of the "
            f"{leaf.ndim} axes of {leaf!r}; got {spec}."
        )
    named = {n for entry in spec for n in _names(entry)}
    if unknown := named - sizes.keys():
        raise ValueError(
            f"shardings: at {path!r}: {spec} names {sorted(unknown)}, but the mesh "
            f"has the axes {list(sizes)}."
        )


def _names(entry: Any) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
