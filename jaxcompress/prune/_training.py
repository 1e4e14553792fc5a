"""What all pruning in training shares: masks in the state, zeros in the params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, resolve_axes
from jaxcompress.prune._masked import MaskedArray, check_maskable
from jaxcompress.prune._pattern import ByPath, Pattern
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values, map_values

AxesOption = Axes | int | tuple[int, ...] | None
Score = Callable[[jax.Array, Site], jax.Array]
"""``(weight, where it stands) -> float32`` of its shape; the lowest are pruned."""

Backward = Callable[["PruneState", Site], jax.Array]
"""``(state, where a weight stands) -> bool`` of its shape: where it gets a gradient."""


class PruneState(NamedTuple):
    """State of a pruning transform.

    Attributes:
      masks: By path, a boolean array for each value; true where kept.
      step: ``int32`` updates so far.
      memory: What else the transform remembers: accumulated scores, a snapshot.
    """

    masks: dict[str, tuple[jax.Array, ...]]
    step: jax.Array
    memory: Any = ()


def masked_training(
    first: Callable[[Any, ByPath], PruneState],
    following: Callable[[Any, Any, ByPath, PruneState], PruneState],
    pattern: Pattern,
    *,
    by: str,
    axes: AxesOption,
    backward: Backward | None = None,
    hold: bool = True,
) -> Transform:
    """A transform that masks weights, under masks that may change.

    Args:
      first: ``(params, roles) -> state`` at step 0.
      following: ``(params, grads, roles, state) -> state`` after an update; the state
        it gets has the new step, the gradients may be None.
      pattern: How the result is stored.
      by: Name of the transform, for errors.
      axes: Contracting axes of the weights, where they are stated.
      backward: Which weights get a gradient; those kept, if it is not given.
      hold: Whether what is masked is zero in the params too, not in the view alone, for
        what follows in a chain. A weight that comes back then starts at zero.
    """

    def role(w: Any, site: Site) -> Axes:
        stated = axes if axes is not None else site.axes
        return resolve_axes(w.shape, stated, who=by, path=site.path)

    def mask(state: PruneState, site: Site) -> jax.Array:
        return state.masks[site.path][site.number]

    def init(params: Any) -> tuple[Any, PruneState]:
        check_maskable(params, who=by)
        state = first(params, for_values(role, params))

        def held(w: jax.Array, site: Site) -> jax.Array:
            return jnp.where(mask(state, site), w, jnp.zeros_like(w))

        return map_values(held, params, by=by) if hold else params, state

    def view(params: Any, state: PruneState) -> Any:
        def apply(w: jax.Array, site: Site) -> MaskedArray:
            allowed = None if backward is None else backward(state, site)
            return MaskedArray(inner=w, mask=mask(state, site), backward=allowed)

        return map_values(apply, params, by=by)

    def update(
        params: Any, state: PruneState, *, grads: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del extra
        before = state._replace(step=state.step + 1)
        state = following(params, grads, for_values(role, params), before)

        def held(w: jax.Array, site: Site) -> jax.Array:
            kept = mask(before, site) & mask(state, site)
            return jnp.where(kept, w, jnp.zeros_like(w))

        return map_values(held, params, by=by) if hold else params, state

    def compress(params: Any, state: PruneState) -> Any:
        def apply(w: jax.Array, site: Site) -> Any:
            leaf = MaskedArray(inner=w, mask=mask(state, site))
            return pattern.store(leaf, role(w, site))

        return map_values(apply, params, by=by)

    return Transform(init, view, update, compress)


def by_score(
    score: Score, pattern: Pattern, *, by: str, every: int, axes: AxesOption
) -> Transform:
    """Prune the weights of lowest score; what is pruned stays pruned."""
    check_every(every, by)

    def first(params: Any, roles: ByPath) -> PruneState:
        step = jnp.zeros((), jnp.int32)
        return PruneState(pattern.keep(for_values(score, params), roles, step), step)

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        del grads
        if not pattern.scheduled:
            return state

        def among(w: jax.Array, site: Site) -> jax.Array:
            kept = state.masks[site.path][site.number]
            return jnp.where(kept, score(w, site), -jnp.inf)

        def renew() -> Any:
            masks = pattern.keep(for_values(among, params), roles, state.step)
            return jax.tree.map(jnp.logical_and, masks, state.masks)

        due = state.step % every == 0
        return state._replace(masks=jax.lax.cond(due, renew, lambda: state.masks))

    return masked_training(first, following, pattern, by=by, axes=axes)


def everywhere(state: PruneState, site: Site) -> jax.Array:
    """The backward mask of dense gradients."""
    return jnp.ones_like(state.masks[site.path][site.number])


def gradients(grads: Any, state: PruneState, *, by: str) -> ByPath:
    """The gradient of each masked weight, for rules that need them.

    Raises:
      ValueError: If there are none, or one is missing.
    """
    found = {} if grads is None else for_values(lambda g, site: g, grads)
    if missing := [path for path in state.masks if path not in found]:
        raise ValueError(
            f"{by}: update needs the gradients of the weights; got none for "
            f"{missing[0]!r}. Pass scheme.update(params, state, grads=grads), or train "
            "with optim.attach, which does."
        )
    return found


def check_every(every: int, by: str) -> None:
    """Refuse a period below one update."""
    if every < 1:
        raise ValueError(f"{by}: every must be at least 1 update; got {every}.")
