"""What the transforms of this family share: weights that ``init`` replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.leaf import Leaf
from jaxcompress.transform import Oriented, Site, check_weights, map_values
from jaxcompress.tree import flatten, unflatten


def replace_weights(
    f: Callable[[jax.Array, Site], Leaf],
    params: Any,
    *,
    ready: Callable[[Any, str], bool],
    by: str,
) -> Any:
    """`f` of every weight, but for those that are ``ready(leaf, path)``.

    An optimizer's `attach` calls ``init`` again, on params that it has returned.

    Raises:
      ValueError: As `check_weights` does.
      TypeError: As `check_weights` does.
    """
    check_weights(params, who=by)
    flat, structure = flatten(params)
    plain = lambda x: x.value if isinstance(x, Oriented) else x
    fresh = {path: x for path, x in flat.items() if not ready(plain(x), path)}
    return unflatten(structure, flat | map_values(f, fresh, by=by))
