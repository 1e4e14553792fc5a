"""Partition specs of a compressed tree, from those of its logical arrays."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxcompress.leaf import Leaf, is_leaf


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
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    whole = jax.tree.unflatten(structure, range(structure.num_leaves))
    full = jax.tree.broadcast(specs, whole, is_leaf=is_spec)

    def one(path: Any, leaf: Any, spec: PartitionSpec) -> Any:
        if not isinstance(leaf, Leaf):
            return spec
        try:
            return leaf.component_specs(
                (*spec, *[None] * (leaf.ndim - len(spec))), sizes
            )
        except ValueError as error:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"shardings: at {where!r}: {error}") from None

    return jax.tree_util.tree_map_with_path(one, tree, full, is_leaf=is_leaf)
