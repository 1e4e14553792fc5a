"""How much of one state's masks another's keep."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune._training import PruneState


def masks(state: Any) -> dict[str, tuple[jax.Array, ...]]:
    """The masks in a state, by path; of two on one weight, the intersection.

    Args:
      state: State of a transform, or of an optimizer that `optim.attach` made, with
        pruning anywhere in it.

    Returns:
      By path, a boolean array for each value, true where kept.

    Raises:
      ValueError: If the state has no masks.
    """
    found: dict[str, tuple[jax.Array, ...]] = {}
    for own in prune_states(state, who="prune.masks"):
        for path, kept in own.masks.items():
            before = found.get(path, kept)
            found[path] = tuple(a & b for a, b in zip(before, kept, strict=True))
    return found


def prune_states(state: Any, *, who: str) -> list[PruneState]:
    """Every `PruneState` inside a state.

    Raises:
      ValueError: If there is none.
    """
    is_ours = lambda x: isinstance(x, PruneState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(s)]
    if not found:
        raise ValueError(
            f"{who}: the state must come from a scheme that prunes; found no masks in "
            f"{type(state).__name__}. Pass the second result of scheme.init."
        )
    return found


def mask_overlap(a: Any, b: Any) -> dict[str, jax.Array]:
    r"""How far two states keep the same weights.

    .. math:: |A \cap B| / |A \cup B|

    Args:
      a: State of a scheme, with pruning anywhere in it, as at one time of training.
      b: State of the same scheme at another time, or of another on the same weights.

    Returns:
      ``float32`` by path: 1 where the masks are the same (or both empty), 0 where
      they keep nothing in common.

    Raises:
      ValueError: If a state has no masks, or they prune different leaves.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = jc.prune.magnitude(sparsity=0.5)
      >>> w = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> _, before = scheme.init({"w": w})
      >>> _, after = scheme.init({"w": w + jnp.array([0.0, 2.0, 0.0, 0.0])})
      >>> float(mask_overlap(before, after)["w"])
      0.3333...

    References:
      Jaccard, 1912.
    """
    first, second = masks(a), masks(b)
    if differ := sorted(first.keys() ^ second.keys()):
        raise ValueError(
            "prune.mask_overlap: both states must prune the same leaves; "
            f"{differ[0]!r} is in one alone. Pass states of the same scheme."
        )
    return {path: _overlap(first[path], second[path]) for path in first}


def _overlap(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    pairs = list(zip(a, b, strict=True))
    both = _count([x & y for x, y in pairs])
    either = _count([x | y for x, y in pairs])
    return jnp.where(either > 0, both / jnp.maximum(either, 1.0), 1.0)


def _count(marked: list[jax.Array]) -> jax.Array:
    return sum((m.sum(dtype=jnp.float32) for m in marked), jnp.float32(0))
