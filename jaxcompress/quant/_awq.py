"""`awq_weight`: input channels scaled up where the activations are large."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import (
    Base,
    Frame,
    divided,
    output_error,
    round_weight,
    rounded,
)
from jaxcompress.quant._granularity import split_blocks, spread
from jaxcompress.quant._quantize import Grid
from jaxcompress.quant._scaled import ScaledArray


def awq_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
    alphas: int = 20,
    clips: int = 10,
    shortest: float = 0.5,
    base: Base = round_weight,
) -> Leaf:
    r"""Quantize a weight whose channels are first scaled by what their activations are.

    .. math:: s^* = \arg\min_s \| (Q(W \operatorname{diag}(s))
       \operatorname{diag}(s)^{-1} - W) X \|, \quad s = s_X^\alpha

    Then each block's range is shortened where that lowers the error further.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of the scaled weight. Static.
      stats: Of the rows that entered the matmul; with a gram the error is that of the
        outputs, else its diagonal stands for it. Without statistics the weight is
        quantized as it is.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      alphas: Steps of the search over ``alpha`` in [0, 1]. Static.
      clips: Steps of the search over ranges from all down to `shortest`; 0 does not
        clip. Static.
      shortest: Smallest share of a block's range that is tried. Static.
      base: How the scaled and clipped weight is quantized, given the statistics of
        ``x / s``; the searches round. Static.

    Returns:
      A leaf that divides activations by `s`. With the default base its output error, as
      the statistics measure it, is at most that of rounding.

    Raises:
      ValueError: As `quantize` does; if an option is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.lift import statistics
      >>> w = jnp.array([[0.3], [1.0], [-3.5]])
      >>> stats = statistics(jnp.array([[100.0, 1.0, 1.0]]))
      >>> find = lambda w, s: awq_weight(w, jc.quant.int3(), s).materialize()
      >>> round(jax.jit(find)(w, stats)[0, 0].item(), 2)
      0.3

    References:
      Lin et al., `AWQ <https://arxiv.org/abs/2306.00978>`_, 2023, eq. 4 and 5, section
      3.2 and (clipping) section 5.1. Differs: :math:`s_X` is the root mean square of a
      channel, within 1e-4 of the largest, and channels that were never active are left
      alone; a block's clipping is chosen by the diagonal of the gram, then kept only if
      the whole gram agrees; activations are divided where the weight is used, not in
      the operation before it.
    """
    who = f"awq_weight to {fmt.name}"
    if alphas < 1 or clips < 0 or not 0.0 < shortest <= 1.0:
        raise ValueError(
            f"{who}: alphas must be positive, clips not negative, shortest in (0, 1]; "
            f"got {alphas}, {clips}, {shortest}."
        )
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    if stats is None:
        return base(w, fmt, None, axes=frame.roles, path=path)
    a = frame.storage(w)
    centred = _centred_log(stats)
    s = _best_scale(a, centred, frame, fmt, stats, alphas, path)
    scaled, stats = a * frame.shared(s), divided(stats, s)
    if clips:
        scaled = _clipped(scaled, frame, fmt, stats, clips, shortest, path)
    inner = frame.quantized(base, frame.weight(scaled), fmt, stats, path)
    return ScaledArray(inner=inner, channel_scale=frame.shared(s), layout=frame.layout)


def _centred_log(stats: Statistics) -> jax.Array:
    """Logarithm of each channel's magnitude, the middle of its range being zero."""
    live = stats.total_square > 0
    size = 0.5 * jnp.log(jnp.where(live, stats.total_square, 1.0))
    top = size.max(-1, keepdims=True, where=live, initial=-100.0)
    size = jnp.maximum(size, top - jnp.log(1e4))
    low = size.min(-1, keepdims=True, where=live, initial=100.0)
    return jnp.where(live, size - 0.5 * (top + low), 0.0)


def _best_scale(
    a: jax.Array,
    centred: jax.Array,
    frame: Frame,
    fmt: NumberFormat,
    stats: Statistics,
    alphas: int,
    path: str,
) -> jax.Array:
    """The channel scales of least output error, ``float32[*stack, K]``."""
    n = len(frame.stack)

    def error(alpha: jax.Array) -> jax.Array:
        s = frame.shared(jnp.exp(alpha * centred))
        q = rounded(frame.weight(a * s), fmt, frame.roles, path)
        return output_error(frame.storage(q) / s - a, stats, n)

    steps = jnp.arange(alphas + 1, dtype=jnp.float32) / alphas
    errors = jax.lax.map(error, steps)
    best = steps[errors.argmin(0)]
    return jnp.exp(best[..., None] * centred)


def _clipped(
    a: jax.Array,
    frame: Frame,
    fmt: NumberFormat,
    stats: Statistics,
    clips: int,
    shortest: float,
    path: str,
) -> jax.Array:
    """The weight clamped to the share of each block's range of the least error."""
    w = frame.weight(a)
    grid = Grid.of(w, fmt, axes=frame.roles, path=path, check=False)
    blocks, flat = grid.blocks, grid.flatten(w)
    importance = jnp.broadcast_to(frame.shared(stats.total_square), a.shape)
    importance = grid.flatten(frame.weight(importance))
    low = jnp.minimum(blocks.reduce(jnp.min, flat), 0.0)
    high = jnp.maximum(blocks.reduce(jnp.max, flat), 0.0)
    if not (isinstance(fmt.element, Integer) and not fmt.element.symmetric):
        high = jnp.maximum(high, -low)
        low = -high

    def clamp(share: jax.Array) -> jax.Array:
        parts, _ = split_blocks(flat, blocks.counts)
        ends = (spread(share * end, flat.shape) for end in (low, high))
        return jnp.clip(parts, *ends).reshape(flat.shape)

    def delta(clamped: jax.Array) -> jax.Array:
        q = rounded(blocks.flat.unflatten(clamped), fmt, frame.roles, path)
        return grid.flatten(q) - flat

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> Any:
        share = 1.0 - (1.0 - shortest) * i.astype(jnp.float32) / clips
        error = jnp.square(delta(clamp(jnp.full_like(high, share)))) * importance
        error = blocks.reduce(jnp.sum, error)
        better = error < best[0]
        return (
            jnp.where(better, error, best[0]),
            jnp.where(better, share, best[1]),
        )

    start = jnp.full_like(high, jnp.inf), jnp.ones_like(high)
    _, share = jax.lax.fori_loop(0, clips + 1, step, start)
    clamped = clamp(share)
    n = len(frame.stack)
    whole = output_error(_storage(grid, delta(flat)), stats, n)
    short = output_error(_storage(grid, delta(clamped)), stats, n)
    keep = (short < whole).reshape(*frame.stack, *(1,) * (a.ndim - n))
    return jnp.where(keep, _storage(grid, clamped), a)


def _storage(grid: Grid, flat: jax.Array) -> jax.Array:
    return grid.blocks.layout.to_storage(grid.blocks.flat.unflatten(flat))
