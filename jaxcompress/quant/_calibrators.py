"""Ranges of static activations, from statistics of what entered a matmul."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import static_type
from jaxcompress.lift import Statistics
from jaxcompress.quant._activations import Activations
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._histogram_ranges import (
    least_divergence_range,
    least_error_range,
    percentile_range,
    static_grid,
)
from jaxcompress.quant._ranges import MSE, Percentile
from jaxcompress.quant._weights import weights
from jaxcompress.transform import Transform


@static_type
class MinMax:
    """The range of all entries seen: nothing is clipped."""


@static_type
class MovingAverage:
    """The range averaged over batches: ``calibrate(..., momentum=0.9)``."""


@static_type
class Entropy:
    """Settings of `entropy`."""

    bins: int


Method = MinMax | MovingAverage | Percentile | MSE | Entropy
_MINMAX = MinMax()


def minmax() -> MinMax:
    """From the lowest to the highest entry; of a symmetric format, the largest."""
    return MinMax()


def moving_average() -> MovingAverage:
    """As `minmax`, each end averaged over batches; needs ``momentum=``.

    References:
      Jacob et al., `Quantization and Training of Neural Networks
      <https://arxiv.org/abs/1712.05877>`_, 2018, section 3.1 (smoothed ranges).
    """
    return MovingAverage()


def entropy(*, bins: int = 2048) -> Entropy:
    r"""The magnitude at which clipping loses least information; of integer formats.

    The histogram of magnitudes in `bins` equal bins, cut behind the first :math:`i`
    (what lies beyond counts in the last), is :math:`P`; the same without what lies
    beyond, each of :math:`2^{b-1}` levels spread evenly over its bins that are not
    empty, is :math:`Q`; :math:`\sum P \log(P / Q)` is least.

    Args:
      bins: Equal bins up to the largest magnitude; more than levels.

    References:
      Migacz, `8-bit Inference with TensorRT
      <https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf>`_,
      2017, slides 26-34. Differs: the equal bins are read off the logarithmic ones,
      evenly; a bin that P fills and Q leaves empty counts as one of 1e-9.
    """
    if bins < 16:
        raise ValueError(f"entropy: bins must be at least 16; got {bins}.")
    return Entropy(bins=bins)


def activation_range(
    stats: Statistics, activations: Activations, *, method: Method = _MINMAX
) -> tuple[jax.Array, jax.Array | None]:
    """Scale, and zero point if asymmetric, of static activations.

    Args:
      stats: Of `calibrate` or `statistics`. Methods other than `minmax` need
        ``histogram=True`` or, `moving_average`, ``momentum=``.
      activations: Their format. Static.
      method: `minmax()`, `moving_average()`, `percentile(...)`, `mse()` or
        `entropy()`. Static. Percentile and error are those of the histogram.

    Returns:
      ``float32[*stack]`` each. Zero is on the grid. A stack entry that saw nothing but
      zeros has the largest scale of the others, or 1.

    Raises:
      ValueError: If the statistics lack what the method needs, or it is `entropy`
        and the format is not an integer one.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> from jaxcompress.quant import Integer, static
      >>> stats = statistics(jnp.array([[-1.0, 3.0], [0.5, 2.0]]))
      >>> scale, zero = activation_range(
      ...     stats, static(Integer(bits=8, symmetric=False, narrow=False)))
      >>> round(1 / scale.item(), 2), zero.item()
      (63.75, 64.0)
    """
    low, high = _range(stats, activations, method)
    scale, zero = static_grid(low, high, activations.element)
    scale = jnp.where(scale > 0, scale, jnp.broadcast_to(scale.max(), scale.shape))
    return jnp.where(scale > 0, scale, 1.0), zero


def calibrated(
    fmt: NumberFormat, stats: Mapping[str, Statistics], *, method: Method = _MINMAX
) -> Transform:
    """`weights` with the static scale of each leaf, found by its path.

    Args:
      fmt: A format with ``activations=static(...)``.
      stats: Of `calibrate`, for the paths that the rule will choose.
      method: As for `activation_range`.

    Returns:
      A transform. Leaves of scanned layers get one scale for each layer.

    Raises:
      ValueError: If the format's activations are not static, or statistics are not
        finite; from ``init``, if there are no statistics for a leaf or its stack is
        another.

    Examples:
      >>> import jaxcompress as jc
      >>> params, x = {"w": jnp.eye(2)}, jnp.array([[0.5, -448.0]])
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x])
      >>> packed = jc.compress(params, {"w": calibrated(jc.presets.FP8, stats)})
      >>> packed["w"].activation_scale.item()
      1.0
    """
    activations = fmt.activations
    if activations is None or not activations.static:
        raise ValueError(
            "calibrated: activations of the format must be static(...); got "
            f"{activations} in {fmt.name}. Dynamic ones need no statistics."
        )
    find = jax.jit(activation_range, static_argnames=("activations", "method"))
    for path, seen in stats.items():
        if not jnp.isfinite(seen.absmax).all():
            raise ValueError(
                f"calibrated: the statistics of {path!r} must be finite; NaN or "
                "infinite activations entered its matmul. Look at the batches."
            )
    found = {p: find(s, activations, method=method) for p, s in stats.items()}
    zeros = {p: zero for p, (_, zero) in found.items() if zero is not None}
    return weights(
        fmt,
        activation_scale={p: scale for p, (scale, _) in found.items()},
        activation_zero=zeros or None,
    )


def _range(
    stats: Statistics, activations: Activations, method: Method
) -> tuple[jax.Array, jax.Array]:
    """Ends of the range, with zero between them."""
    low, high = stats.low, stats.high
    if isinstance(method, MovingAverage):
        low, high = stats.average_low, stats.average_high
        if low is None or high is None:
            raise ValueError(
                "activation_range: moving_average() needs averages over batches; "
                "calibrate with momentum=0.9."
            )
        return low, high
    if low is None or high is None:
        raise ValueError(
            "activation_range: the statistics have no low and high; make them by "
            "calibrate or statistics."
        )
    if isinstance(method, MinMax):
        return low, high
    if stats.counts is None:
        raise ValueError(
            f"activation_range: {method} needs a histogram; calibrate with "
            "histogram=True."
        )
    element = activations.element
    if isinstance(method, Entropy) and not isinstance(element, Integer):
        raise ValueError(
            f"activation_range: entropy() is of integer formats; got {element.label}. "
            "Use mse() or percentile(...)."
        )

    def one(entry: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> Any:
        seen, entries = entry[:3], entry[3]
        match method:
            case Percentile(percent=percent):
                return percentile_range(*seen, percent, element)
            case MSE():
                return least_error_range(*seen, entries, method, element)
            case Entropy(bins=bins):
                return least_divergence_range(*seen, bins, 2 ** (element.bits - 1))
        raise TypeError(
            "activation_range: method must be minmax(), moving_average(), "
            f"percentile(...), mse() or entropy(); got {method!r}."
        )

    counts = stats.counts.reshape(-1, stats.counts.shape[-1])
    entries = (stats.count * stats.absmax.shape[-1]).ravel()
    found = jax.lax.map(one, (counts, low.ravel(), high.ravel(), entries))
    return jax.tree.map(lambda a: a.reshape(low.shape), found)
