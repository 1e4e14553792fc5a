"""Masks found anew, every so often, from scores that are remembered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune._pattern import ByPath, Pattern
from jaxcompress.prune._training import PruneState


def renewed(
    state: PruneState,
    scores: ByPath,
    pattern: Pattern,
    roles: ByPath,
    *,
    every: int,
    returning: bool = False,
) -> PruneState:
    """The state with masks of these scores, if its step is a multiple of `every`.

    Args:
      state: At the new step.
      scores: ``float32`` of each weight; the lowest are pruned.
      pattern: Turns them into masks.
      roles: `Axes` of each weight.
      every: Updates between two changes.
      returning: Whether weights may come back.
    """

    def among(score: jax.Array, kept: jax.Array) -> jax.Array:
        return score if returning else jnp.where(kept, score, -jnp.inf)

    def renew() -> Any:
        alive = jax.tree.map(among, dict(scores), state.masks)
        masks = pattern.keep(alive, roles, state.step)
        return masks if returning else jax.tree.map(jnp.logical_and, masks, state.masks)

    due = state.step % every == 0
    return state._replace(masks=jax.lax.cond(due, renew, lambda: state.masks))
