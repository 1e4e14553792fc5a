"""What SET and RigL share: small weights are dropped, as many others grown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune._nm import NM
from jaxcompress.prune._pattern import (
    ByPath,
    Pattern,
    Scope,
    Unstructured,
    as_pattern,
)
from jaxcompress.prune._threshold import lowest, rank
from jaxcompress.prune._training import (
    AxesOption,
    Backward,
    PruneState,
    check_every,
    masked_training,
)
from jaxcompress.schedules import Schedule, constant
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values, leaf_key

Growth = Callable[[Any, PruneState], Callable[[jax.Array, Site], jax.Array]]
"""``(grads, state)`` to a score of weights, ``float32`` >= 0; the highest grow."""


def regrowing(
    growth: Growth,
    sparsity: float | Pattern,
    *,
    key: jax.Array,
    scope: Scope,
    fraction: float | Schedule,
    every: int,
    until: int | None,
    axes: AxesOption,
    by: str,
    again: bool = False,
    backward: Backward | None = None,
) -> Transform:
    """A transform whose masks start at random, and move without changing in size.

    Args:
      growth: Scores for what is pruned.
      sparsity: Of all masks; a pattern's groups each keep their number of weights.
      key: Decides the first masks.
      scope: As for `magnitude`.
      fraction: Of each layer's kept weights, dropped at each change of the masks.
      every: Updates between two changes.
      until: Update from which the masks are fixed.
      axes: As for `magnitude`.
      by: Name of the transform, for errors.
      again: Whether a weight may grow as soon as it is dropped; it then keeps its
        value. If not, it does only where too few others are pruned.
      backward: As for `masked_training`.
    """
    check_every(every, by)
    pattern = _constant_size(as_pattern(sparsity, scope, by), by)
    rate = _as_schedule(fraction, by)

    def first(params: Any, roles: ByPath) -> PruneState:
        step = jnp.zeros((), jnp.int32)
        drawn = for_values(lambda w, site: uniform(w, leaf_key(key, site)), params)
        return PruneState(pattern.keep(drawn, roles, step), step)

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        score = growth(grads, state)

        def merit(w: jax.Array, site: Site) -> jax.Array:
            kept = state.masks[site.path][site.number]
            stack = roles[site.path][site.number].stack
            dropped = _smallest(w, kept, rate(state.step), stack)
            grown = score(w, site)
            grown = grown if again else jnp.where(dropped, -1.0, grown)
            return jnp.where(kept & ~dropped, jnp.inf, grown)

        def renew() -> Any:
            return pattern.keep(for_values(merit, params), roles, state.step)

        due = state.step % every == 0
        if until is not None:
            due &= state.step < until
        return state._replace(masks=jax.lax.cond(due, renew, lambda: state.masks))

    return masked_training(
        first, following, pattern, by=by, axes=axes, backward=backward
    )


def uniform(w: jax.Array, key: jax.Array) -> jax.Array:
    """A random score for each weight."""
    return jax.random.uniform(key, w.shape, jnp.float32)


def _smallest(w: jax.Array, kept: jax.Array, rate: jax.Array, stack: int) -> jax.Array:
    """Mark a fraction of the kept weights of each layer, the smallest."""
    count = kept.sum(tuple(range(stack, kept.ndim)), dtype=jnp.int32)
    count = jnp.floor(rate * count.astype(jnp.float32) + 0.5).astype(jnp.int32)
    magnitude = jnp.where(kept, jnp.abs(w.astype(jnp.float32)), jnp.inf)
    return kept & lowest([rank(magnitude)], count, stack=stack)[0]


def _constant_size(pattern: Pattern, by: str) -> Pattern:
    if not isinstance(pattern, Unstructured | NM):
        raise ValueError(
            f"{by}: sparsity must be a number or prune.nm(n, m), since weights come "
            f"and go alone; got {pattern!r}."
        )
    if pattern.scheduled:
        raise ValueError(
            f"{by}: sparsity must be a number or prune.nm(n, m), since masks keep "
            "their size; got a schedule. For a sparsity that grows use prune.magnitude."
        )
    return pattern


def _as_schedule(fraction: float | Schedule, by: str) -> Schedule:
    if callable(fraction):
        return fraction
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"{by}: fraction is the part of the kept weights that is dropped and must "
            f"be in [0, 1], or a schedule; got {fraction}."
        )
    return constant(fraction)
