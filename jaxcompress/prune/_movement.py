"""Pruning by gradients seen in training: movement, and first-order Taylor."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.prune import scores as score
from jaxcompress.prune._pattern import ByPath, Pattern, Scope, as_pattern
from jaxcompress.prune._renewal import renewed
from jaxcompress.prune._training import (
    AxesOption,
    PruneState,
    check_every,
    everywhere,
    gradients,
    masked_training,
)
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values, map_values


class Moved(NamedTuple):
    """Memory of `movement`.

    Attributes:
      scores: By path, ``float32`` accumulated movement of each weight.
      weights: By path, the weights that the next gradient will be taken at.
    """

    scores: dict[str, tuple[jax.Array, ...]]
    weights: dict[str, tuple[jax.Array, ...]]


def movement(
    *,
    sparsity: float | Schedule | Pattern,
    learning_rate: float | Schedule = 1.0,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Keep the weights that training moves away from zero, whatever their size.

    .. math:: S_T = -\sum_{t < T} \alpha_t \, w_t \frac{\partial L}{\partial (w m)_t}

    The view passes its gradient to all weights, kept or not, so scores of pruned
    weights go on and they may come back, with the value they left with: their own
    updates are undone while they are pruned.

    Args:
      sparsity: As for `magnitude`; from few to many on a schedule, as a rule.
      learning_rate: :math:`\alpha`, of the scores; or its schedule.
      scope: As for `magnitude`.
      every: Updates between two choices of the masks; scores grow at each.
      axes: As for `magnitude`.

    Returns:
      A transform. Its first masks, before there are scores, are those of `magnitude`.
      Its state holds the scores and a copy of the weights.

    Raises:
      ValueError: As for `magnitude`; from ``update`` if it gets no gradients.

    Examples:
      >>> scheme = movement(sparsity=0.5)
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 2.0]])})
      >>> params, state = scheme.update(
      ...     params, state, grads={"w": jnp.array([[-1.0, 1.0]])})
      >>> state.memory.scores["w"][0].tolist(), state.masks["w"][0].tolist()
      ([[1.0, -2.0]], [[True, False]])

    References:
      Sanh et al., `Movement Pruning <https://arxiv.org/abs/2005.07683>`_, 2020, eq. 3
      and section 4 (hard movement). Differs: scores follow plain gradient steps; the
      optimizer's moments also collect the gradients of pruned weights.
    """
    by = "prune.movement"
    pattern = as_pattern(sparsity, scope, by)
    check_every(every, by)

    def first(params: Any, roles: ByPath) -> PruneState:
        step = jnp.zeros((), jnp.int32)
        copied = for_values(lambda w, site: jnp.array(w, copy=True), params)
        blank = for_values(lambda w, site: jnp.zeros_like(w, jnp.float32), params)
        kept = pattern.keep(_sizes(params), roles, step)
        return PruneState(kept, step, Moved(blank, copied))

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        found = gradients(grads, state, by=by)
        rate = learning_rate
        if callable(rate):
            rate = rate(state.step - 1)

        def moved(total: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
            return total - rate * (g.astype(jnp.float32) * w.astype(jnp.float32))

        memory = state.memory
        scores = jax.tree.map(moved, memory.scores, memory.weights, dict(found))
        weights = for_values(lambda w, site: w, params)
        state = state._replace(memory=Moved(scores, weights))
        return renewed(state, scores, pattern, roles, every=every, returning=True)

    inner = masked_training(
        first, following, pattern, by=by, axes=axes, backward=everywhere, hold=False
    )

    def update(params: Any, state: PruneState, **extra: Any) -> tuple[Any, PruneState]:
        def kept(w: jax.Array, site: Site) -> jax.Array:
            mask = state.masks[site.path][site.number]
            return jnp.where(mask, w, state.memory.weights[site.path][site.number])

        return inner.update(map_values(kept, params, by=by), state, **extra)

    return inner._replace(update=update)


def taylor(
    *,
    sparsity: Schedule,
    decay: float = 0.9,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Hold at zero the weights whose absence would change the loss least.

    .. math:: a_t = d\, a_{t-1} + (1 - d) (g_t w_t)^2

    What is pruned stays pruned.

    Args:
      sparsity: A schedule of the fraction pruned. Nothing is known before the first
        gradients, so it begins at 0, as a rule; what it prunes at step 0 is chosen
        by magnitude.
      decay: :math:`d` in [0, 1); near 1, an average over many batches.
      scope: As for `magnitude`.
      every: Updates between two changes of the masks; the average is kept at each.
      axes: As for `magnitude`.

    Returns:
      A transform, whose state holds the averages.

    Raises:
      ValueError: As for `magnitude`; if `sparsity` is no schedule or `decay` out of
        range; from ``update`` if it gets no gradients.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = taylor(sparsity=jc.schedules.one_shot(0.5, at=1))
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 2.0]])})
      >>> grads = {"w": jnp.array([[-3.0, 1.0]])}
      >>> params, state = scheme.update(params, state, grads=grads)
      >>> params["w"].tolist()
      [[1.0, 0.0]]

    References:
      Molchanov et al., `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019, section 3.1. Differs: single weights;
      a moving average; the weights are those after the optimizer's step.
    """
    by = "prune.taylor"
    if not callable(sparsity):
        raise ValueError(
            f"{by}: sparsity must be a schedule, since there are no gradients at step "
            f"0; got {sparsity!r}. Use schedules.one_shot(0.5, at=100), or "
            "prune.by_scores(prune.saliency('taylor', ...), sparsity=...)."
        )
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"{by}: decay must be in [0, 1); got {decay}.")
    pattern = as_pattern(sparsity, scope, by)
    check_every(every, by)

    def first(params: Any, roles: ByPath) -> PruneState:
        step = jnp.zeros((), jnp.int32)
        blank = for_values(lambda w, site: jnp.zeros_like(w, jnp.float32), params)
        return PruneState(pattern.keep(_sizes(params), roles, step), step, blank)

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        found = gradients(grads, state, by=by)

        def follow(w: jax.Array, site: Site) -> jax.Array:
            past = state.memory[site.path][site.number]
            now = score.taylor(w, found[site.path][site.number])
            return decay * past + (1.0 - decay) * now

        averages = for_values(follow, params)
        state = state._replace(memory=averages)
        return renewed(state, averages, pattern, roles, every=every)

    return masked_training(first, following, pattern, by=by, axes=axes)


def _sizes(params: Any) -> dict[str, tuple[jax.Array, ...]]:
    return for_values(lambda w, site: score.magnitude(w), params)
