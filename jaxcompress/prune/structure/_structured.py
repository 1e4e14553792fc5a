"""Structured pruning in one call: a smaller dense model, and what runs it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from jaxcompress.prune.structure._choose import Units, choose_units
from jaxcompress.prune.structure._cost import Cost, Costs
from jaxcompress.prune.structure._graph import Graph, dependency_graph
from jaxcompress.prune.structure._importance import Importance
from jaxcompress.prune.structure._removal import Removal


class Smaller(NamedTuple):
    """The result of `structured`.

    Attributes:
      params: Smaller dense arrays, in the structure of the old ones.
      fn: Runs them: the function given, or its program with new sizes.
      removal: What went; `Removal.take` shrinks an optimizer's moments alike.
      graph: What could have gone.
      before: Costs of one call on the example.
      after: The same of the smaller model.
    """

    params: Any
    fn: Callable[..., Any]
    removal: Removal
    graph: Graph
    before: Costs
    after: Costs


def structured(
    fn: Callable[..., Any],
    params: Any,
    *example: Any,
    importance: Importance | None = None,
    parameters: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    scope: Literal["global", "group"] = "global",
    groups: Sequence[int] | None = None,
    keep_at_least: float = 0.1,
    round_to: int = 1,
) -> Smaller:
    """Remove the least important channels, heads and features of a model.

    Args:
      fn: ``fn(params, *example)``, any traceable function.
      params: Pytree of dense arrays.
      *example: Arguments of one call; arrays for `latency`, else shapes are enough.
      importance: Of the units; `group_norm` by default.
      parameters: Fraction of the parameters to keep at most.
      flops: Fraction of the matmuls' and convolutions' operations to keep at most.
      latency: Fraction of the seconds of a jitted call, measured here, to keep at most.
        Of these three, give one.
      scope: As for `choose_units`.
      groups: As for `choose_units`.
      keep_at_least: As for `choose_units`.
      round_to: As for `choose_units`; 8 or 128 suit accelerators.

    Returns:
      The smaller params and a function that runs them. The function gives what `fn`
      gives on params whose removed parts are zero, to rounding. It is `fn` itself where
      `fn` takes its sizes from the params, which is tried on `example`.

    Raises:
      ValueError: As `dependency_graph` and `choose_units` do.

    References:
      Fang et al., `DepGraph <https://arxiv.org/abs/2301.12900>`_, 2023. Differs: see
      `dependency_graph`.
    """
    graph = dependency_graph(fn, params, *example)

    def seconds(units: Units) -> float:
        return _seconds(fn, params, Removal.of(graph, units), example)

    units = choose_units(
        graph,
        params,
        importance=importance,
        parameters=parameters,
        flops=flops,
        measured=None if latency is None else (latency, seconds),
        scope=scope,
        groups=groups,
        keep_at_least=keep_at_least,
        round_to=round_to,
    )
    removal = Removal.of(graph, units)
    smaller = removal.take(params)
    cost = Cost(graph)
    run = removal.smaller(fn)
    if _is_native(fn, run, smaller, example):
        run = fn
    return Smaller(smaller, run, removal, graph, cost({}), cost(units))


def _seconds(
    fn: Callable[..., Any], params: Any, removal: Removal, example: Any
) -> float:
    run = jax.jit(removal.smaller(fn))
    smaller = removal.take(params)
    jax.block_until_ready(run(smaller, *example))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(run(smaller, *example))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _is_native(
    fn: Callable[..., Any], resized: Callable[..., Any], params: Any, example: Any
) -> bool:
    """Whether `fn` itself gives on smaller params what its resized program gives."""
    leaves = jax.tree.leaves((params, example))
    if any(isinstance(x, jax.ShapeDtypeStruct | Tracer) for x in leaves):
        return False
    try:
        own = fn(params, *example)
    except Exception:  # Whatever a function raises when its sizes do not fit.
        return False
    return _close(own, resized(params, *example))


def _close(a: Any, b: Any) -> bool:
    xs, ys = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(xs) == len(ys) and all(
        np.shape(x) == np.shape(y)
        and np.allclose(x, y, rtol=1e-3, atol=1e-3 * float(np.abs(y).max(initial=0.0)))
        for x, y in zip(map(np.asarray, xs), map(np.asarray, ys), strict=True)
    )
