"""Pruning the weights of lowest score: magnitude, LAMP, random, any scores given."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import resolve_axes
from jaxcompress.prune import scores as score
from jaxcompress.prune._pattern import ByPath, Pattern, Scope, as_pattern
from jaxcompress.prune._renewal import renewed
from jaxcompress.prune._training import (
    AxesOption,
    PruneState,
    by_score,
    check_every,
    masked_training,
)
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values, leaf_key


def magnitude(
    *,
    sparsity: float | Schedule | Pattern,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Hold the weights of smallest magnitude at zero.

    Exactly :math:`\lfloor s n + 1/2 \rfloor` of `n` weights are pruned, ties in order
    of position. What is pruned stays pruned.

    Args:
      sparsity: Fraction pruned, in [0, 1); or a schedule of it, from
        `jaxcompress.schedules`; or a `Pattern`.
      scope: ``"layer"``: of every weight (of every layer of a scanned stack);
        ``"global"``: of all weights given to the transform together; or an
        `Allocation` of that whole to the weights, such as `erk()`.
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
    by = "prune.magnitude"
    pattern = as_pattern(sparsity, scope, by)
    return by_score(
        lambda w, site: score.magnitude(w),
        pattern,
        by=by,
        every=every,
        axes=axes,
    )


def lamp(
    *, sparsity: float | Schedule, every: int = 1, axes: AxesOption = None
) -> Transform:
    r"""Magnitude, with the sparsity of each layer found by its own weights.

    The weights of lowest `scores.lamp` among all given to the transform are held at
    zero: in each layer those of smallest magnitude, and no layer is emptied.

    Args:
      sparsity: Fraction of all weights pruned, or a schedule of it.
      every: As for `magnitude`.
      axes: As for `magnitude`; stacked layers are layers of their own.

    Raises:
      ValueError: As for `magnitude`; if `sparsity` is a pattern.

    Examples:
      >>> scheme = lamp(sparsity=0.5)
      >>> params = {"a": jnp.array([[9.0, 8.0]]), "b": jnp.array([[0.5, 0.1]])}
      >>> compressed = scheme.compress(*scheme.init(params))
      >>> [compressed[path].materialize().tolist() for path in "ab"]
      [[[9.0, 0.0]], [[0.5, 0.0]]]

    References:
      Lee et al., `Layer-Adaptive Sparsity for the Magnitude-based Pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021, section 3.
    """
    by = "prune.lamp"
    if isinstance(sparsity, Pattern):
        raise ValueError(
            f"{by}: sparsity must be a fraction or a schedule, since LAMP decides how "
            f"many weights each layer keeps; got {sparsity}. Use prune.magnitude."
        )

    def layerwise(w: jax.Array, site: Site) -> jax.Array:
        stated = axes if axes is not None else site.axes
        roles = resolve_axes(w.shape, stated, who=by, path=site.path)
        return score.lamp(w, stack=roles.stack)

    pattern = as_pattern(sparsity, "global", by)
    return by_score(layerwise, pattern, by=by, every=every, axes=axes)


def random(
    *,
    sparsity: float | Schedule | Pattern,
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
    by = "prune.random"

    def score(w: jax.Array, site: Site) -> jax.Array:
        return jax.random.uniform(leaf_key(key, site), w.shape, jnp.float32)

    pattern = as_pattern(sparsity, scope, by)
    return by_score(score, pattern, by=by, every=every, axes=axes)


def by_scores(
    scores: Any,
    *,
    sparsity: float | Schedule | Pattern,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    """Hold the weights of lowest given score at zero.

    Args:
      scores: ``float`` arrays of the weights' shapes, the lowest of which go first, in
        the structure of the whole parameter pytree: of `saliency`, say.
      sparsity: As for `magnitude`.
      scope: As for `magnitude`.
      every: As for `magnitude`.
      axes: As for `magnitude`.

    Returns:
      A transform. Its state holds the scores while a schedule needs them.

    Raises:
      ValueError: As for `magnitude`; from ``init``, if a weight has no scores, or they
        are of another shape.

    Examples:
      >>> scheme = by_scores({"w": jnp.array([[3.0, 1.0]])}, sparsity=0.5)
      >>> params, state = scheme.init({"w": jnp.array([[-2.0, 8.0]])})
      >>> scheme.compress(params, state)["w"].materialize().tolist()
      [[-2.0, 0.0]]
    """
    by = "prune.by_scores"
    pattern = as_pattern(sparsity, scope, by)
    check_every(every, by)
    given = for_values(lambda s, site: s, scores)

    def look_up(w: jax.Array, site: Site) -> jax.Array:
        found = given.get(site.path, ())
        if site.number >= len(found):
            raise ValueError(
                f"{by}: there are no scores for {site.path!r}, only for "
                f"{sorted(given)}; give scores of the whole parameter pytree, or leave "
                "the weight out of the rule."
            )
        own = jnp.asarray(found[site.number], jnp.float32)
        if own.shape != w.shape:
            raise ValueError(
                f"{by}: scores must be of the weights' shapes; got {own.shape} for "
                f"{site.path!r} of shape {w.shape}."
            )
        return own

    def first(params: Any, roles: ByPath) -> PruneState:
        found = for_values(look_up, params)
        step = jnp.zeros((), jnp.int32)
        kept = pattern.keep(found, roles, step)
        return PruneState(kept, step, found if pattern.scheduled else ())

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        del params, grads
        if not pattern.scheduled:
            return state
        return renewed(state, state.memory, pattern, roles, every=every)

    return masked_training(first, following, pattern, by=by, axes=axes)
