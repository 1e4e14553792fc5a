"""A single file of the fewest bytes: codes entropy coded, one checksum for all.

``magic[8] sha256[32] length[4] manifest bodies``: the checksum is of all that follows
it, the manifest is JSON behind zlib, and the bodies follow each other without padding.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.io import entropy
from jaxcompress.io._container import Arrays
from jaxcompress.io._errors import FileError
from jaxcompress.io._manifest import FORMAT, Manifest, malformed

MAGIC = b"jaxcomp\2"
VERSION = 2
_HEAD = len(MAGIC) + 32 + 4
_LARGEST = 2**28
"""Bytes of a manifest that is not damaged."""


def pack(
    structure: Any,
    arrays: Arrays,
    settings: dict[str, Any],
    coder: entropy.Coder,
) -> bytes:
    """The file's bytes.

    Args:
      structure: The tree, as `encode` gives it.
      arrays: Its arrays.
      settings: Recipe and metadata, for the manifest.
      coder: Of the components that are packed codes.
    """
    bits, bodies, entries = dict(_packed(structure)), [], {}
    for name, a in arrays.items():
        body, width = a.tobytes(), bits.get(name, 0)
        if width and a.size:
            coded = entropy.encode(unpack_codes(a, width), coder=coder)
            shorter = len(coded) < len(body)
            width, body = (width, coded) if shorter else (0, body)
        entries[name] = [a.dtype.name, list(a.shape), len(body), width]
        bodies.append(body)
    manifest = {"format": FORMAT, "version": VERSION, "tree": structure, **settings}
    text = json.dumps(
        {**manifest, "arrays": entries}, separators=(",", ":"), allow_nan=False
    )
    head = zlib.compress(text.encode(), 9)
    rest = len(head).to_bytes(4, "little") + head + b"".join(bodies)
    return MAGIC + hashlib.sha256(rest).digest() + rest


def unpack(path: Path, data: bytes) -> tuple[Manifest, Arrays]:
    """Manifest and arrays of a file.

    Raises:
      FileError: If it is damaged, or makes no sense.
    """
    rest = data[len(MAGIC) + 32 :]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : len(MAGIC) + 32]:
        raise FileError(f"{path}: it does not match its checksum; it is damaged.")
    with malformed(path):
        end = _HEAD + int.from_bytes(rest[:4], "little")
        manifest = json.loads(_inflated(data[_HEAD:end]))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise FileError(
                f"{path}: it has format version {manifest['version']}; this library "
                f"reads {VERSION} of such files. Update jaxcompress."
            )
        arrays = {}
        for name, (dtype, shape, size, width) in manifest["arrays"].items():
            begin, end = end, end + size
            try:
                arrays[name] = _array(data[begin:end], dtype, tuple(shape), width)
            except (ValueError, TypeError) as error:
                raise FileError(f"{path}: {name!r} is damaged: {error}") from error
    if end != len(data):
        raise FileError(f"{path}: {len(data) - end} bytes are left over at its end.")
    return manifest, arrays


def _inflated(data: bytes) -> bytes:
    """A manifest, unless it is larger than any is."""
    source = zlib.decompressobj()
    try:
        text = source.decompress(data, _LARGEST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not source.eof:
        raise ValueError("it is cut off, or larger than a manifest is")
    return text


def _array(body: bytes, dtype: str, shape: tuple[int, ...], width: int) -> np.ndarray:
    count = math.prod(shape)
    if width:
        codes = entropy.decode(body, most=count * 8 // width)
        a = pack_codes(codes, width, shape)
        body = a.tobytes()
    kind = jnp.dtype(dtype)
    if len(body) != count * kind.itemsize:
        raise ValueError(f"it has {len(body)} bytes, not those of {dtype}{list(shape)}")
    return np.frombuffer(body, kind).reshape(shape)


def _packed(node: Any) -> Iterator[tuple[str, int]]:
    """The arrays of a tree that are packed codes, and the bits of a code."""
    if isinstance(node, dict):
        if "array" in node and "bits" in node:
            yield node["array"], node["bits"]
        for inner in node.values():
            yield from _packed(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _packed(inner)


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """``uint8[..., n]`` codes of ``uint8[..., bytes]``, as many as fit in whole.

    What `kernels_pallas.packing.unpack` does, on the host.
    """
    if bits == 8:
        return words
    count = words.shape[-1] * 8 // bits
    stream = np.unpackbits(words, axis=-1, bitorder="little")[..., : count * bits]
    stream = stream.reshape(*words.shape[:-1], count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (stream * weights).sum(-1, dtype=np.uint8)


def pack_codes(codes: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `unpack_codes`, to words of this shape."""
    if bits == 8:
        return codes.reshape(shape)
    place = np.arange(bits, dtype=np.uint8)
    stream = (codes[..., None] >> place & 1).reshape(*codes.shape[:-1], -1)
    missing = shape[-1] * 8 - stream.shape[-1]
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])
    return np.packbits(stream, axis=-1, bitorder="little").reshape(shape)
