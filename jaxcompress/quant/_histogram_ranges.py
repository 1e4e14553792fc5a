"""Ranges read off one histogram of `Statistics`: percentile, error, divergence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.lift import histogram_edges
from jaxcompress.quant._activations import encode_activations
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._range_search import Ends, least_error, ratios
from jaxcompress.quant._ranges import MSE

_POINTS = 16  # That stand for the entries of one bin.
_EMPTY = 1e-9  # What counts for a bin that only the exact distribution fills.


def static_grid(
    low: jax.Array, high: jax.Array, element: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of a range that includes zero; scale 0 of an empty one."""
    if not isinstance(element, Integer) or element.symmetric:
        return jnp.maximum(high, -low) / element.largest, None
    scale = (high - low) / (element.high - element.low)
    zero = element.low - jnp.round(low / jnp.where(scale > 0, scale, 1.0))
    return scale, jnp.clip(zero, element.low, element.high)


def percentile_range(
    counts: jax.Array, low: jax.Array, high: jax.Array, percent: float, element: Any
) -> tuple[jax.Array, jax.Array]:
    """Ends that so many percent lie within: of magnitudes, or of each side alone."""
    if isinstance(element, Integer) and not element.symmetric:
        starts, stops = _bins(low, high)
        ends = [_quantile(counts, starts, stops, p) for p in (100 - percent, percent)]
        return jnp.minimum(ends[0], 0.0), jnp.maximum(ends[1], 0.0)
    magnitudes, starts, stops = _magnitudes(counts, low, high)
    cut = _quantile(magnitudes, starts, stops, percent)
    return jnp.maximum(low, -cut), jnp.minimum(high, cut)


def least_error_range(
    counts: jax.Array,
    low: jax.Array,
    high: jax.Array,
    entries: jax.Array,
    search: MSE,
    element: Any,
) -> tuple[jax.Array, jax.Array]:
    """Ends of least squared error, the entries of a bin spread evenly in it.

    Of a sample, the lowest and highest of all `entries` count beside it, for the
    sampled part of an entry each.
    """
    starts, stops = (a[:, None] for a in _bins(low, high))
    place = (np.arange(_POINTS, dtype=np.float32) + np.float32(0.5)) / _POINTS
    x = starts + (stops - starts) * place[None]
    seen = counts.sum() / jnp.maximum(entries, 1.0)
    seen = jnp.where(seen < 1, seen, 0.0)

    def ends(part: Ends) -> tuple[jax.Array, jax.Array]:
        return low * (part.high if part.low is None else part.low), high * part.high

    def error(part: Ends) -> jax.Array:
        scale, zero = static_grid(*ends(part), element)

        def square(x: jax.Array) -> jax.Array:
            codes = encode_activations(x, scale, zero, element)
            return jnp.square(x - (codes - (0.0 if zero is None else zero)) * scale)

        extremes = square(low) + square(high)
        return (counts * square(x).mean(1)).sum() + seen * extremes

    one = jnp.ones_like(high)
    two_ends = isinstance(element, Integer) and not element.symmetric
    ones = Ends(high=one, low=one if two_ends else None)
    return ends(least_error(error, ones, ratios(search, powers_of_two=False)))


def least_divergence_range(
    counts: jax.Array, low: jax.Array, high: jax.Array, bins: int, levels: int
) -> tuple[jax.Array, jax.Array]:
    """Ends at the magnitude of least divergence; see `entropy`."""
    h = equal_bins(counts, low, high, bins)
    index = jnp.arange(bins, dtype=jnp.int32)

    def divergence(cut: jax.Array) -> jax.Array:
        """Of the histogram cut behind its first `cut` bins."""
        kept = jnp.where(index < cut, h, 0.0)
        beyond = h.sum() - kept.sum()
        p = kept + jnp.where(index == cut - 1, jnp.maximum(beyond, 0.0), 0.0)
        filled = (p > 0).astype(jnp.float32)
        level = jnp.minimum(index * levels // cut, levels - 1)
        total, number = (
            jax.ops.segment_sum(a, level, num_segments=levels) for a in (kept, filled)
        )
        q = filled * (total / jnp.maximum(number, 1.0))[level]
        p = p / jnp.maximum(p.sum(), _EMPTY)
        q = jnp.maximum(q / jnp.maximum(q.sum(), _EMPTY), _EMPTY)
        return (p * jnp.log(jnp.where(p > 0, p, q) / q)).sum()

    def step(cut: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
        least, best = carry
        d = divergence(cut)
        return jnp.minimum(d, least), jnp.where(d < least, cut, best)

    start = (jnp.float32(np.finfo(np.float32).max), jnp.int32(bins))
    best = jax.lax.fori_loop(levels, bins + 1, step, start)[1]
    cut = (best.astype(jnp.float32) + 0.5) * (jnp.maximum(high, -low) / bins)
    return jnp.maximum(low, -cut), jnp.minimum(high, cut)


def equal_bins(
    counts: jax.Array, low: jax.Array, high: jax.Array, bins: int
) -> jax.Array:
    """Counts of magnitudes in equal bins, those of a logarithmic bin spread evenly."""
    magnitudes, starts, stops = _magnitudes(counts, low, high)
    # Summed from above: the tail, whose counts are small, keeps its precision.
    above = jnp.cumsum(magnitudes[::-1])[::-1]
    edge = jnp.maximum(high, -low) * (jnp.arange(bins + 1, dtype=jnp.float32) / bins)
    of = jnp.searchsorted(starts, edge, side="right") - 1
    width = stops[of] - starts[of]
    part = (stops[of] - edge) / jnp.where(width > 0, width, 1.0)
    beyond = above[of] - magnitudes[of] * (1.0 - jnp.clip(part, 0.0, 1.0))
    return jnp.maximum(beyond[:-1] - beyond[1:].at[-1].set(0.0), 0.0)


def _bins(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where each bin starts and stops, within the range seen."""
    edges = jnp.asarray(histogram_edges(), jnp.float32)
    return jnp.clip(edges[:-1], low, high), jnp.clip(edges[1:], low, high)


def _magnitudes(
    counts: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Counts of magnitudes, and where their bins start and stop."""
    side = counts.shape[-1] // 2
    top = jnp.maximum(high, -low)
    starts, stops = _bins(jnp.zeros_like(top), top)
    return counts[side:] + counts[:side][::-1], starts[side:], stops[side:]


def _quantile(
    counts: jax.Array, starts: jax.Array, stops: jax.Array, percent: float
) -> jax.Array:
    """The number below which so many percent lie, linear within a bin."""
    below = jnp.cumsum(counts)
    target = below[-1] * (percent / 100)
    i = jnp.minimum(jnp.searchsorted(below, target), counts.shape[-1] - 1)
    count = counts[i]
    part = (target - (below[i] - count)) / jnp.maximum(count, 1.0)
    return starts[i] + (stops[i] - starts[i]) * jnp.clip(part, 0.0, 1.0)
