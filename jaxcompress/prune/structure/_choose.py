"""Which units go, so that a model costs a given part of what it did."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxcompress import tree
from jaxcompress.prune.structure._cost import Cost
from jaxcompress.prune.structure._graph import Graph, Group
from jaxcompress.prune.structure._importance import Importance, group_norm

Units = dict[int, np.ndarray]
"""By number of a group, the units that go; a row for each layer where they differ."""


def choose_units(
    graph: Graph,
    params: Any,
    *,
    importance: Importance | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    measured: tuple[float, Callable[[Units], float]] | None = None,
    scope: Literal["global", "group"] = "global",
    groups: Sequence[int] | None = None,
    keep_at_least: float = 0.1,
    round_to: int = 1,
) -> Units:
    """The least important units, as many as bring a cost down to its target.

    Args:
      graph: Of the model.
      params: Its dense params.
      importance: Of the units; `group_norm` by default.
      parameters: Fraction of the parameters to keep at most.
      flops: Fraction of the operations to keep at most. Of these three, one.
      measured: A fraction, and a function that measures any cost of a removal (seconds,
        say) to compare with that of none.
      scope: ``"global"``: units of all groups are ranked together; ``"group"``: every
        group loses the same fraction.
      groups: Numbers of the groups to remove from; by default all that are removable
        and exact.
      keep_at_least: Fraction of a group's units that stays, at least one unit.
      round_to: What is left of a group is a multiple of it, where the group is larger.

    Returns:
      Units for `Removal.of`.

    Raises:
      ValueError: If not one target is given, it is out of reach (the message says what
        can be reached), a group cannot be removed, or an option is out of range.
    """
    chosen = _groups(graph, groups)
    _check(parameters, flops, measured, keep_at_least, round_to, scope)
    flat, _ = tree.flatten(params)
    scores = {g.number: (importance or group_norm())(graph, g, flat) for g in chosen}
    plans = _plans(chosen, scores, scope, keep_at_least, round_to)
    target, what, cost_of = _target(graph, parameters, flops, measured)
    units = lambda counts: _units(chosen, scores, counts)
    start = cost_of({})
    least = cost_of(units(plans(1.0)))
    if least > target * start:
        raise ValueError(
            f"prune: {what}={target} is out of reach: with {keep_at_least} of the "
            f"units of {len(chosen)} groups kept, {least / start:.4f} of the {what} "
            "are left. Lower keep_at_least, or add groups."
        )
    reached = lambda counts: cost_of(units(counts)) <= target * start
    counts = plans(_smallest(lambda f: reached(plans(f))))
    if measured is None:  # Counting again is cheap; measuring is not.
        counts = _put_back(chosen, scores, counts, round_to, reached)
    return units(counts)


def _groups(graph: Graph, numbers: Sequence[int] | None) -> list[Group]:
    if numbers is None:
        chosen = [g for g in graph.removable if g.inexact is None]
    else:
        chosen = [graph.groups[n] for n in numbers]
        for g in chosen:
            if g.fixed is not None or g.size == 1:
                why = g.fixed or "it has one unit only"
                raise ValueError(
                    f"prune: group {g.number} ({', '.join(g.paths[:3])}) cannot be "
                    f"removed: {why}."
                )
    if not chosen:
        raise ValueError(
            "prune: the graph has no group that can be removed; print it to see what "
            f"stands in the way:\n{graph}"
        )
    return chosen


def _check(
    parameters: Any, flops: Any, measured: Any, keep: float, round_to: int, scope: str
) -> None:
    given = [t for t in (parameters, flops, measured and measured[0]) if t is not None]
    if len(given) != 1 or not 0.0 < given[0] < 1.0:
        raise ValueError(
            "prune: give one target, of parameters, flops or latency, as the fraction "
            f"to keep, in (0, 1); got {given}."
        )
    if not 0.0 <= keep < 1.0:
        raise ValueError(f"prune: keep_at_least must be in [0, 1); got {keep}.")
    if round_to < 1:
        raise ValueError(f"prune: round_to must be positive; got {round_to}.")
    if scope not in ("global", "group"):
        raise ValueError(f"prune: scope must be 'global' or 'group'; got {scope!r}.")


def _target(
    graph: Graph, parameters: float | None, flops: float | None, measured: Any
) -> tuple[float, str, Callable[[Units], float]]:
    cost = Cost(graph)
    if parameters is not None:
        return parameters, "parameters", lambda units: cost(units).parameters
    if flops is not None:
        return flops, "flops", lambda units: cost(units).flops
    return measured[0], "latency", measured[1]


def _plans(
    groups: Sequence[Group],
    scores: Mapping[int, np.ndarray],
    scope: str,
    keep_at_least: float,
    round_to: int,
) -> Callable[[float], dict[int, int]]:
    """How many units each group loses, from how far removal goes, 0 to 1."""
    most = {
        g.number: g.size - max(1, math.ceil(keep_at_least * g.size)) for g in groups
    }

    def rounded(g: Group, count: int) -> int:
        kept = g.size - min(count, most[g.number])
        if round_to < g.size:
            kept = min(g.size, math.ceil(kept / round_to) * round_to)
        return g.size - kept

    if scope == "group":
        return lambda f: {
            g.number: rounded(g, math.floor(f * most[g.number] + 0.5)) for g in groups
        }
    # Layers lose equally many, so their r-th least important units go together.
    ranked = [
        (value, g.number)
        for g in groups
        for value in np.sort(_by_layer(scores[g.number]), -1).mean(0)[: most[g.number]]
    ]
    order = np.argsort([value for value, _ in ranked], kind="stable")
    owners = np.array([ranked[i][1] for i in order], np.int64)

    def plan(f: float) -> dict[int, int]:
        gone = owners[: math.floor(f * len(owners) + 0.5)]
        return {g.number: rounded(g, int((gone == g.number).sum())) for g in groups}

    return plan


def _put_back(
    groups: Sequence[Group],
    scores: Mapping[int, np.ndarray],
    counts: Mapping[int, int],
    round_to: int,
    reached: Callable[[dict[int, int]], bool],
) -> dict[int, int]:
    """Keep what the target leaves room for, the most important units first.

    Where sizes are rounded, many groups take a step at once and the target is passed by
    far.
    """
    counts = dict(counts)

    def next_step(g: Group) -> tuple[float, int, int, Group]:
        """Minus the mean relative score of the units one step would bring back."""
        lost = counts[g.number]
        fewer = max(0, lost - (round_to if round_to < g.size else 1))
        ranked = np.sort(_by_layer(scores[g.number]), -1).mean(0)
        return -float(ranked[fewer:lost].mean() / ranked.mean()), g.number, fewer, g

    steps = [next_step(g) for g in groups if counts[g.number]]
    heapq.heapify(steps)
    while steps:
        _, number, fewer, g = heapq.heappop(steps)
        if not reached(counts | {number: fewer}):
            continue
        counts[number] = fewer
        if fewer:
            heapq.heappush(steps, next_step(g))
    return counts


def _by_layer(scores: np.ndarray) -> np.ndarray:
    return scores if scores.ndim == 2 else scores[None]


def _units(
    groups: Sequence[Group], scores: Mapping[int, np.ndarray], counts: dict[int, int]
) -> Units:
    """The lowest scores of every group, as many as counted."""
    units = {}
    for g in groups:
        score = scores[g.number]
        order = np.argsort(score, axis=-1, kind="stable")
        gone = np.zeros(score.shape, bool)
        np.put_along_axis(gone, order[..., : counts[g.number]], True, axis=-1)
        units[g.number] = gone
    return units


def _smallest(reached: Callable[[float], bool], steps: int = 12) -> float:
    """The least fraction in (0, 1] at which a monotone condition holds, nearly."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
