"""Positions of non-zeros as the numbers of zeros between them."""

from __future__ import annotations

import numpy as np

from jaxcompress.io._errors import FileError


def to_gaps(bits: np.ndarray, *, width: int) -> np.ndarray:
    """Gaps of a few bits; where a gap does not fit, a filler says so.

    Args:
      bits: ``uint8[n]``, zero or one.
      width: Bits of a symbol.

    Returns:
      ``uint16``: zeros before the next one, up to ``2**width - 2``; the filler
      ``2**width - 1`` stands for that many zeros without a one. Zeros behind the last
      one are not written.

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016, figure
      2. Differs: the filler needs no zero among the values.
    """
    step = 2**width - 1
    gaps = np.diff(np.flatnonzero(bits), prepend=-1) - 1
    fillers = gaps // step
    ends = np.cumsum(fillers + 1)
    out = np.full(int(ends[-1]) if len(ends) else 0, step, np.uint16)
    out[ends - 1] = gaps - fillers * step
    return out


def from_gaps(gaps: np.ndarray, *, width: int, count: int) -> np.ndarray:
    """Undo `to_gaps`: ``uint8[count]`` bits."""
    step = 2**width - 1
    filler = gaps == step
    places = np.cumsum(gaps.astype(np.int64) + ~filler) - 1
    places = places[~filler]
    if len(places) and places[-1] >= count:
        raise FileError("entropy.decode: a gap ends past the last position.")
    bits = np.zeros(count, np.uint8)
    bits[places] = 1
    return bits
