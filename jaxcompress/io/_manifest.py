"""The manifest: what a file holds, behind a checksum of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.io._container import Arrays
from jaxcompress.io._errors import FileError
from jaxcompress.io._tree import encode_static

FORMAT = "jaxcompress"
VERSION = 1

Manifest = dict[str, Any]


def describe(
    structure: Any, arrays: Arrays, recipe: Any, metadata: dict[str, str] | None
) -> Manifest:
    """The manifest of a tree: its structure, and the checksum of every array."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tree": structure,
        "recipe": encode_static(recipe, "recipe"),
        "metadata": dict(metadata or {}),
        "arrays": {
            name: {
                "dtype": a.dtype.name,
                "shape": list(a.shape),
                "sha256": _sha256(a.tobytes() if isinstance(a, np.ndarray) else b""),
            }
            for name, a in arrays.items()
        },
    }


def seal(manifest: Manifest) -> str:
    """The manifest as text, behind its checksum."""
    body = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    return f"{_sha256(body.encode())} {body}"


def unseal(text: str, path: Path) -> Manifest:
    """The manifest, after its checksum, format and version.

    Raises:
      FileError: If one of them is wrong.
    """
    seal, _, body = text.partition(" ")
    if _sha256(body.encode()) != seal:
        raise FileError(
            f"{path}: the manifest does not match its checksum; it is damaged."
        )
    with malformed(path):
        manifest = json.loads(body)
        if manifest.get("format") != FORMAT:
            raise FileError(f"{path}: its manifest is not one of jaxcompress.")
        if int(manifest["version"]) > VERSION:
            raise FileError(
                f"{path}: it has format version {manifest['version']}; this library "
                f"reads up to {VERSION}. Update jaxcompress."
            )
    return manifest


def shard_names(manifest: Manifest, path: Path) -> list[str]:
    """The files of a directory that hold arrays.

    Raises:
      FileError: If one of them might lie outside the directory.
    """
    with malformed(path):
        names = list(manifest["shards"].values())
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"\w+\.safetensors", name):
                raise FileError(
                    f"{path}: the manifest names a shard outside it: {name!r}."
                )
        return sorted(set(names))


def check(manifest: Manifest, stored: Arrays, path: Path) -> Arrays:
    """The arrays in their own dtypes, each compared with the manifest.

    Raises:
      FileError: Naming the array that is missing, left over or damaged.
    """
    with malformed(path):
        described = manifest["arrays"]
        if extra := stored.keys() - described.keys():
            raise FileError(
                f"{path}: {min(extra)!r} is stored but not in the manifest."
            )
        return {
            name: _checked(name, expected, stored, path)
            for name, expected in described.items()
        }


def _checked(name: str, expected: Any, stored: Arrays, path: Path) -> np.ndarray:
    if name not in stored:
        raise FileError(f"{path}: {name!r} is in the manifest but not stored.")
    data = stored[name].tobytes()
    if _sha256(data) != expected["sha256"]:
        raise FileError(f"{path}: {name!r} does not match its checksum; it is damaged.")
    dtype, shape = jnp.dtype(expected["dtype"]), tuple(expected["shape"])
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{path}: {name!r} does not have the shape {shape}.")
    return np.frombuffer(data, dtype).reshape(shape)


@contextlib.contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Errors of a manifest that is sealed but makes no sense, as `FileError`."""
    try:
        yield
    except FileError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise FileError(f"{path}: its manifest is malformed: {error!r}.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
