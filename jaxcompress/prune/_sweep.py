"""Pruning a whole model after training, weight by weight, in one sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Algorithm, sweep
from jaxcompress.lift._algorithm import core_name
from jaxcompress.prune import scores
from jaxcompress.prune._pattern import Pattern
from jaxcompress.prune._sparsegpt import sparsegpt_weight
from jaxcompress.prune._wanda import InputScore, wanda_weight

Core = Callable[..., Leaf]
"""``(w, sparsity, stats, *, axes, path) -> leaf``: an algorithm for one weight."""


def post_training(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, float | Pattern],
    core: Core,
    **options: Any,
) -> Any:
    """Prune a model with any algorithm for one weight, in the order it runs.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs: tuples of arguments, or single arguments, alike.
      rules: As for `compress`, to sparsities: fractions pruned, or patterns.
      core: The algorithm: `wanda_weight`, `sparsegpt_weight`, `obs_weight` with options
        by `functools.partial`.
      **options: As for `jaxcompress.lift.sweep`: ``reference``, ``work_dir``, ...

    Returns:
      `params` with compressed leaves where the rules chose. Weights that are only
      looked up have no statistics: the algorithm then prunes them by magnitude.

    Raises:
      ValueError: As `jaxcompress.lift.sweep` and the algorithm do.
      LiftError: As `jaxcompress.lift.sweep` does.
    """
    algorithms = {rule: _algorithm(core, s) for rule, s in rules.items()}
    return sweep(fn, params, batches, algorithms, **options)


def _algorithm(core: Core, sparsity: float | Pattern) -> Algorithm:
    def run(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        return core(w, sparsity, stats, axes=axes, path=path)

    def baseline(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        del stats
        return wanda_weight(w, sparsity, None, axes=axes, path=path)

    return Algorithm(run=run, baseline=baseline, name=f"{core_name(core)} {sparsity!r}")


def wanda(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, float | Pattern],
    score: InputScore = scores.wanda,
    **options: Any,
) -> Any:
    """`post_training` by `wanda_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to sparsities: fractions of every output, or patterns.
      score: As for `wanda_weight`.
      **options: As for `jaxcompress.lift.sweep`; with ``reference=True`` each weight
        is moved before it is pruned.

    Returns:
      `params` with compressed leaves where the rules chose.

    Examples:
      >>> import jax, jaxcompress as jc
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32))
      >>> wanda(lambda p, x: x @ p["w"], params, [x], rules={"w": jc.prune.nm(2, 4)})
      {'w': NMArray(2:4 dense, float32[32, 8])}

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023, section 3.
    """
    core = functools.partial(wanda_weight, score=score)
    return post_training(fn, params, batches, rules=rules, core=core, **options)


def sparsegpt(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, float | Pattern],
    damping: float = 0.01,
    block: int = 128,
    refine: int = 32,
    **options: Any,
) -> Any:
    """`post_training` by `sparsegpt_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to sparsities: fractions pruned, or patterns.
      damping: As for `sparsegpt_weight`, as the next two.
      block: Inputs whose weights are compared.
      refine: Steps of least squares after the first pass.
      **options: As for `jaxcompress.lift.sweep`; ``reference=True`` makes up for the
        errors of earlier weights too.

    Returns:
      `params` with compressed leaves where the rules chose.

    Examples:
      >>> import jax
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32))
      >>> sparsegpt(lambda p, x: x @ p["w"], params, [x], rules={"w": 0.5})
      {'w': BitmaskArray(bitmask dense, float32[32, 8])}

    References:
      Frantar & Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023,
      Algorithm 1. Differs: see `sparsegpt_weight`; each layer sees the inputs of the
      pruned layers before it, down to the single weight.
    """
    core = functools.partial(
        sparsegpt_weight, damping=damping, block=block, refine=refine
    )
    return post_training(fn, params, batches, rules=rules, core=core, **options)
