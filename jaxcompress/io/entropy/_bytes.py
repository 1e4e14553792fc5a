"""Numbers and bits as bytes: what all coders write their headers with."""

from __future__ import annotations

import numpy as np

from jaxcompress.io._errors import FileError


class Writer:
    """Bytes, from their beginning."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.parts: list[bytes] = []

    def number(self, value: int) -> None:
        """A number of any size: seven bits a byte, the lowest first."""
        while value >= 128:
            self.parts.append(bytes([value & 127 | 128]))
            value >>= 7
        self.parts.append(bytes([value]))

    def bits(self, values: np.ndarray, sizes: np.ndarray) -> None:
        """``values[i]`` in ``sizes[i]`` bits, the highest first; zeros to a byte."""
        self.parts.append(np.packbits(spread_bits(values, sizes)).tobytes())

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.parts.append(data)

    def done(self) -> bytes:
        """All of it."""
        return b"".join(self.parts)


class Reader:
    """What a `Writer` wrote, from its beginning."""

    def __init__(self, data: bytes) -> None:
        """Of these bytes."""
        self.data = data
        self.place = 0

    def number(self) -> int:
        """Undo `Writer.number`."""
        value = shift = 0
        while True:
            byte = self.raw(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise FileError("entropy.decode: a number has no end; it is damaged.")

    def bits(self, sizes: np.ndarray) -> np.ndarray:
        """Undo `Writer.bits`."""
        total = int(sizes.sum())
        data = np.frombuffer(self.raw(-(-total // 8)), np.uint8)
        return gathered_bits(np.unpackbits(data), np.cumsum(sizes) - sizes, sizes)

    def raw(self, count: int) -> bytes:
        """So many bytes."""
        end = self.place + count
        if end > len(self.data):
            raise FileError("entropy.decode: data are cut off.")
        part, self.place = self.data[self.place : end], end
        return part

    def rest(self) -> bytes:
        """All that is left."""
        return self.raw(len(self.data) - self.place)


def spread_bits(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``uint8`` bits of numbers one after the other, the highest of each first."""
    starts = np.cumsum(sizes) - sizes
    bits = np.zeros(int(sizes.sum()), np.uint8)
    for n in range(int(sizes.max(initial=0))):
        wide = sizes > n
        shift = sizes[wide] - 1 - n
        bits[starts[wide] + n] = values[wide] >> shift & 1
    return bits


def gathered_bits(
    bits: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """The numbers of ``sizes[i]`` bits that begin at ``starts[i]``."""
    values = np.zeros(len(starts), np.int64)
    for n in range(int(sizes.max(initial=0))):
        wide = sizes > n
        values[wide] = values[wide] << 1 | bits[starts[wide] + n]
    return values


def write_table(out: Writer, table: np.ndarray) -> None:
    """Numbers below 2^16: the size of each in bits, then its bits but for the first."""
    sizes = bit_lengths(table)
    out.number(len(table))
    out.number(int(sizes.max(initial=0)))
    width = np.full(len(table), int(sizes.max(initial=0)).bit_length())
    out.bits(sizes, width)
    rest = np.maximum(sizes - 1, 0)
    out.bits(table - np.where(sizes > 0, 1 << rest, 0), rest)


def read_table(data: Reader) -> np.ndarray:
    """Undo `write_table`."""
    count, largest = data.number(), data.number()
    if count > 2**16 or largest > 16:
        raise FileError(f"entropy.decode: a table of {count} numbers; it is damaged.")
    sizes = data.bits(np.full(count, largest.bit_length()))
    rest = np.maximum(sizes - 1, 0)
    return data.bits(rest) + np.where(sizes > 0, 1 << rest, 0)


def bit_lengths(values: np.ndarray) -> np.ndarray:
    """``int.bit_length`` of each."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
