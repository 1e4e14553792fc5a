"""Histograms with fixed logarithmic bins: adding two of them merges them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_LOWEST, _HIGHEST, _BITS = -32, 24, 4
PER_OCTAVE = 1 << _BITS
"""Bins of equal width between a power of two and the next."""

SIDE = (_HIGHEST - _LOWEST) * PER_OCTAVE
BINS = 2 * SIDE
"""Bins: of negative numbers from the largest magnitude, then of the others."""

SAMPLE = 1 << 15
"""Entries of an array that enter its histogram; of more, a sample of rows does."""


def histogram_edges() -> np.ndarray:
    """``float64[BINS + 1]`` ascending edges.

    Beside zero the bins reach from ``2^-32`` to ``2^24``; what lies below belongs to
    the two bins at zero, what lies above to the last ones.

    Examples:
      >>> e = histogram_edges()
      >>> float(e[SIDE]), float(e[SIDE + 32 * PER_OCTAVE + 1]), float(e[-1])
      (0.0, 1.0625, 16777216.0)
    """
    octave = np.arange(SIDE + 1) // PER_OCTAVE + _LOWEST
    part = np.arange(SIDE + 1) % PER_OCTAVE / PER_OCTAVE
    positive = np.ldexp(1.0 + part, octave)
    positive[0] = 0.0
    return np.concatenate([-positive[:0:-1], positive])


def bin_of(x: jax.Array) -> jax.Array:
    """Index of the bin of each number: the leading bits of its float32."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    leading = (bits & 0x7FFFFFFF) >> (23 - _BITS)
    place = jnp.clip(leading - ((127 + _LOWEST) << _BITS), 0, SIDE - 1)
    return jnp.where(x < 0, SIDE - 1 - place, SIDE + place)


def histogram(x: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Counts of the entries of `x`, or of a sample of its rows.

    Args:
      x: ``float[*stack, rows, K]``.
      weights: ``[*stack, rows]`` of 0 and 1: rows to leave out are 0.

    Returns:
      ``float32[*stack, BINS]`` counts. Of more than `SAMPLE` entries, the rows are a
      fixed sample, spread evenly and in step with no period of the data.
    """
    *stack, rows, k = x.shape
    kept = sample_rows(rows, max(1, SAMPLE // max(k, 1) // max(math.prod(stack), 1)))
    if kept is not None:
        x = x[..., kept, :]
        weights = None if weights is None else weights[..., kept]
    entries = math.prod(stack)
    place = bin_of(x).reshape(entries, -1)
    place = place + BINS * jnp.arange(entries, dtype=jnp.int32)[:, None]
    each: jax.Array | float = 1.0
    if weights is not None:
        each = jnp.broadcast_to(weights[..., None], x.shape).reshape(entries, -1)
    counts = jnp.zeros(entries * BINS, jnp.float32).at[place].add(each)
    return counts.reshape(*stack, BINS)


def sample_rows(rows: int, wanted: int) -> np.ndarray | None:
    """Indices of so many rows, or None for all of them.

    Multiples of a step near ``rows / golden ratio`` that has no divisor in common
    with ``rows``: all different, evenly spread, and of every phase of a period.

    Examples:
      >>> sample_rows(12, 4).tolist()
      [0, 7, 2, 9]
    """
    if rows <= wanted:
        return None
    step = next(
        s
        for s in range(max(1, round(rows * 0.618)), rows + 1)
        if math.gcd(s, rows) == 1
    )
    return np.arange(wanted) * step % rows
