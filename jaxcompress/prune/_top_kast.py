"""Masks from the weights as they are: Top-KAST and straight-through."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.prune._overlap import prune_states
from jaxcompress.prune._pattern import ByPath, Pattern, Scope, as_pattern
from jaxcompress.prune._training import (
    AxesOption,
    PruneState,
    check_every,
    everywhere,
    masked_training,
)
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values


class Explored(NamedTuple):
    """Memory of `top_kast`: which weights get a gradient.

    Attributes:
      backward: By path, a boolean array for each value, true at every kept weight.
    """

    backward: dict[str, tuple[jax.Array, ...]]


def top_kast(
    *,
    sparsity: float | Schedule | Pattern,
    backward_sparsity: float | Schedule | Pattern,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Run on the largest weights, train somewhat more of them.

    .. math:: \alpha_i = \theta_i [i \in A], \quad
       \Delta_i = -\eta \nabla_{\alpha_i} L [i \in B], \quad
       A = \operatorname{top}_D(|\theta|), \quad
       B = \operatorname{top}_{D+M}(|\theta|) \supseteq A

    Both sets are chosen anew from the weights as they are, so weights come back. The
    params are dense: outside `A` only the view is zero. Outside `B` the gradient is
    zero, but weight decay and momentum of the optimizer still act.

    Args:
      sparsity: Fraction outside `A`, or a schedule or `Pattern`, as for `magnitude`.
      backward_sparsity: Fraction outside `B`, likewise; at most `sparsity`.
      scope: As for `magnitude`.
      every: Updates between two choices of the sets.
      axes: As for `magnitude`.

    Returns:
      A transform; `top_kast_penalty` is the loss that goes with it.

    Raises:
      ValueError: As for `magnitude`; if `backward_sparsity` is above `sparsity`.

    Examples:
      >>> scheme = top_kast(sparsity=0.75, backward_sparsity=0.5)
      >>> params, state = scheme.init({"w": jnp.array([1.0, -4.0, 3.0, 2.0])})
      >>> loss = lambda p: scheme.view(p, state)["w"].materialize().sum()
      >>> loss(params).tolist(), jax.grad(loss)(params)["w"].tolist()
      (-4.0, [0.0, 1.0, 1.0, 0.0])

    References:
      Jayakumar et al., `Top-KAST: Top-K Always Sparse Training
      <https://arxiv.org/abs/2106.03517>`_, 2020, section 2.
    """
    by = "prune.top_kast"
    numbers = [s for s in (sparsity, backward_sparsity) if isinstance(s, int | float)]
    if len(numbers) == 2 and numbers[1] > numbers[0]:
        raise ValueError(
            f"{by}: backward_sparsity must be at most sparsity, since every kept "
            f"weight is trained; got {backward_sparsity} above {sparsity}."
        )
    wider = as_pattern(backward_sparsity, scope, by)
    return _anew(as_pattern(sparsity, scope, by), wider, by, every, axes)


def straight_through(
    *,
    sparsity: float | Schedule | Pattern,
    scope: Scope = "layer",
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    """Run on the largest weights, train all of them.

    The params are dense and get the gradient of the masked weights as if there were
    no mask, so weights come back; only the view is zero.

    Args:
      sparsity: As for `magnitude`.
      scope: As for `magnitude`.
      every: Updates between two choices of the masks.
      axes: As for `magnitude`.

    Raises:
      ValueError: As for `magnitude`.

    Examples:
      >>> scheme = straight_through(sparsity=0.5)
      >>> params, state = scheme.init({"w": jnp.array([1.0, -4.0, 3.0, 2.0])})
      >>> loss = lambda p: scheme.view(p, state)["w"].materialize().sum()
      >>> loss(params).tolist(), jax.grad(loss)(params)["w"].tolist()
      (-1.0, [1.0, 1.0, 1.0, 1.0])

    References:
      Bengio et al., 2013, section 3, of a mask; `top_kast` with `B` all weights.
    """
    by = "prune.straight_through"
    return anew(as_pattern(sparsity, scope, by), by=by, every=every, axes=axes)


def anew(pattern: Pattern, *, by: str, every: int, axes: AxesOption) -> Transform:
    """Masks of the largest weights as they are, gradients for all."""
    return _anew(pattern, None, by, every, axes)


def _anew(
    pattern: Pattern, wider: Pattern | None, by: str, every: int, axes: AxesOption
) -> Transform:
    check_every(every, by)

    def chosen(params: Any, roles: ByPath, step: jax.Array) -> PruneState:
        size = for_values(lambda w, site: jnp.abs(w.astype(jnp.float32)), params)
        kept = pattern.keep(size, roles, step)
        if wider is None:
            return PruneState(kept, step)
        trained = wider.keep(size, roles, step)
        both = jax.tree.map(jnp.logical_or, trained, kept)
        return PruneState(kept, step, Explored(both))

    def following(
        params: Any, grads: Any, roles: ByPath, state: PruneState
    ) -> PruneState:
        del grads
        due = state.step % every == 0
        renew = lambda: chosen(params, roles, state.step)
        return jax.lax.cond(due, renew, lambda: state)

    def trained(state: PruneState, site: Site) -> jax.Array:
        return state.memory.backward[site.path][site.number]

    return masked_training(
        lambda params, roles: chosen(params, roles, jnp.zeros((), jnp.int32)),
        following,
        pattern,
        by=by,
        axes=axes,
        backward=everywhere if wider is None else trained,
        hold=False,
    )


def top_kast_penalty(params: Any, state: Any) -> jax.Array:
    r"""The loss that makes trained weights outside the forward set fight their way in.

    .. math:: \sum_{i \in A} \theta_i^2 + \sum_{i \in B \setminus A} \theta_i^2 / D

    Args:
      params: The trained params (not their view).
      state: State of a scheme with `top_kast` anywhere in it.

    Returns:
      ``float32`` scalar, to add to the loss times a strength. `D` is the fraction of
      the weight that is kept; outside `B` the gradient is zero.

    Raises:
      ValueError: If the state has no masks of `top_kast`.

    Examples:
      >>> scheme = top_kast(sparsity=0.75, backward_sparsity=0.5)
      >>> params, state = scheme.init({"w": jnp.array([1.0, -4.0, 3.0, 2.0])})
      >>> float(top_kast_penalty(params, state))
      52.0

    References:
      Jayakumar et al., 2020, section 2.3. Differs: squares (the L2 that the paper
      uses), where its formula shows magnitudes.
    """
    who = "prune.top_kast_penalty"
    ours = [s for s in prune_states(state, who=who) if isinstance(s.memory, Explored)]
    if not ours:
        raise ValueError(
            f"{who}: the state must have masks of prune.top_kast; those in it are of "
            "other transforms."
        )
    total = jnp.float32(0)
    for own in ours:
        chosen = {path: v for path, v in _by_path(params).items() if path in own.masks}
        for path, weights in chosen.items():
            sets = zip(weights, own.masks[path], own.memory.backward[path], strict=True)
            total += sum((_energy(*s) for s in sets), jnp.float32(0))
    return total


def _by_path(params: Any) -> dict[str, tuple[Any, ...]]:
    return for_values(lambda w, site: w, params)


def _energy(w: jax.Array, kept: jax.Array, trained: jax.Array) -> jax.Array:
    squares = jnp.square(w.astype(jnp.float32))
    density = jnp.maximum(kept.mean(dtype=jnp.float32), 1.0 / w.size)
    weighed = jnp.where(kept, squares, squares / density)
    return jnp.where(trained, weighed, 0.0).sum()
