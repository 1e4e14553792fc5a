"""`smoothquant_weight`: outliers of the activations moved into the weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Base, Frame, divided, round_weight
from jaxcompress.quant._scaled import ScaledArray


def smoothquant_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
    alpha: float = 0.5,
    base: Base = round_weight,
) -> Leaf:
    r"""Quantize weight and activations after evening out the activations' channels.

    .. math:: X W = (X \operatorname{diag}(s)^{-1}) (\operatorname{diag}(s) W), \quad
       s_j = \max |X_j|^\alpha / \max |W_j|^{1 - \alpha}

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of the scaled weight, with its scheme for activations.
        Static.
      stats: Of the rows that entered the matmul; without them the weight is quantized
        as it is.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      alpha: How much of the difficulty moves to the weight, in [0, 1]. Static.
      base: How the scaled weight is quantized, given the statistics of ``x / s``: the
        default finds the scale of static activations from their absmax. Static.

    Returns:
      A leaf that divides activations by `s` before it quantizes them; up to rounding,
      that alone changes nothing. Channels whose weights or activations are all zero are
      left alone.

    Raises:
      ValueError: As `quantize` does; if `alpha` is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.lift import statistics
      >>> w, x = jnp.array([[1.0], [1.0]]), jnp.array([[16.0, 1.0]])
      >>> smooth = lambda w, x: smoothquant_weight(w, jc.presets.W8A8, statistics(x))
      >>> jax.jit(smooth)(w, x).channel_scale.tolist()
      [[4.0, 1.0]]

    References:
      Xiao et al., `SmoothQuant <https://arxiv.org/abs/2211.10438>`_, 2022, eq. 3 and 4.
      Differs: activations are divided where the weight is used, not in the operation
      before it; `s` is held within [1e-5, 1e5].
    """
    who = f"smoothquant_weight to {fmt.name}"
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{who}: alpha must be in [0, 1]; got {alpha}.")
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    if stats is None:
        return base(w, fmt, None, axes=frame.roles, path=path)
    a = frame.storage(w)
    n = len(frame.stack)
    largest = jnp.abs(a).max(tuple(range(n, a.ndim - 1)))
    live = (stats.absmax > 0) & (largest > 0)
    log_s = alpha * _log(stats.absmax, live) - (1.0 - alpha) * _log(largest, live)
    s = jnp.clip(jnp.exp(log_s), 1e-5, 1e5)
    inner = frame.quantized(
        base, frame.weight(a * frame.shared(s)), fmt, divided(stats, s), path
    )
    return ScaledArray(inner=inner, channel_scale=frame.shared(s), layout=frame.layout)


def _log(a: jax.Array, live: jax.Array) -> jax.Array:
    """Logarithm, zero where not `live`."""
    return jnp.log(jnp.where(live, a, 1.0))
