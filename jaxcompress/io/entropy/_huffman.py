"""Canonical Huffman codes: a whole number of bits a symbol."""

from __future__ import annotations

import heapq
import itertools

import numpy as np

from jaxcompress.io._errors import FileError
from jaxcompress.io.entropy._bytes import spread_bits

LONGEST = 16


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of each symbol's code, 0 where the count is.

    Args:
      counts: ``int[symbols]``.

    Returns:
      ``int64[symbols]``, of least weighted sum where none exceeds 16; else of counts
      halved until none does.

    References:
      Huffman, `A Method for the Construction of Minimum-Redundancy Codes
      <https://doi.org/10.1109/JRPROC.1952.273898>`_, 1952.
    """
    counts = counts.astype(np.int64)
    while True:
        lengths = _lengths(counts)
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        counts = np.where(counts > 0, np.maximum(counts >> 1, 1), 0)


def _lengths(counts: np.ndarray) -> np.ndarray:
    lengths = np.zeros(len(counts), np.int64)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        lengths[present] = 1
        return lengths
    number = itertools.count()
    heap = [(int(counts[s]), next(number), [s]) for s in present]
    heapq.heapify(heap)
    while len(heap) > 1:
        a, _, left = heapq.heappop(heap)
        b, _, right = heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (a + b, next(number), left + right))
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """Codes of these lengths: the shorter first, of equals the lower symbol."""
    codes = np.zeros(len(lengths), np.int64)
    code = last = 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            code <<= length - last
            codes[symbol], last = code, length
            code += 1
    return codes


def encode_huffman(symbols: np.ndarray, lengths: np.ndarray) -> bytes:
    """Codes one after the other, zeros to the end of the last byte."""
    sizes = lengths[symbols]
    return np.packbits(spread_bits(canonical_codes(lengths)[symbols], sizes)).tobytes()


def decode_huffman(data: bytes, lengths: np.ndarray, count: int) -> np.ndarray:
    """Undo `encode_huffman`."""
    if not count:
        return np.zeros(0, np.uint16)
    present = np.flatnonzero(lengths)
    if (0.5 ** lengths[present]).sum() > 1 or not len(present):
        raise FileError("entropy.decode: no code has such lengths; they are damaged.")
    longest = int(lengths.max())
    window = _windows(data, longest)
    end = len(window)
    symbol_at, length_at = _first_symbols(lengths, longest)
    after = (np.arange(end) + length_at[window]).tolist()
    place, places = 0, []
    for _ in range(count):
        if place >= end:
            raise FileError("entropy.decode: data end too early.")
        places.append(place)
        place = after[place]
    if place > end or end - place >= 8:
        raise FileError("entropy.decode: data do not end where they should.")
    return symbol_at[window[places]].astype(np.uint16)


def _windows(data: bytes, size: int) -> np.ndarray:
    """From every bit on, the next `size` bits, up to 16, as a number."""
    octets = np.frombuffer(data + b"\0\0", np.uint8).astype(np.uint32)
    three = octets[:-2] << 16 | octets[1:-1] << 8 | octets[2:]
    shift = 24 - size - np.arange(8, dtype=np.uint32)
    return (three[:, None] >> shift & (2**size - 1)).reshape(-1)


def _first_symbols(lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """For every `longest` bits: which symbol they begin with, and its length."""
    codes = canonical_codes(lengths)
    symbol = np.zeros(1 << longest, np.int64)
    length = np.full(1 << longest, longest)  # What no code begins with ends too late.
    for s in np.flatnonzero(lengths):
        free = longest - int(lengths[s])
        part = slice(int(codes[s]) << free, (int(codes[s]) + 1) << free)
        symbol[part], length[part] = s, lengths[s]
    return symbol, length
