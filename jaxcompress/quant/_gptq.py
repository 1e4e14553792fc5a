"""GPTQ: each input is rounded, and the inputs after it make up for the error."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import check_feedback, factorize
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._feedback import (
    Choice,
    Group,
    State,
    empty,
    fit_scale,
    rows,
    sweep_all,
    sweep_groups,
)
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._reconstruct import finish, lay
from jaxcompress.quant._steps import Problem, Steps, static_steps


def gptq_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Axes | int | tuple[int, ...] | None = None,
    path: str = "w",
    act_order: bool = False,
    damping: float = 0.01,
    refine: int = 2,
    candidates: int = 16,
    block: int = 128,
) -> QuantizedArray:
    r"""Quantize one weight so that its matmul's output, not the weight, changes least.

    Minimizes :math:`\operatorname{tr}((W - Q)^T H (W - Q))`,
    :math:`H = X^T X / n + \lambda I`, input by input: with
    :math:`H = (I + U) D (I + U)^T`, U strictly upper triangular,

    .. math::
        Q_k = \operatorname{round}\Big(W_k + \sum_{j<k} (W_j - Q_j)\, U_{jk}\Big).

    Then `refine` times over all inputs, each again given all others, and each scale,
    :math:`Q_k \leftarrow \operatorname{round}(Q_k + (H (W - Q))_k / H_{kk})`: the error
    never rises.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format; its own ``search`` is not used. Static.
      stats: Of the rows that entered its matmul, with their gram. None, or a stack
        entry without rows: rounding to the searched scales.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      act_order: Inputs of large second moment first; the scales are then those of the
        weight as it was. Static.
      damping: :math:`\lambda`, relative to the mean second moment of the inputs that
        are not always zero. Raised tenfold until the factorization succeeds. Static.
      refine: Passes after the first. An int.
      candidates: Clipping ranges tried for each scale; 1 takes the largest weight's.
        Static.
      block: Inputs between two matmuls over all inputs before them. Static.

    Returns:
      A leaf of `w`'s shape and dtype, packed. Inputs that are always zero are rounded
      and disturb no other. The damped error is at most that without `refine`.

    Raises:
      ValueError: As `quantize` does; or if the statistics are not of this weight or
        without gram, the format rounds other than to nearest, or an option is out of
        range.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> from jaxcompress.quant import int4
      >>> x = jnp.array([[0.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
      >>> w = jnp.array([[7.0], [3.4], [0.4]])
      >>> stats = statistics(x, gram=True)
      >>> q = gptq_weight(w, int4(), stats, candidates=1, refine=0)
      >>> q.materialize()[:, 0].tolist()
      [7.0, 3.0, 1.0]

    References:
      Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2022, Algorithm 1; in
      the form of Chee et al., `QuIP <https://arxiv.org/abs/2307.13304>`_, 2023, eq. 2
      and Theorem 6 (which proves them equal), which factors H instead of its inverse.
      Differs: lazy updates are gathered by the block that needs them, not sent out;
      clipping ranges are searched by the error that the algorithm minimizes; inputs
      that are always zero are rounded, not set to zero; `refine`, which is cyclic
      coordinate descent over codes and scales.
    """
    who = f"gptq to {fmt.name}"
    check_feedback(who, damping, block, refine)
    laid = lay(w, fmt, stats, axes=axes, path=path, candidates=candidates, who=who)
    settings = Settings(
        problem=laid.problem,
        act_order=act_order,
        damping=damping,
        refine=refine > 0,
        block=block,
    )
    arrays = (laid.w, laid.gram, laid.steps, laid.tensor)
    codes, steps = _solve(arrays, jnp.int32(refine), settings)
    return finish(laid, codes, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static arguments of a run; how many passes refine is traced."""

    problem: Problem
    act_order: bool
    damping: float
    refine: bool
    block: int


@functools.partial(jax.jit, static_argnames="settings")
def _solve(
    arrays: tuple[Any, ...], passes: jax.Array, settings: Settings
) -> tuple[jax.Array, Steps]:
    """Codes ``[S, K, R]`` and scales, one stack entry after another."""
    return jax.lax.map(lambda entry: _one(entry, passes, settings), arrays)


def _one(
    arrays: tuple[Any, ...], passes: jax.Array, settings: Settings
) -> tuple[jax.Array, Steps]:
    """Codes ``[K, R]`` and scales ``[groups, blocks]`` of one weight."""
    w, gram, fixed, tensor = arrays
    problem, block = settings.problem, settings.block
    order = jnp.arange(w.shape[0])
    if settings.act_order:
        order = jnp.argsort(-jnp.diagonal(gram), stable=True)
        gram = gram[order][:, order]
    factor = factorize(gram, settings.damping)
    back = jnp.argsort(order)
    importance = factor.importance[back]
    if fixed is None and settings.act_order:
        fixed = static_steps(w, importance, tensor, problem)
    if fixed is None:

        def searched(i: jax.Array, group: Group) -> Choice:
            # The group where its inputs make up for all errors before it.
            moved = jax.lax.linalg.triangular_solve(
                group.feedback,
                group.target - group.base,
                left_side=True,
                lower=True,
                unit_diagonal=True,
            )
            counts = rows(importance, i, problem)
            return Choice(problem.search(group.base + moved, counts, tensor), group)

        state = sweep_groups(
            w,
            empty(w, problem),
            factor.feedback,
            searched,
            problem,
            block,
            first=True,
        )
    else:
        groups = order // (w.shape[0] // problem.groups)
        state = sweep_all(
            w[order],
            empty(w, problem, fixed),
            factor.feedback,
            groups,
            problem,
            block,
            first=True,
        )
    state = State(state.error[back], state.codes[back], state.steps)
    if settings.refine:
        h = factor.h[back][:, back]
        state = _refined(w, state, h, tensor, passes, settings)
    return state.codes, state.steps


def _refined(
    w: jax.Array,
    state: State,
    h: jax.Array,
    tensor: jax.Array,
    passes: jax.Array,
    settings: Settings,
) -> State:
    """Coordinate descent: the same sweep, with the feedback of all other inputs."""
    problem, block = settings.problem, settings.block
    diagonal = jnp.diagonal(h)
    feedback = h / diagonal[:, None]

    def fitted(i: jax.Array, group: Group) -> Choice:
        return fit_scale(group, rows(diagonal, i, problem), tensor, problem)

    def one_pass(_: jax.Array, state: State) -> State:
        if problem.tied:
            groups = jnp.arange(w.shape[0]) // (w.shape[0] // problem.groups)
            return sweep_all(w, state, feedback, groups, problem, block)
        return sweep_groups(w, state, feedback, fitted, problem, block)

    return jax.lax.fori_loop(0, passes, one_pass, state)
