"""`merge`: factors multiplied out where they no longer pay."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.lowrank._factors import CompositeLeaf


def merge(params: Any, *, always: bool = False) -> Any:
    """Put dense arrays in place of leaves of factors that store no fewer bytes.

    A product of rank `r` pays if :math:`r (m + n) < m n`, both in the same dtype.

    Args:
      params: Any pytree.
      always: Multiply all of them out. Static.

    Returns:
      The tree with dense arrays for them; other leaves are the same objects.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.lowrank import svd_weight
      >>> w = jnp.ones((6, 6))
      >>> merged = merge({"high": svd_weight(w, 3), "low": svd_weight(w, 2)})
      >>> type(merged["low"]).__name__, merged["high"].shape
      ('LowRankArray', (6, 6))
    """

    def one(x: Any) -> Any:
        if not isinstance(x, CompositeLeaf):
            return x
        pays = x.stored_bytes < x.size * x.dtype.itemsize
        return x if pays and not always else x.materialize()

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, CompositeLeaf))
