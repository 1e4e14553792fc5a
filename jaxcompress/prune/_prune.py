"""Unstructured pruning by a score, on a schedule: magnitude and random."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import is_leaf
from jaxcompress.prune._bitmask import store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._threshold import lowest, magnitude_rank
from jaxcompress.schedules import Schedule
from jaxcompress.transform import (
    Site,
    Transform,
    check_weights,
    for_values,
    leaf_key,
    map_values,
)

Scope = Literal["layer", "global"]
AxesOption = Axes | int | tuple[int, ...] | None


class PruneState(NamedTuple):
    """State of a pruning transform.

    Attributes:
      masks: By path, a boolean array for each value; true where kept.
      step: ``int32`` updates so far.
    """

    masks: dict[str, tuple[jax.Array, ...]]
    step: jax.Array


def magnitude(
    *,
    sparsity: float | Schedule,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Hold the weights of smallest magnitude at zero.

    Exactly :math:`\lfloor s n + 1/2 \rfloor` of `n` weights are pruned, ties in order
    of position. What is pruned stays pruned.

    Args:
      sparsity: Fraction pruned, in [0, 1); or a schedule of it, from
        `jaxcompress.schedules`.
      scope: ``"layer"``: of every weight (of every layer of a scanned stack);
        ``"global"``: of all weights given to the transform together.
      every: Updates between two changes of the masks.
      axes: Contracting axes of the weights, or `Axes`; needed above rank 2 where no
        function was traced.

    Raises:
      ValueError: If `sparsity`, `scope` or `every` is out of range; from ``init`` if
        a weight is not finite or its axes are unknown.

    Examples:
      >>> scheme = magnitude(sparsity=0.5)
      >>> w = jnp.array([[1.0, -4.0], [3.0, 2.0]])
      >>> scheme.compress(*scheme.init({"w": w}))["w"].materialize().tolist()
      [[0.0, -4.0], [3.0, 0.0]]

    References:
      Han et al., `Learning both Weights and Connections
      <https://arxiv.org/abs/1506.02626>`_, 2015, section 3; Zhu & Gupta, 2017
      (gradual). Differs: pruned weights do not come back.
    """
    return _scored(
        lambda w, site: magnitude_rank(w),
        "prune.magnitude",
        sparsity,
        scope,
        every,
        axes,
    )


def random(
    *,
    sparsity: float | Schedule,
    key: jax.Array,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    """Hold weights chosen at random at zero.

    Args:
      sparsity: As for `magnitude`.
      key: Decides the order in which weights go; the same for the same path.
      scope: As for `magnitude`.
      every: As for `magnitude`.
      axes: As for `magnitude`.

    Raises:
      ValueError: As for `magnitude`.
    """

    def rank(w: jax.Array, site: Site) -> jax.Array:
        return jax.random.bits(leaf_key(key, site), w.shape, jnp.uint32) >> 1

    return _scored(rank, "prune.random", sparsity, scope, every, axes)


def _scored(
    rank: Callable[[jax.Array, Site], jax.Array],
    by: str,
    sparsity: float | Schedule,
    scope: Scope,
    every: int,
    axes: AxesOption,
) -> Transform:
    """Prune the weights of lowest rank (uint32 below 2^31)."""
    _check_options(by, sparsity, scope, every)

    def roles(w: Any, site: Site) -> Axes:
        stated = axes if axes is not None else site.axes
        return resolve_axes(w.shape, stated, who=by, path=site.path)

    def masks_at(params: Any, masks: Any, step: jax.Array) -> Any:
        s = sparsity(step) if callable(sparsity) else sparsity
        return _masks(params, masks, rank, roles, s, scope)

    def init(params: Any) -> tuple[Any, PruneState]:
        check_weights(params, who=by)
        masks = for_values(lambda w, site: jnp.ones(w.shape, bool), params)
        step = jnp.zeros((), jnp.int32)
        return params, PruneState(masks_at(params, masks, step), step)

    def view(params: Any, state: PruneState) -> Any:
        def apply(w: jax.Array, site: Site) -> MaskedArray:
            return MaskedArray(inner=w, mask=state.masks[site.path][site.number])

        return map_values(apply, params, by=by)

    def update(params: Any, state: PruneState, **extra: Any) -> tuple[Any, PruneState]:
        del extra
        step = state.step + 1
        masks = state.masks
        if callable(sparsity):
            masks = jax.lax.cond(
                step % every == 0,
                lambda: masks_at(params, state.masks, step),
                lambda: state.masks,
            )

        def hold(w: jax.Array, site: Site) -> jax.Array:
            return jnp.where(masks[site.path][site.number], w, jnp.zeros_like(w))

        return map_values(hold, params, by=by), PruneState(masks, step)

    def compress(params: Any, state: PruneState) -> Any:
        def apply(w: jax.Array, site: Site) -> Any:
            found = roles(w, site)
            leaf = MaskedArray(inner=w, mask=state.masks[site.path][site.number])
            capacity = None
            if not callable(sparsity) and scope == "layer":
                n = math.prod(w.shape[found.stack :])
                capacity = n - _count(sparsity, n)
            return store(leaf, Layout.of(w.shape, found), capacity=capacity)

        return map_values(apply, params, by=by)

    return Transform(init, view, update, compress)


def _check_options(by: str, sparsity: Any, scope: str, every: int) -> None:
    if not callable(sparsity) and not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"{by}: sparsity is the fraction pruned and must be in [0, 1); got "
            f"{sparsity}."
        )
    if scope not in ("layer", "global"):
        raise ValueError(f"{by}: scope must be 'layer' or 'global'; got {scope!r}.")
    if every < 1:
        raise ValueError(f"{by}: every must be at least 1 update; got {every}.")


def _count(sparsity: Any, n: int) -> Any:
    """Weights to prune: an integer if the sparsity is a number, else traced."""
    if isinstance(sparsity, jax.Array):
        return jnp.floor(sparsity * n + 0.5).astype(jnp.int32)
    return math.floor(sparsity * n + 0.5)


def _masks(
    params: Any,
    masks: dict[str, tuple[jax.Array, ...]],
    rank: Callable[[jax.Array, Site], jax.Array],
    roles: Callable[[Any, Site], Axes],
    sparsity: Any,
    scope: Scope,
) -> dict[str, tuple[jax.Array, ...]]:
    """New masks, within the old ones: what was pruned ranks lowest."""

    def ranked(w: jax.Array, site: Site) -> jax.Array:
        kept = masks[site.path][site.number]
        return jnp.where(kept, rank(w, site) + jnp.uint32(1), jnp.uint32(0))

    def by_layer(w: jax.Array, site: Site) -> jax.Array:
        stack = roles(w, site).stack
        count = _count(sparsity, math.prod(w.shape[stack:]))
        (low,) = lowest([ranked(w, site)], count, stack=stack)
        return ~low & masks[site.path][site.number]

    if scope == "layer":
        return for_values(by_layer, params)
    for_values(roles, params)
    ranks = for_values(ranked, params)
    flat, structure = jax.tree.flatten(ranks, is_leaf=is_leaf)
    if not flat:
        return masks  # Leaves without values, which the view refuses by name.
    total = sum(r.size for r in flat)
    if total >= 2**31:
        raise ValueError(
            f"prune: scope='global' counts up to 2^31 weights; got {total}. Use "
            "scope='layer', or a transform for each part of the model."
        )
    low = lowest(flat, _count(sparsity, total))
    fresh = jax.tree.unflatten(structure, [~m for m in low])
    return jax.tree.map(jnp.logical_and, fresh, masks)
