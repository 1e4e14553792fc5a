"""Save and load: safetensors and a manifest, checked to the byte, written atomically.

A file is a safetensors file whose metadata holds the manifest: format version, tree
structure, method of each leaf, recipe, and the SHA-256 of every array. The manifest's
own SHA-256, over everything before the arrays, closes the chain, so that no byte of
the file can change unseen. A tree above `max_shard_bytes` becomes a directory of such
files, with the manifest in ``manifest.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as to_safetensors

from jaxcompress.io._errors import FileError
from jaxcompress.io._tree import Arrays, decode, encode, encode_static
from jaxcompress.progress import track

FORMAT = "jaxcompress"
VERSION = 1
_MANIFEST = "manifest.json"

_PathLike = str | os.PathLike[str]


def save(
    path: _PathLike,
    tree: Any,
    *,
    recipe: Any = None,
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a parameter pytree, compressed leaves included.

    The file appears whole or not at all: it is written under a temporary name, forced
    to disk and renamed, so that a crash or a full disk leaves an older file intact.

    Args:
      path: File to write, by convention ``*.jc``; a directory if the arrays exceed
        `max_shard_bytes`.
      tree: Dicts, lists, tuples, `FrozenDict`, `nnx.State` (its variables come back
        as `nnx.Param`), arrays, numbers, strings, None and compressed leaves.
      recipe: Numbers, strings, tuples and settings that say how it was made.
      metadata: Free text entries.
      overwrite: Replace an existing file.
      max_shard_bytes: Largest single file.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is false.
      TypeError: If the tree holds what files cannot; nothing is written.
      OSError: If the disk is full or not writable; an older file survives.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/m.jc", {"w": jnp.ones(2)})
      ...     load(f"{folder}/m.jc")
      {'w': Array([1., 1.], dtype=float32)}
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"io.save: {path} exists; pass overwrite=True to replace it."
        )
    structure, arrays = encode(tree)
    manifest = _manifest(structure, arrays, recipe, metadata)
    if sum(a.nbytes for a in arrays.values()) <= max_shard_bytes:
        with _atomic(path) as temporary:
            _write(temporary, _single_file(manifest, arrays))
        return
    _save_directory(path, manifest, arrays, max_shard_bytes)


def _manifest(
    structure: Any, arrays: Arrays, recipe: Any, metadata: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "tree": structure,
        "recipe": encode_static(recipe, "recipe"),
        "metadata": dict(metadata or {}),
        "arrays": {name: _describe(a) for name, a in arrays.items()},
    }


def _describe(a: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(a).tobytes() if isinstance(a, np.ndarray) else b""
    return {
        "dtype": a.dtype.name,
        "shape": list(a.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _single_file(manifest: dict[str, Any], arrays: Arrays) -> bytes:
    text = _sealed(manifest)
    return to_safetensors(_as_bytes(arrays), metadata={FORMAT: text})


def _as_bytes(arrays: Arrays) -> Arrays:
    """Arrays as safetensors holds them: dtypes it has no name for as raw bytes."""
    return {name: _plain(a) for name, a in arrays.items()}


def _plain(a: np.ndarray) -> np.ndarray:
    shape, a = a.shape, np.ascontiguousarray(a)
    return (
        a.reshape(shape) if _is_plain(a.dtype) else np.frombuffer(a.tobytes(), np.uint8)
    )


def _is_plain(dtype: np.dtype) -> bool:
    return dtype.name in _NAMES


def _sealed(manifest: dict[str, Any]) -> str:
    """The manifest behind its own checksum."""
    body = _compact(manifest)
    return f"{hashlib.sha256(body.encode()).hexdigest()} {body}"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def file_bytes(tree: Any) -> int:
    """Size of the single file that `save` would write, without writing it.

    Args:
      tree: As for `save`; abstract arrays will do.
    """
    structure, arrays = encode(tree, abstract=True)
    manifest = _manifest(structure, arrays, None, None)
    header: dict[str, Any] = {"__metadata__": {FORMAT: _sealed(manifest)}}
    size = 0
    for name, a in arrays.items():
        plain, end = _is_plain(a.dtype), size + _nbytes(a)
        header[name] = {
            "dtype": _NAMES[a.dtype.name] if plain else "U8",
            "shape": list(a.shape) if plain else [_nbytes(a)],
            "data_offsets": [size, end],
        }
        size = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + size


def _nbytes(a: Any) -> int:
    return math.prod(a.shape) * np.dtype(a.dtype).itemsize


def _save_directory(
    path: Path, manifest: dict[str, Any], arrays: Arrays, limit: int
) -> None:
    shards = _shards(arrays, limit)
    width = len(str(len(shards)))
    names = [f"{i:0{width}}.safetensors" for i in range(len(shards))]
    manifest["shards"] = {
        name: file for file, shard in zip(names, shards, strict=True) for name in shard
    }
    with _atomic(path) as temporary:
        temporary.mkdir()
        pairs = list(zip(names, shards, strict=True))
        for file, shard in track(pairs, f"saving {path.name}"):
            part = {name: arrays[name] for name in shard}
            _write(temporary / file, to_safetensors(_as_bytes(part)))
        _write(temporary / _MANIFEST, _sealed(manifest).encode())
        _sync(temporary)


def _shards(arrays: Arrays, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, a in arrays.items():
        if shards[-1] and size + a.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += a.nbytes
    return shards


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which it takes over if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        if path.is_dir():
            os.replace(path, folder / "old")  # A directory cannot be replaced whole.
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: _PathLike, *, as_numpy: bool = False) -> Any:
    """Read what `save` wrote; nothing is unpickled, and every byte is checked.

    Args:
      path: File or directory.
      as_numpy: Leave arrays in host memory instead of on the default device.

    Returns:
      The pytree, bit for bit.

    Raises:
      FileNotFoundError: If there is nothing at `path`.
      FileError: If it is damaged, truncated, foreign, or of a newer format; the
        message names the file and the entry.
    """
    path = Path(path)
    manifest, arrays = _read(path)

    def array(name: Any) -> Any:
        if name not in arrays:
            raise FileError(
                f"{path}: the tree refers to {name!r}, which is not stored."
            )
        return arrays[name] if as_numpy else jnp.asarray(arrays[name])

    try:
        return decode(manifest["tree"], array, file=str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{path}: the manifest's tree is malformed: {error}."
        ) from error


def read_manifest(path: _PathLike) -> dict[str, Any]:
    """The manifest of a file: version, tree, recipe, metadata, arrays; all checked.

    Args:
      path: File or directory.

    Raises:
      FileError: As `load`.
    """
    return _read(Path(path))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` found.

    Attributes:
      version: Format version.
      arrays: Number of arrays, every one of which matched its checksum.
      bytes: Their bytes.
    """

    version: int
    arrays: int
    bytes: int


