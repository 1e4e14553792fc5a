"""Bits of a matrix, each by how often its column had a one in the rows above.

Positions of non-zeros: inputs that matter to no output cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxcompress.io.entropy._rans import (
    PRECISION,
    Decoder,
    encode_steps,
    lanes_for,
)

PRIOR = 4
"""Rows that the share of ones of the whole matrix counts for."""


class Columns:
    """What is known of the columns so far."""

    def __init__(self, columns: int, ones: int, size: int) -> None:
        """Nothing but the share of ones, in 2^16ths."""
        self.share = min(max((ones << 16) // max(size, 1), 1), 2**16 - 1)
        self.ones = np.zeros(columns, np.int64)
        self.rows = np.zeros(columns, np.int64)

    def frequency(self, columns: np.ndarray) -> np.ndarray:
        """Of a one in each of these columns, out of ``2**PRECISION``."""
        seen = (self.ones[columns] << 16) + PRIOR * self.share
        ratio = (seen >> (16 - PRECISION)) // (self.rows[columns] + PRIOR)
        return np.minimum(np.maximum(ratio, 1), 2**PRECISION - 1)

    def learn(self, columns: np.ndarray, bits: np.ndarray) -> None:
        """Count bits, at most one a column."""
        self.ones[columns] += bits
        self.rows[columns] += 1


def _parts(rows: int, columns: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Places of the symbols of each step, and their columns."""
    size = rows * columns
    lanes = lanes_for(size, columns)
    every = np.arange(columns + lanes) % max(columns, 1)
    for i in range(0, size, lanes):
        part = slice(i, min(i + lanes, size))
        start = i % columns
        yield part, every[start : start + part.stop - i]


def _interval(bits: np.ndarray, one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First slot and frequency of each bit: ones first."""
    return np.where(bits, 0, one), np.where(bits, one, 2**PRECISION - one)


def encode_columns(bits: np.ndarray) -> bytes:
    """Bits ``uint8[rows, columns]``; the decoder must be told their shape and sum."""
    rows, columns = bits.shape
    known = Columns(columns, int(bits.sum()), bits.size)
    flat, steps = bits.reshape(-1).astype(np.int64), []
    for part, place in _parts(rows, columns):
        first, frequency = _interval(flat[part], known.frequency(place))
        steps.append((first.astype(np.uint16), frequency.astype(np.uint16)))
        known.learn(place, flat[part])
    return encode_steps(reversed(steps), lanes_for(bits.size, columns))


def decode_columns(data: bytes, rows: int, columns: int, ones: int) -> np.ndarray:
    """Undo `encode_columns`."""
    size = rows * columns
    decoder = Decoder(data, lanes_for(size, columns))
    known = Columns(columns, ones, size)
    out = np.empty(size, np.uint8)
    for part, place in _parts(rows, columns):
        one = known.frequency(place)
        slot = decoder.slots(len(place))
        bits = (slot < one).astype(np.int64)
        first, frequency = _interval(bits, one)
        decoder.advance(frequency, slot - first)
        known.learn(place, bits)
        out[part] = bits
    decoder.finish()
    return out.reshape(rows, columns)
