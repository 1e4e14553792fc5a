"""`load`, `verify` and `read_manifest`: nothing unpickled, every byte checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.io import _compact
from jaxcompress.io._container import Arrays, unpack
from jaxcompress.io._errors import FileError
from jaxcompress.io._manifest import (
    FORMAT,
    Manifest,
    check,
    malformed,
    shard_names,
    unseal,
)
from jaxcompress.io._save import MANIFEST, PathLike
from jaxcompress.io._tree import decode, decode_static
from jaxcompress.progress import track


def load(path: PathLike, *, as_numpy: bool = False) -> Any:
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
      ValueError: If an array has 64 bits, which JAX would narrow; load it with
        ``as_numpy=True``.
    """
    path = Path(path)
    return _build(path, *_read(path), as_numpy=as_numpy)


def read_manifest(path: PathLike) -> dict[str, Any]:
    """The manifest of a file: version, tree, recipe, metadata, arrays; all checked.

    Args:
      path: File or directory.

    Raises:
      FileNotFoundError: If there is nothing at `path`.
      FileError: As `load`.
    """
    manifest, _ = _read(Path(path))
    with malformed(Path(path)):
        recipe = decode_static(manifest["recipe"], file=str(path))
    return {**manifest, "recipe": recipe}


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


def verify(path: PathLike) -> Verified:
    """Check every byte of a file, and that its tree can be built.

    Args:
      path: File or directory.

    Raises:
      FileNotFoundError: If there is nothing at `path`.
      FileError: As `load`.
    """
    path = Path(path)
    manifest, arrays = _read(path)
    _build(path, manifest, arrays, as_numpy=True)
    size = sum(a.nbytes for a in arrays.values())
    return Verified(version=manifest["version"], arrays=len(arrays), bytes=size)


def _build(path: Path, manifest: Manifest, arrays: Arrays, *, as_numpy: bool) -> Any:
    def array(name: Any) -> Any:
        if name not in arrays:
            raise FileError(
                f"{path}: the tree refers to {name!r}, which is not stored."
            )
        return arrays[name] if as_numpy else jnp.asarray(arrays[name])

    if not as_numpy:
        for name, a in arrays.items():
            _refuse_narrowing(name, a, path)
    with malformed(path):
        return decode(manifest["tree"], array, file=str(path))


def _refuse_narrowing(name: str, a: np.ndarray, path: Path) -> None:
    kept = jax.dtypes.canonicalize_dtype(a.dtype)
    if kept != a.dtype:
        raise ValueError(
            f"io.load: {path}: {name!r} is {a.dtype}, which JAX would narrow to "
            f"{kept}; pass as_numpy=True, or enable jax_enable_x64."
        )


def _read(path: Path) -> tuple[Manifest, Arrays]:
    """Manifest and arrays, each compared with the other."""
    if not path.exists():
        raise FileNotFoundError(f"io.load: there is no file {path}.")
    if path.is_dir():
        text = _bytes(path / MANIFEST).decode(errors="replace")
        manifest, stored = unseal(text, path), {}
        for name in track(shard_names(manifest, path), f"loading {path.name}"):
            stored |= unpack(path / name, _bytes(path / name))[0]
    else:
        data = path.read_bytes()
        if data.startswith(_compact.MAGIC):
            return _compact.unpack(path, data)
        stored, metadata = unpack(path, data)
        if FORMAT not in metadata:
            raise FileError(
                f"{path}: a safetensors file, but without a jaxcompress manifest; it "
                "was not written by jaxcompress.io.save."
            )
        manifest = unseal(metadata[FORMAT], path)
        if list(metadata) != [FORMAT]:
            raise FileError(
                f"{path}: its header holds entries that save does not write."
            )
    return manifest, check(manifest, stored, path)


def _bytes(path: Path) -> bytes:
    """A file that a directory must have."""
    if not path.is_file():
        raise FileError(f"{path}: it is missing; the directory is damaged.")
    return path.read_bytes()
