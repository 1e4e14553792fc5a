"""Rounding with feedback: input by input, each after the errors of others moved it.

One loop serves two algorithms. With the triangular factor of the second moment for
feedback it is GPTQ; with the second moment itself, each row over its diagonal entry,
it is coordinate descent on the codes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.lift._second_moment import matmul
from jaxcompress.quant._rounding import divisor
from jaxcompress.quant._steps import Problem, Steps

# Below so many inputs, compiling four loops costs more than it saves.
_PARTS, _MANY_INPUTS = 4, 1024


class State(NamedTuple):
    """What a sweep carries.

    Attributes:
      error: ``float32[K, R]``, the weight less its quantized value; zero where no code
        was chosen yet.
      codes: ``uint8[K, R]``.
      steps: Scales ``[groups, blocks]``.
    """

    error: jax.Array
    codes: jax.Array
    steps: Steps


class Group(NamedTuple):
    """A block of inputs about to be rounded.

    Attributes:
      target: ``float32[n, R]``, where the errors of all inputs, as they are, move it.
      base: ``float32[n, R]``, what the sweep started from: the weight, or its value.
      codes: ``uint8[n, R]`` so far.
      steps: Scales ``[blocks]`` so far.
      feedback: ``float32[n, n]`` among its inputs.
    """

    target: jax.Array
    base: jax.Array
    codes: jax.Array
    steps: Steps
    feedback: jax.Array


class Choice(NamedTuple):
    """Scales for a group, and the group as they change it."""

    steps: Steps
    group: Group


def empty(w: jax.Array, problem: Problem, steps: Steps | None = None) -> State:
    """No code chosen."""
    if steps is None:
        scale = jnp.zeros((problem.groups, problem.blocks), jnp.float32)
        steps = Steps(scale, scale if problem.has_zero else None)
    return State(jnp.zeros_like(w), jnp.zeros(w.shape, jnp.uint8), steps)


def rows(a: jax.Array, i: jax.Array, problem: Problem) -> jax.Array:
    """Group `i` of inputs of an array whose first axis is K."""
    n = a.shape[0] // problem.groups
    return jax.lax.dynamic_slice_in_dim(a, i * n, n)


def sweep_groups(
    w: jax.Array,
    state: State,
    feedback: jax.Array,
    choose: Callable[[jax.Array, Group], Choice],
    problem: Problem,
    block: int,
    *,
    first: bool = False,
) -> State:
    """Round all inputs, group by group, each with scales chosen when it is reached.

    Args:
      w: ``float32[K, R]``.
      state: Errors so far act on what is rounded.
      feedback: ``float32[K, K]``: row k is what errors add to input k.
      choose: Scales of group i.
      problem: The number format. Static.
      block: Inputs between two matmuls. Static.
      first: Whether no input has an error before it is reached. Static.
    """
    n = w.shape[0] // problem.groups

    def step(seen: int, i: jax.Array, state: State) -> State:
        seen = seen * n if first else w.shape[0]
        mine = rows(feedback[:, :seen], i, problem)
        base = rows(w, i, problem) - rows(state.error, i, problem)
        group = Group(
            target=base + matmul(mine, state.error[:seen]),
            base=base,
            codes=rows(state.codes, i, problem),
            steps=jax.tree.map(lambda s: s[i], state.steps),
            feedback=jax.lax.dynamic_slice_in_dim(mine, i * n, n, axis=1),
        )
        steps, group = choose(i, group)
        full = problem.full(steps)
        codes = _round_columns(group, full, jnp.zeros(n, jnp.int32), problem, block)
        error = rows(w, i, problem) - problem.decode(codes, full)
        put = jax.lax.dynamic_update_slice_in_dim
        return State(
            error=put(state.error, error, i * n, axis=0),
            codes=put(state.codes, codes, i * n, axis=0),
            steps=jax.tree.map(lambda all, s: all.at[i].set(s), state.steps, steps),
        )

    return _in_parts(problem.groups, w.shape[0] if first else 0, step, state)


def sweep_all(
    w: jax.Array,
    state: State,
    feedback: jax.Array,
    groups: jax.Array,
    problem: Problem,
    block: int,
    *,
    first: bool = False,
) -> State:
    """Round all inputs with the scales that the state has.

    Args:
      w: ``float32[K, R]``.
      state: Errors so far act on what is rounded.
      feedback: As for `sweep_groups`.
      groups: ``int32[K]``, the row of the scales of each input.
      problem: The number format. Static.
      block: Inputs between two matmuls. Static.
      first: As for `sweep_groups`.
    """
    full = jax.tree.map(problem.spread, state.steps)
    base = w - state.error
    target = base if first else base + matmul(feedback, state.error)
    group = Group(target, base, state.codes, state.steps, feedback)
    codes = _round_columns(group, full, groups, problem, block)
    own = jax.tree.map(lambda s: s[groups], full)
    return State(w - problem.decode(codes, own), codes, state.steps)


def _round_columns(
    group: Group, steps: Steps, row: jax.Array, problem: Problem, block: int
) -> jax.Array:
    """Codes ``[n, R]`` of a group's inputs, each moved by the changes before it.

    `row` says for each input which of the `steps` ``[m, R]`` is its own.
    """
    n = group.base.shape[0]
    b = min(block, n)
    extra = -n % b
    pad = lambda a: jnp.pad(a, ((0, extra),) + ((0, 0),) * (a.ndim - 1))
    target, base, row = pad(group.target), pad(group.base), pad(row)
    feedback = jnp.pad(group.feedback, ((0, extra), (0, extra)))

    def one_block(seen: int, i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        change, codes = carry
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * b, b)
        mine, start = cut(feedback[:, : seen * b]), cut(base)
        moved = cut(target) + matmul(mine, change[: seen * b])
        among = jax.lax.dynamic_slice_in_dim(mine, i * b, b, axis=1)
        which = cut(row)

        def one_input(k: jax.Array, carry: tuple[jax.Array, jax.Array]):
            change, codes = carry
            own = jax.tree.map(lambda s: s[which[k]], steps)
            code = problem.encode(moved[k] + matmul(among[k], change), own)
            value = problem.decode(code, own)
            return change.at[k].set(start[k] - value), codes.at[k].set(code)

        fresh = jnp.zeros_like(start), jnp.zeros(start.shape, jnp.uint8)
        done = jax.lax.fori_loop(0, b, one_input, fresh)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(change, done[0], i * b, axis=0), put(codes, done[1], i * b, axis=0)

    carry = jnp.zeros_like(base), jnp.zeros(base.shape, jnp.uint8)
    return _in_parts((n + extra) // b, n, one_block, carry)[1][:n]


def _in_parts(
    n: int, inputs: int, step: Callable[[int, jax.Array, Any], Any], carry: Any
) -> Any:
    """``step(seen, i, carry)`` for i below `n`, i always below `seen`.

    What later steps will fill needs no arithmetic yet: of many inputs, in four loops,
    5/8 of it is left.
    """
    parts = _PARTS if inputs >= _MANY_INPUTS else 1
    ends = sorted({-(-n * part // parts) for part in range(1, parts + 1)})
    for start, end in itertools.pairwise([0, *ends]):
        carry = jax.lax.fori_loop(start, end, functools.partial(step, end), carry)
    return carry


def fit_scale(
    group: Group, diagonal: jax.Array, tensor: jax.Array, problem: Problem
) -> Choice:
    r"""The scale of least error, codes and all else given, if storing keeps it better.

    With :math:`c` the values of the codes before their scale, the error is quadratic in
    a change of scale: :math:`\delta^2 c^T H c - 2 \delta\, c^T H (W - Q)`.

    Args:
      group: Of coordinate descent, its feedback H over its diagonal.
      diagonal: ``float32[n]`` of H.
      tensor: As for `Problem.search`.
      problem: The number format. Static.
    """
    units = problem.units(group.codes, problem.full(group.steps).zero)
    spread = matmul(group.feedback, units)
    weighted = units * diagonal[:, None]
    gain = problem.sum(weighted * (group.target - group.base))
    cost = problem.sum(weighted * spread)
    old = group.steps.scale
    new = problem.store(old + gain / divisor(cost), tensor)
    delta = new - old
    falls = delta * (2.0 * gain - delta * cost) > 0
    delta = problem.spread(jnp.where(falls, delta, 0.0))[None]
    steps = Steps(jnp.where(falls, new, old), group.steps.zero)
    base = group.base + delta * units
    target = base + (group.target - group.base) - delta * spread
    return Choice(steps, group._replace(base=base, target=target, steps=steps))
