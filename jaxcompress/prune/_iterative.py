"""Iterative magnitude pruning, with weights rewound to an early step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune._pattern import Scope, as_pattern
from jaxcompress.prune._training import AxesOption, PruneState, by_score, check_every
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, for_values, map_values


def iterative(
    *,
    rate: float = 0.2,
    rounds: int,
    every: int,
    rewind_to: int = 0,
    scope: Scope = "layer",
    axes: AxesOption = None,
) -> Transform:
    r"""Train, prune the smallest, set the rest back to an early step, and again.

    .. math:: s_r = 1 - (1 - rate)^r, \quad
       \theta \leftarrow m_r \odot \theta_k \text{ at step } r \cdot every

    The weights at step `rewind_to` are kept in the state's memory. At the end of each
    round the smallest of the kept weights are pruned and the others set back to them;
    after the last, training goes on. What is pruned stays pruned.

    The optimizer is not set back: use one without memory, or a learning rate of
    period `every` that starts low. Leaves that no rule chooses are not set back
    either; ``rate=0.0`` sets back without pruning (biases, normalization).

    Args:
      rate: Fraction of the kept weights pruned in each round, in [0, 1).
      rounds: Number of times that weights are pruned.
      every: Updates in each round.
      rewind_to: Update whose weights are returned to, below `every`; 0: the first.
      scope: As for `magnitude`.
      axes: As for `magnitude`.

    Returns:
      A transform whose sparsity after round `r` is :math:`s_r`, to rounding. Inside
      `optim.attach`, weights are set back to the last bit or so.

    Raises:
      ValueError: If an option is out of range; from ``init`` as for `magnitude`.

    Examples:
      >>> scheme = iterative(rate=0.5, rounds=1, every=1)
      >>> params, state = scheme.init({"w": jnp.array([1.0, 2.0, 3.0, 4.0])})
      >>> trained = {"w": jnp.array([9.0, 2.0, 8.0, 1.0])}
      >>> scheme.update(trained, state)[0]["w"].tolist()
      [1.0, 0.0, 3.0, 0.0]

    References:
      Frankle & Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019, section 1 (``rewind_to=0``); Frankle
      et al., `Linear Mode Connectivity <https://arxiv.org/abs/1912.05671>`_, 2020,
      Algorithm 2 (later steps).
    """
    by = "prune.iterative"
    _check(rate, rounds, every, rewind_to, by)
    base = by_score(
        lambda w, site: jnp.abs(w.astype(jnp.float32)),
        as_pattern(_by_rounds(rate, rounds, every), scope, by),
        by=by,
        every=every,
        axes=axes,
    )

    def init(params: Any) -> tuple[Any, PruneState]:
        params, state = base.init(params)
        # Copies, so that params and state can both be donated.
        return params, state._replace(memory=for_values(_copy, params))

    def update(
        params: Any, state: PruneState, *, grads: Any = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        del grads, extra
        params, state = base.update(params, state)
        now = for_values(lambda w, site: w, params)
        taken = state.step == rewind_to
        snapshot = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old), now, state.memory
        )
        ends = (state.step % every == 0) & (state.step <= rounds * every)

        def rewound(w: jax.Array, site: Site) -> jax.Array:
            early = snapshot[site.path][site.number]
            kept = state.masks[site.path][site.number]
            return jnp.where(ends & kept, early, w)

        params = map_values(rewound, params, by=by)
        return params, state._replace(memory=snapshot)

    return base._replace(init=init, update=update)


def _copy(w: jax.Array, site: Site) -> jax.Array:
    del site
    return jnp.array(w, copy=True)


def _by_rounds(rate: float, rounds: int, every: int) -> Schedule:
    def sparsity(step: jax.Array) -> jax.Array:
        done = jnp.minimum(step // every, rounds).astype(jnp.float32)
        return 1.0 - jnp.float32(1.0 - rate) ** done

    return sparsity


def _check(rate: float, rounds: int, every: int, rewind_to: int, by: str) -> None:
    check_every(every, by)
    if not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{by}: rate is the fraction pruned in each round and must be in [0, 1); "
            f"got {rate}."
        )
    if rounds < 1:
        raise ValueError(f"{by}: rounds must be at least 1; got {rounds}.")
    if not 0 <= rewind_to < every:
        raise ValueError(
            f"{by}: rewind_to must be a step of the first round, in [0, {every}); got "
            f"{rewind_to}. Raise every, or rewind to an earlier step."
        )
