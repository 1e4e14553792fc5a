"""One safetensors file: written by the library, read here and checked to the byte."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_safetensors

from jaxcompress.io._errors import FileError
from jaxcompress.leaf import nbytes

Arrays = dict[str, Any]

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
_NAMES = {np.dtype(dtype).name: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"


def pack(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes; dtypes that NumPy has no name for go as raw bytes."""
    plain = {name: _plain(a) for name, a in arrays.items()}
    return to_safetensors(plain, metadata=dict(metadata) if metadata else None)


def packed_bytes(arrays: Arrays, metadata: Mapping[str, str]) -> int:
    """Length of `pack(arrays, metadata)`, from shapes and dtypes alone."""
    empty = {name: np.empty(0, _dtype(a)) for name, a in arrays.items()}
    data = to_safetensors(empty)
    order = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    size = 0
    for name in order:
        a, end = arrays[name], size + nbytes(arrays[name])
        plain = a.dtype.name in _NAMES
        header[name] = {
            "dtype": _NAMES[_dtype(a).name],
            "shape": list(a.shape) if plain else [end - size],
            "data_offsets": [size, end],
        }
        size = end
    return 8 + -(-len(_text(header)) // 8) * 8 + size


def _dtype(a: Any) -> np.dtype:
    """The dtype an array has in the file."""
    return np.dtype(a.dtype if a.dtype.name in _NAMES else np.uint8)


def _plain(a: np.ndarray) -> np.ndarray:
    shape, a = a.shape, np.ascontiguousarray(a)
    if a.dtype.name in _NAMES:
        return a.reshape(shape)
    return np.frombuffer(a.tobytes(), np.uint8)


def _text(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def unpack(path: Path, data: bytes) -> tuple[Arrays, dict[str, str]]:
    """Arrays (raw, by name) and metadata of a file.

    Raises:
      FileError: If a byte is not where `pack` would have put it.
    """
    length = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 2 <= length <= len(data) - 8 or data[8:9] != b"{":
        raise FileError(
            f"{path}: not a file written by jaxcompress.io.save, or its beginning is "
            "damaged or cut off."
        )
    text, body = data[8 : 8 + length], data[8 + length :]
    try:
        header = json.loads(text)
        unpadded = text.rstrip(b" ")
        if _text(header) != unpadded or length != -(-len(unpadded) // 8) * 8:
            raise ValueError("it is not as io.save writes it")
        metadata = header.pop(_METADATA, {})
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("metadata must be text")
        arrays, end = {}, 0
        for name, entry in header.items():
            arrays[name] = _entry(entry, end, body)
            end += arrays[name].nbytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: its header is damaged: {error}.") from error
    if end != len(body):
        raise FileError(f"{path}: {len(body) - end} bytes are left over at its end.")
    return arrays, metadata


def _entry(entry: dict[str, Any], begin: int, body: bytes) -> np.ndarray:
    """One array, which must begin where the last one ended."""
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), entry["shape"]
    end = begin + math.prod(shape) * dtype.itemsize
    offsets = entry["data_offsets"]
    if (
        offsets != [begin, end]
        or end > len(body)
        or set(entry)
        != {
            "dtype",
            "shape",
            "data_offsets",
        }
    ):
        raise ValueError(f"an array at {offsets} belongs at {[begin, end]}, cut off")
    return np.frombuffer(body[begin:end], dtype).reshape(shape)
