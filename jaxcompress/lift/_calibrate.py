"""Statistics of what enters each weight's matmul, in one jitted pass a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.lift._rows import ROWS, conv_statistics
from jaxcompress.lift._statistics import Statistics, statistics
from jaxcompress.lift._trace import Tracer, refuse_closures
from jaxcompress.lift._tracked import Tracked, track
from jaxcompress.lift._walk import Taps, Use, Walker


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    gram: bool = False,
    histogram: bool = False,
    momentum: float | None = None,
    where: Any = "**",
) -> dict[str, Statistics]:
    """Statistics of the inputs of every matmul, convolution and ragged dot.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called, in one jitted pass a batch.
        Sharded inputs stay sharded.
      params: Parameter pytree, compressed or not.
      batches: Example inputs: tuples of arguments, or single arguments.
      gram: Also collect ``X^T X`` (K^2 floats a weight).
      histogram: Also collect a histogram of the entries, for `activation_range`.
      momentum: Also average the lowest and highest entry over batches, each new one
        counting for ``1 - momentum``.
      where: Rule for the weights to watch.

    Returns:
      By key path, for each watched weight that is used in a matmul, the `Statistics`
      of the rows that entered it, stacked over scanned layers and experts.

    Raises:
      ValueError: If there are no batches, `where` matches no weight, or `momentum`
        is not in [0, 1).
      LiftError: If a watched weight is used in a while loop or in shard_map, or was
        closed over.

    Examples:
      >>> import jax.numpy as jnp
      >>> stats = calibrate(lambda p, x: x @ p["w"], {"w": jnp.eye(2)},
      ...                   [jnp.array([[1.0, -2.0], [3.0, 0.0]])])
      >>> stats["w"].absmax.tolist(), stats["w"].mean.tolist()
      ([3.0, 2.0], [2.0, -1.0])
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ValueError(f"calibrate: momentum must be in [0, 1); got {momentum}.")
    watched = frozenset(tree.choose({where: True}, params, who="calibrate"))
    collect = collector(fn, watched, gram=gram, histogram=histogram)

    @jax.jit
    def join(result: Taps, taps: Taps) -> Taps:
        def both(a: Statistics, b: Statistics) -> Statistics:
            return a.merge(b) if momentum is None else a.follow(b, momentum)

        merged = {p: both(result[p], taps[p]) for p in result.keys() & taps.keys()}
        return {**result, **taps, **merged}

    result: Taps = {}
    number = -1
    for number, item in enumerate(batches):
        taps = collect(params, item if isinstance(item, tuple) else (item,))
        if momentum is not None:
            taps = {
                p: s if p in result else s.start_averages() for p, s in taps.items()
            }
        _check_alike(result, taps, number)
        result = join(result, taps) if result else taps
    if number < 0:
        raise ValueError("calibrate: batches is empty; pass at least one batch.")
    return dict(sorted(result.items()))


def collector(
    fn: Callable[..., Any],
    watched: frozenset[str],
    *,
    gram: bool = False,
    histogram: bool = False,
) -> Callable[[Any, tuple[Any, ...]], Taps]:
    """A jitted pass from parameters and a batch to statistics by path."""
    tracer = Tracer(fn, who="calibrate")
    visit = functools.partial(_tap, watched=watched, gram=gram, histogram=histogram)

    @functools.partial(jax.jit, static_argnums=0)
    def run(trace: Any, operands: list[Any]) -> Taps:
        walker = Walker(
            visit=visit,
            merge=Statistics.merge,
            fold=Statistics.fold,
            inline=True,
            custom_vjp="inline",
        )
        return walker.run(trace.jaxpr, operands)[1]

    def collect(params: Any, batch: tuple[Any, ...]) -> Taps:
        signature, operands = tracer.signature((track(params, arrays=True), *batch), {})

        def check(trace: Any) -> Any:
            refuse_closures(trace, operands, who="calibrate")
            return trace

        return run(tracer(signature, check), operands)

    return collect


def _check_alike(result: Taps, taps: Taps, number: int) -> None:
    for path in result.keys() & taps.keys():
        if result[path].absmax.shape != taps[path].absmax.shape:
            raise ValueError(
                f"calibrate: batch {number} gives {path!r} statistics of shape "
                f"{taps[path].absmax.shape}, earlier ones {result[path].absmax.shape}; "
                "a weight must be used the same way in every batch."
            )


def _tap(
    use: Use, *, watched: frozenset[str], gram: bool, histogram: bool
) -> tuple[Tracked, Taps]:
    """Statistics of the other operand, for the operations that contract a weight."""
    paths = watched.intersection(use.weight.paths)
    if use.op not in ROWS or not paths:
        return use.weight, {}
    if use.op == "conv_general_dilated" and not gram:
        stats = conv_statistics(use, histogram)
    else:
        x, weights = ROWS[use.op](use)
        stats = statistics(x, weights=weights, gram=gram, histogram=histogram)
    return use.weight, dict.fromkeys(paths, stats)
