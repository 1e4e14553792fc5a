"""Post-training quantization of a whole model, weight by weight, in one sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Algorithm, sweep
from jaxcompress.lift._algorithm import core_name
from jaxcompress.quant._adaround import adaround_weight
from jaxcompress.quant._awq import awq_weight
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import round_weight
from jaxcompress.quant._gptq import gptq_weight
from jaxcompress.quant._quantize import quantize
from jaxcompress.quant._smoothquant import smoothquant_weight

Core = Callable[..., Leaf]
"""``(w, fmt, stats, *, axes, path) -> leaf``: an algorithm for one weight."""


def post_training(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, NumberFormat],
    core: Core,
    **options: Any,
) -> Any:
    """Quantize a model with any algorithm for one weight, in the order it runs.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs: tuples of arguments, or single arguments, alike.
      rules: As for `compress`, to number formats.
      core: The algorithm: `gptq_weight`, `awq_weight`, ... with options by
        `functools.partial`; a wrapping one (`awq_weight`, `rotated_weight`, ...) takes
        another as its ``base``.
      **options: As for `jaxcompress.lift.sweep`: ``reference``, ``work_dir``, ...

    Returns:
      `params` with compressed leaves where the rules chose. Weights that are only
      looked up have no statistics: the algorithm then rounds them.

    Raises:
      ValueError: As `jaxcompress.lift.sweep` and the algorithm do.
      LiftError: As `jaxcompress.lift.sweep` does.
    """
    algorithms = {rule: _algorithm(core, fmt) for rule, fmt in rules.items()}
    return sweep(fn, params, batches, algorithms, **options)


def _algorithm(core: Core, fmt: NumberFormat) -> Algorithm:
    plain = fmt.replace(activations=None)

    def run(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        if stats is None:  # Activations of a look-up are indices.
            return core(w, plain, stats, axes=axes, path=path)
        return core(w, fmt, stats, axes=axes, path=path)

    def baseline(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        del stats
        return quantize(w, plain, axes=axes, path=path)

    return Algorithm(run=run, baseline=baseline, name=f"{core_name(core)} {fmt!r}")


def gptq(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, NumberFormat],
    act_order: bool = False,
    damping: float = 0.01,
    refine: int = 2,
    **options: Any,
) -> Any:
    """`post_training` by `gptq_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to number formats.
      act_order: As for `gptq_weight`, as the next two.
      damping: Relative to the mean second moment of the inputs.
      refine: Passes of coordinate descent after the first.
      **options: As for `jaxcompress.lift.sweep`; ``reference=True`` makes up for the
        errors of earlier weights too.

    Returns:
      `params` with compressed leaves where the rules chose.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32))
      >>> gptq(lambda p, x: x @ p["w"], params, [x], rules={"w": jc.quant.int4()})
      {'w': QuantizedArray(int4, float32[32, 8])}

    References:
      Frantar et al., `GPTQ <https://arxiv.org/abs/2210.17323>`_, 2022, Algorithm 1.
      With ``reference=True`` the target is the float model's output, as in Li et al.,
      `GPTAQ <https://arxiv.org/abs/2504.02692>`_, 2025, eq. 4. Differs: the weight is
      first moved to the minimum, then quantized.
    """
    core = functools.partial(
        gptq_weight, act_order=act_order, damping=damping, refine=refine
    )
    return post_training(fn, params, batches, rules=rules, core=core, **options)


def awq(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, NumberFormat],
    base: Core = round_weight,
    **options: Any,
) -> Any:
    """`post_training` by `awq_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to number formats.
      base: What quantizes the scaled weight; `gptq_weight` for both.
      **options: As for `jaxcompress.lift.sweep`.
    """
    core = functools.partial(awq_weight, base=base)
    return post_training(fn, params, batches, rules=rules, core=core, **options)


def smoothquant(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, NumberFormat],
    alpha: float = 0.5,
    base: Core = round_weight,
    **options: Any,
) -> Any:
    """`post_training` by `smoothquant_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to formats with activations.
      alpha: How much of the range moves from the activations to the weight.
      base: What quantizes the smoothed weight.
      **options: As for `jaxcompress.lift.sweep`.
    """
    core = functools.partial(smoothquant_weight, alpha=alpha, base=base)
    return post_training(fn, params, batches, rules=rules, core=core, **options)


def adaround(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, NumberFormat],
    iterations: int = 1000,
    **options: Any,
) -> Any:
    """`post_training` by `adaround_weight`.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to number formats.
      iterations: Steps of Adam for each weight.
      **options: As for `jaxcompress.lift.sweep`.
    """
    core = functools.partial(adaround_weight, iterations=iterations)
    return post_training(fn, params, batches, rules=rules, core=core, **options)
