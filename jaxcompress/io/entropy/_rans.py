"""Asymmetric numeral systems: a fraction of a bit for what is likely.

Several lanes code every n-th symbol each, so that a step is a few NumPy operations on
all of them; they share one stream of 16-bit words.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxcompress.io._errors import FileError

PRECISION = 14
"""Bits of a probability."""

LOW = 2**16
"""A state is at least this, and below 2^32."""

STEPS = 2**14
"""Symbols of a lane, at most: enough that the four bytes of its state do not count."""


def lanes_for(count: int, most: int = 2**31) -> int:
    """Lanes for so many symbols."""
    return max(1, min(most, -(-count // STEPS)))


def encode_steps(steps: Iterable[tuple[np.ndarray, np.ndarray]], lanes: int) -> bytes:
    """States and words of symbols that come in reverse.

    Args:
      steps: For each step, from the last: first slots and frequencies of up to `lanes`
        symbols, out of ``2**PRECISION``.
      lanes: How many symbols a step has at most.
    """
    state = np.full(lanes, LOW, np.int64)
    words: list[np.ndarray] = []
    for first, frequency in steps:
        x = state[: len(first)]
        frequency = frequency.astype(np.int64)
        full = x >= frequency << (32 - PRECISION)
        if full.any():
            words.append(x[full][::-1] & 0xFFFF)
            x[full] >>= 16
        whole, rest = np.divmod(x, frequency)
        x[:] = (whole << PRECISION) + rest + first
    stream = np.concatenate([np.zeros(0, np.int64), *words])[::-1]
    return state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


class Decoder:
    """Reads what `encode_steps` wrote, from the first step on."""

    def __init__(self, data: bytes, lanes: int) -> None:
        """From the states and words of so many lanes."""
        if len(data) < 4 * lanes or len(data) % 2:
            raise FileError("entropy.decode: data are cut off.")
        self.state = np.frombuffer(data[: 4 * lanes], "<u4").astype(np.int64)
        self.words = np.frombuffer(data[4 * lanes :], "<u2").astype(np.int64)
        self.place = 0

    def slots(self, count: int) -> np.ndarray:
        """Where in the ``2**PRECISION`` slots the next `count` symbols lie."""
        return self.state[:count] & (2**PRECISION - 1)

    def advance(self, frequency: np.ndarray, inside: np.ndarray) -> None:
        """Go past symbols of these frequencies, whose slots lie so far inside."""
        x = self.state[: len(frequency)]
        x >>= PRECISION
        x *= frequency
        x += inside
        empty = x < LOW
        end = self.place + int(np.count_nonzero(empty))
        if end > len(self.words):
            raise FileError("entropy.decode: data end too early.")
        if end > self.place:
            x[empty] = x[empty] << 16 | self.words[self.place : end]
            self.place = end

    def finish(self) -> None:
        """Refuse what is left over, or a state that no encoder starts from."""
        if self.place != len(self.words) or (self.state != LOW).any():
            raise FileError("entropy.decode: data do not end where they should.")


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts scaled to a sum of ``2**PRECISION``, at least 1 where there is one."""
    total, room = counts.sum(), 2**PRECISION
    scaled = np.maximum(counts * room // max(total, 1), counts > 0)
    while (excess := int(scaled.sum()) - room) != 0:
        # What the largest give or get costs least.
        order = np.argsort(-scaled, kind="stable")
        n = max(1, min(abs(excess), int((scaled > 1).sum())))
        scaled[order[:n]] -= np.sign(excess)
    return scaled


def encode_static(symbols: np.ndarray, frequency: np.ndarray) -> bytes:
    """Symbols of fixed frequencies."""
    lanes = lanes_for(len(symbols))
    first = np.cumsum(frequency) - frequency
    parts = (symbols[i : i + lanes] for i in reversed(range(0, len(symbols), lanes)))
    return encode_steps(((first[p], frequency[p]) for p in parts), lanes)


def decode_static(data: bytes, frequency: np.ndarray, count: int) -> np.ndarray:
    """Undo `encode_static`."""
    if int(frequency.sum()) != 2**PRECISION:
        raise FileError("entropy.decode: frequencies do not add up; they are damaged.")
    lanes = lanes_for(count)
    decoder = Decoder(data, lanes)
    first = np.cumsum(frequency) - frequency
    symbol_at = np.repeat(np.arange(len(frequency), dtype=np.uint16), frequency)
    frequency_at = frequency[symbol_at]
    inside = np.arange(2**PRECISION) - first[symbol_at]
    slots = np.empty(count, np.uint16)
    for i in range(0, count, lanes):
        slot = decoder.slots(min(lanes, count - i))
        slots[i : i + lanes] = slot
        decoder.advance(frequency_at[slot], inside[slot])
    decoder.finish()
    return symbol_at[slots]
