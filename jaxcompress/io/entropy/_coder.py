"""`encode` and `decode`: the shortest of several forms, behind a checksum."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np

from jaxcompress.io._errors import FileError
from jaxcompress.io.entropy._bytes import Reader, Writer, read_table, write_table
from jaxcompress.io.entropy._gaps import from_gaps, to_gaps
from jaxcompress.io.entropy._huffman import (
    code_lengths,
    decode_huffman,
    encode_huffman,
)
from jaxcompress.io.entropy._places import (
    MOST_STEPS,
    decode_places,
    encode_places,
    steps_of,
)
from jaxcompress.io.entropy._rans import decode_static, encode_static, frequencies

Coder = Literal["rans", "huffman"]
CODERS: tuple[Coder, ...] = get_args(Coder)

GAP_WIDTHS = range(3, 9)
"""Bits of a gap to try."""


def encode(symbols: np.ndarray, *, coder: Coder = "rans") -> bytes:
    """Small integers in about as many bits as they are surprising.

    Bits (symbols of which none is above 1) may be positions of non-zeros: they are also
    tried as gaps, and by ``"rans"`` each by what is known of its column (last axis),
    its row and the bits before it.

    Args:
      symbols: ``uint8[...]``.
      coder: ``"rans"``, asymmetric numeral systems; or ``"huffman"``, canonical
        Huffman codes.

    Returns:
      Bytes with all that `decode` needs, and a checksum; at most a few more than the
      symbols have.

    Raises:
      TypeError: If the symbols are not ``uint8``.
      ValueError: If the coder is not known.

    Examples:
      >>> data = encode(np.zeros((100, 100), np.uint8))
      >>> len(data) < 64, decode(data).shape
      (True, (100, 100))

    References:
      Duda, `Asymmetric numeral systems <https://arxiv.org/abs/1311.2540>`_, 2013;
      Giesen, `Interleaved entropy coders <https://arxiv.org/abs/1402.3392>`_, 2014. Han
      et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016, section 4.
    """
    if symbols.dtype != np.uint8:
        raise TypeError(f"entropy.encode: symbols must be uint8; got {symbols.dtype}.")
    if coder not in CODERS:
        raise ValueError(f"entropy.encode: coder must be in {CODERS}; got {coder!r}.")
    bodies = {i: form.write(symbols, coder) for i, form in enumerate(FORMS)}
    written = {i: body for i, body in bodies.items() if body is not None}
    number = min(written, key=lambda i: len(written[i]))
    out = Writer()
    out.number(number)
    out.number(symbols.ndim)
    for n in symbols.shape:
        out.number(n)
    out.raw(written[number])
    data = out.done()
    return zlib.crc32(data).to_bytes(4, "little") + data


def decode(data: bytes, *, most: int = 2**28) -> np.ndarray:
    """The symbols that `encode` was given.

    Args:
      data: What it returned.
      most: Symbols there may be; a few bytes can stand for any number.

    Returns:
      ``uint8[...]``, of their shape.

    Raises:
      FileError: If the data are cut off, damaged, or of a form that is not known, or
        hold too many symbols.
    """
    if int.from_bytes(data[:4], "little") != zlib.crc32(data[4:]) or len(data) < 6:
        raise FileError("entropy.decode: data do not match their checksum.")
    source = Reader(data[4:])
    number = source.number()
    if number >= len(FORMS):
        raise FileError(f"entropy.decode: form {number} is not known; update.")
    shape = tuple(source.number() for _ in range(min(source.number(), 64)))
    if math.prod(shape) > most:
        raise FileError(f"entropy.decode: {shape} symbols are more than most={most}.")
    with _malformed():
        return FORMS[number].read(source, shape).astype(np.uint8).reshape(shape)


@contextlib.contextmanager
def _malformed() -> Iterator[None]:
    """Errors of data whose checksum is right but which make no sense."""
    try:
        yield
    except FileError:
        raise
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        raise FileError(f"entropy.decode: data are malformed: {error!r}.") from error


class Form(NamedTuple):
    """A way to write symbols.

    Attributes:
      write: ``(symbols, coder) -> bytes``, or None where it is not for them.
      read: ``(reader, shape) -> symbols``, in any shape.
    """

    write: Callable[[np.ndarray, Coder], bytes | None]
    read: Callable[[Reader, tuple[int, ...]], np.ndarray]


def _write_plain(symbols: np.ndarray, coder: Coder) -> bytes:
    """Each in as many bits as the largest needs."""
    del coder
    out, flat = Writer(), symbols.reshape(-1)
    width = int(flat.max(initial=0)).bit_length()
    out.number(width)
    out.bits(flat, np.full(flat.size, width))
    return out.done()


def _read_plain(source: Reader, shape: tuple[int, ...]) -> np.ndarray:
    width = source.number()
    return source.bits(np.full(math.prod(shape), min(width, 8)))


def _write_coded(flat: np.ndarray, coder: Coder) -> bytes:
    """A table, and each symbol by its own frequency."""
    out = Writer()
    counts = np.bincount(flat, minlength=1)
    out.number(CODERS.index(coder))
    table = frequencies(counts) if coder == "rans" else code_lengths(counts)
    write_table(out, table)
    run = encode_static if coder == "rans" else encode_huffman
    out.raw(run(flat, table))
    return out.done()


def _read_coded(source: Reader, count: int) -> np.ndarray:
    coder = CODERS[source.number()]
    table = read_table(source)
    run = decode_static if coder == "rans" else decode_huffman
    return run(source.rest(), table, count)


def _write_symbols(symbols: np.ndarray, coder: Coder) -> bytes | None:
    if not symbols.size:
        return None
    return _write_coded(symbols.reshape(-1), coder)


def _read_symbols(source: Reader, shape: tuple[int, ...]) -> np.ndarray:
    return _read_coded(source, math.prod(shape))


def _write_gaps(symbols: np.ndarray, coder: Coder) -> bytes | None:
    """Positions of ones as gaps, of the width with the fewest surprises."""
    if symbols.max(initial=0) != 1:
        return None
    flat = symbols.reshape(-1)
    tried = {width: to_gaps(flat, width=width) for width in GAP_WIDTHS}
    width = min(tried, key=lambda width: _surprise(tried[width]))
    out = Writer()
    out.number(width)
    out.number(len(tried[width]))
    out.raw(_write_coded(tried[width], coder))
    return out.done()


def _surprise(symbols: np.ndarray) -> float:
    """Entropy in bits, and those of a table."""
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return 8 * len(counts) - float((counts * np.log2(counts / counts.sum())).sum())


def _read_gaps(source: Reader, shape: tuple[int, ...]) -> np.ndarray:
    width, count, size = source.number(), source.number(), math.prod(shape)
    if width not in GAP_WIDTHS or count > size:
        raise FileError("entropy.decode: gaps are damaged.")
    return from_gaps(_read_coded(source, count), width=width, count=size)


def _write_places(symbols: np.ndarray, coder: Coder) -> bytes | None:
    if coder != "rans" or symbols.max(initial=0) != 1 or not symbols.ndim:
        return None
    columns = symbols.shape[-1]
    if steps_of(symbols.size // columns, columns) > MOST_STEPS:
        return None
    out = Writer()
    out.number(int(symbols.sum(dtype=np.int64)))
    out.raw(encode_places(symbols.reshape(-1, columns)))
    return out.done()


def _read_places(source: Reader, shape: tuple[int, ...]) -> np.ndarray:
    ones, columns = source.number(), shape[-1]
    rows = math.prod(shape) // max(columns, 1)
    if steps_of(rows, columns) > MOST_STEPS:
        raise FileError("entropy.decode: too many places; they are damaged.")
    return decode_places(source.rest(), rows, columns, ones)


FORMS = (
    Form(_write_plain, _read_plain),
    Form(_write_symbols, _read_symbols),
    Form(_write_gaps, _read_gaps),
    Form(_write_places, _read_places),
)
"""By number in the data: those of an older file keep theirs."""
