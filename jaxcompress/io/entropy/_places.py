"""Bits of a matrix, each by what is known of its column, its row and its neighbours.

Positions of non-zeros: inputs that matter to no output cost next to nothing, and what
lies close together costs less. All arithmetic is in integers, so that a file decodes
everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxcompress.io.entropy._rans import (
    PRECISION,
    STEPS,
    Decoder,
    encode_steps,
)

PRIOR = 4
"""Rows (or columns) that the share of ones of the whole matrix counts for."""

HISTORY = 5
"""Bits to the left that are looked at together."""

MOST_STEPS = 2**18
"""Steps of a matrix that is worth the time."""

_UNIT = 256
"""A logit of one."""

_TOP = 8 * _UNIT

_PROBABILITY = (np.arange(4096) + 0.5) / 4096
LOGIT = np.rint(_UNIT * np.log(_PROBABILITY / (1 - _PROBABILITY))).astype(np.int64)
"""Of a probability in 4096ths."""

_LOGITS = np.arange(-_TOP, _TOP + 1) / _UNIT
ODDS = np.rint(2**PRECISION / (1 + np.exp(-_LOGITS))).astype(np.int64)
"""Of a logit from -8 on, out of ``2**PRECISION``; no less than 1 from either end."""


def _logit(ones: Any, count: Any) -> Any:
    """Of a share of ones, both in 2^16ths."""
    return LOGIT[np.minimum((ones << 12) // count, 4095)]


class Places:
    """What is known so far, while some rows at a time are read from left to right.

    Three logits are mixed by weights that learn: the column's, and by how much the row
    and the history of the bits to the left differ from what is usual.
    """

    def __init__(self, columns: int, ones: int, size: int) -> None:
        """Nothing but the share of ones, in 2^16ths."""
        self.share = np.int64(min(max((ones << 16) // max(size, 1), 1), 2**16 - 1))
        self.columns = np.zeros(columns, np.int64)
        self.rows = 0
        self.history = np.zeros((2, 2**HISTORY), np.int64)
        self.weights = np.array([[2**16], [2**15], [2**15]], np.int64)
        self.begin(0)

    def begin(self, rows: int) -> None:
        """Go to the next rows, so many at a time."""
        self.seen = np.zeros(rows, np.int64)
        self.expected = PRIOR * self.share
        self.left = np.zeros(rows, np.int64)
        self.at = 0

    def predict(self) -> np.ndarray:
        """Frequencies of ones in the next column, out of ``2**PRECISION``."""
        prior = PRIOR * self.share
        self.column = ((self.columns[self.at] << 16) + prior) // (self.rows + PRIOR)
        whole = np.int64(self.at + PRIOR) << 16
        usual = _logit(self.expected, whole)
        history = (self.history[1] << 16) + prior
        known = _logit(history, (self.history.sum(0) + PRIOR) << 16)
        self.inputs = np.stack(
            [
                np.broadcast_to(_logit(self.column, np.int64(2**16)), self.left.shape),
                _logit((self.seen << 16) + prior, whole) - usual,
                known[self.left] - _logit(self.share, np.int64(2**16)),
            ]
        )
        mixed = (self.weights * self.inputs).sum(0) >> 16
        self.odds = ODDS[np.clip(mixed, -_TOP, _TOP) + _TOP]
        return self.odds

    def learn(self, bits: np.ndarray) -> None:
        """Go past the bits of a column."""
        error = (bits << PRECISION) - self.odds
        change = (self.inputs * error).sum(1, keepdims=True)
        self.weights += change * min(len(bits), 16) // len(bits) >> 15
        self.history[1] += np.bincount(self.left[bits == 1], minlength=2**HISTORY)
        self.history[0] += np.bincount(self.left[bits == 0], minlength=2**HISTORY)
        self.left = (self.left << 1 | bits) & (2**HISTORY - 1)
        self.seen += bits
        self.expected += self.column
        self.columns[self.at] += int(bits.sum())
        self.at += 1
        if self.at == len(self.columns):
            self.rows += len(bits)


def rows_at_once(rows: int, columns: int) -> int:
    """Lanes: enough that the steps are few, and their states small beside the words."""
    return max(1, min(rows, -(-rows * columns // STEPS)))


def steps_of(rows: int, columns: int) -> int:
    """Steps that a matrix takes."""
    return -(-rows // rows_at_once(rows, columns)) * columns if rows else 0


def _groups(rows: int, columns: int) -> Iterator[slice]:
    """The rows that are read together."""
    lanes = rows_at_once(rows, columns)
    return (slice(i, min(i + lanes, rows)) for i in range(0, rows, lanes))


def _interval(bits: np.ndarray, one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First slot and frequency of each bit: ones first."""
    return np.where(bits, 0, one), np.where(bits, one, 2**PRECISION - one)


def encode_places(bits: np.ndarray) -> bytes:
    """Bits ``uint8[rows, columns]``; the decoder must be told their shape and sum."""
    rows, columns = bits.shape
    known, steps = Places(columns, int(bits.sum()), bits.size), []
    for group in _groups(rows, columns):
        part = bits[group].astype(np.int64)
        known.begin(len(part))
        for column in part.T:
            first, frequency = _interval(column, known.predict())
            steps.append((first.astype(np.uint16), frequency.astype(np.uint16)))
            known.learn(column)
    return encode_steps(reversed(steps), rows_at_once(rows, columns))


def decode_places(data: bytes, rows: int, columns: int, ones: int) -> np.ndarray:
    """Undo `encode_places`."""
    decoder = Decoder(data, rows_at_once(rows, columns))
    known = Places(columns, ones, rows * columns)
    out = np.empty((rows, columns), np.uint8)
    for group in _groups(rows, columns):
        count = group.stop - group.start
        known.begin(count)
        for c in range(columns):
            one = known.predict()
            slot = decoder.slots(count)
            bits = (slot < one).astype(np.int64)
            first, frequency = _interval(bits, one)
            decoder.advance(frequency, slot - first)
            known.learn(bits)
            out[group, c] = bits
    decoder.finish()
    return out