def verify(path: _PathLike) -> Verified:
    """Check every byte of a file, and that its tree can be built.

    Args:
      path: File or directory.

    Raises:
      FileError: As `load`.
    """
    manifest, arrays = _read(Path(path))
    load(path, as_numpy=True)
    size = sum(a.nbytes for a in arrays.values())
    return Verified(version=manifest["version"], arrays=len(arrays), bytes=size)


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    if path.is_dir():
        manifest = _unsealed(_bytes(path / _MANIFEST).decode(errors="replace"), path)
        shards = manifest.get("shards", {})
        names = sorted(set(shards.values()))
        stored: Arrays = {}
        for name in track(names, f"loading {path.name}"):
            if Path(name).name != name:
                raise FileError(
                    f"{path}: the manifest names a shard outside it: {name!r}."
                )
            stored |= _Raw(path / name).arrays()
    else:
        raw = _Raw(path)
        if FORMAT not in raw.metadata:
            raise FileError(
                f"{path}: a safetensors file, but without a jaxcompress manifest; it "
                "was not written by jaxcompress.io.save."
            )
        manifest = _unsealed(raw.metadata[FORMAT], path)
        if list(raw.metadata) != [FORMAT]:
            raise FileError(
                f"{path}: its header holds entries that save does not write."
            )
        stored = raw.arrays()
    return manifest, _checked(manifest, stored, path)


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"io.load: there is no file {path}.")
    return path.read_bytes()


def _unsealed(text: str, path: Path) -> dict[str, Any]:
    """The manifest, after its checksum, format and version."""
    seal, _, body = text.partition(" ")
    if hashlib.sha256(body.encode()).hexdigest() != seal:
        raise FileError(
            f"{path}: the manifest does not match its checksum; it is damaged."
        )
    manifest = json.loads(body)
    if manifest.get("format") != FORMAT:
        raise FileError(f"{path}: its manifest is not one of jaxcompress.")
    if manifest["version"] > VERSION:
        raise FileError(
            f"{path}: it has format version {manifest['version']}; this library reads "
            f"up to {VERSION}. Update jaxcompress."
        )
    return manifest


def _checked(manifest: dict[str, Any], stored: Arrays, path: Path) -> Arrays:
    """The arrays in their own dtypes, each compared with the manifest."""
    described = manifest["arrays"]
    if extra := stored.keys() - described.keys():
        raise FileError(f"{path}: {min(extra)!r} is stored but not in the manifest.")
    arrays: Arrays = {}
    for name, expected in described.items():
        if name not in stored:
            raise FileError(f"{path}: {name!r} is in the manifest but not stored.")
        raw = stored[name]
        dtype, shape = jnp.dtype(expected["dtype"]), tuple(expected["shape"])
        data = raw.tobytes()
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise FileError(
                f"{path}: {name!r} does not match its checksum; it is damaged."
            )
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise FileError(f"{path}: {name!r} does not have the shape {shape}.")
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


class _Raw:
    """A safetensors file taken apart, its header checked to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _bytes(path)
        self.header_bytes = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
        if not 2 <= self.header_bytes <= len(data) - 8 or data[8:9] != b"{":
            raise FileError(
                f"{path}: not a file written by jaxcompress.io.save, or its beginning "
                "is damaged or cut off."
            )
        text = data[8 : 8 + self.header_bytes]
        self.body = data[8 + self.header_bytes :]
        try:
            self.header = json.loads(text)
            self.metadata = self.header.pop("__metadata__", {})
            self._spans = {k: self._span(v) for k, v in self.header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{path}: its header is damaged: {error}.") from error
        self._require_canonical(data)

    def _span(self, entry: dict[str, Any]) -> tuple[int, int]:
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(self.body):
            raise FileError(
                f"{self.path}: it is cut off: {entry['data_offsets']} lie outside."
            )
        return begin, end

    def _require_canonical(self, data: bytes) -> None:
        """Refuse a header other than the one this content gives."""
        try:
            again = to_safetensors(self._typed(), metadata=self.metadata or None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{self.path}: its header is damaged: {error}.") from error
        if (
            len(again) != len(data)
            or again[: 8 + self.header_bytes] != data[: 8 + self.header_bytes]
        ):
            raise FileError(
                f"{self.path}: its header is not one that io.save writes, or bytes are "
                "missing or left over; it is damaged."
            )

    def _typed(self) -> Arrays:
        return {
            name: np.frombuffer(
                self.body[slice(*self._spans[name])], _DTYPES[entry["dtype"]]
            ).reshape(entry["shape"])
            for name, entry in self.header.items()
        }

    def arrays(self) -> Arrays:
        """Arrays by name."""
        return self._typed()


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
