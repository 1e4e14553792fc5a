"""`save`: safetensors and a manifest, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxcompress.io import _compact
from jaxcompress.io._container import Arrays, pack, packed_bytes
from jaxcompress.io._errors import FileError
from jaxcompress.io._manifest import (
    FORMAT,
    Manifest,
    describe,
    seal,
    shard_names,
    unseal,
)
from jaxcompress.io._tree import encode, encode_static
from jaxcompress.io.entropy import CODERS, Coder
from jaxcompress.leaf import nbytes
from jaxcompress.progress import track

MANIFEST = "manifest.json"

PathLike = str | os.PathLike[str]


def save(
    path: PathLike,
    tree: Any,
    *,
    recipe: Any = None,
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 2**30,
    entropy: Coder | None = None,
) -> None:
    """Write a parameter pytree, compressed leaves included.

    The file appears whole or not at all: it is written under a temporary name, forced
    to disk and renamed, so that a crash or a full disk leaves an older file intact. In
    a directory the manifest is what is replaced last.

    Args:
      path: File to write, by convention ``*.jc``; a directory if the arrays exceed
        `max_shard_bytes`, or if it is one already.
      tree: Dicts, lists, tuples, `FrozenDict`, `nnx.State` (its variables come back
        as `nnx.Param`), arrays, numbers, strings, None and compressed leaves.
      recipe: Numbers, strings, tuples and settings that say how it was made.
      metadata: Free text entries.
      overwrite: Replace an existing file.
      max_shard_bytes: Largest single file; an array above it has a file of its own.
      entropy: Write a single file of the fewest bytes: packed codes and positions of
        non-zeros by ``"rans"`` or ``"huffman"`` (`io.entropy`), decoded by `load` to
        the same bits. Other programs cannot read its arrays.

    Raises:
      FileExistsError: If `path` exists and `overwrite` is false; if it is a folder
        that holds no model, or a file where a directory is needed.
      TypeError: If the tree holds what files cannot; nothing is written.
      ValueError: If `entropy` is not known.
      OSError: If the disk is full or not writable; an older file survives.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/m.jc", {"w": jnp.ones(2)})
      ...     jc.io.load(f"{folder}/m.jc")
      {'w': Array([1., 1.], dtype=float32)}
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"io.save: {path} exists; pass overwrite=True to replace it."
        )
    structure, arrays = encode(tree)
    if entropy is not None:
        if path.is_dir():
            raise FileExistsError(
                f"io.save: {path} is a folder, but entropy= writes a single file; "
                "choose another name."
            )
        data = _packed(structure, arrays, recipe, metadata, entropy)
        with _atomic(path) as temporary:
            _write(temporary, data)
        return
    manifest = describe(structure, arrays, recipe, metadata)
    as_file = sum(map(nbytes, arrays.values())) <= max_shard_bytes
    _check_kind(path, as_file)
    if path.is_dir():
        _update_directory(path, manifest, arrays, max_shard_bytes)
        return
    with _atomic(path) as temporary:
        if as_file:
            _write(temporary, pack(arrays, {FORMAT: seal(manifest)}))
        else:
            temporary.mkdir()
            _write_directory(temporary, manifest, arrays, max_shard_bytes)


def _packed(
    structure: Any,
    arrays: Arrays,
    recipe: Any,
    metadata: dict[str, str] | None,
    coder: Coder,
) -> bytes:
    """The bytes of a file with entropy coded codes."""
    if coder not in CODERS:
        raise ValueError(f"io.save: entropy must be in {CODERS}; got {coder!r}.")
    settings = {
        "recipe": encode_static(recipe, "recipe"),
        "metadata": dict(metadata or {}),
    }
    return _compact.pack(structure, arrays, settings, coder)


def file_bytes(tree: Any, *, entropy: Coder | None = None) -> int:
    """Size of the single file that `save` would write, without writing it.

    Args:
      tree: As for `save`; abstract arrays will do, but for `entropy`.
      entropy: As for `save`.
    """
    if entropy is not None:
        return len(_packed(*encode(tree), None, None, entropy))
    structure, arrays = encode(tree, abstract=True)
    manifest = describe(structure, arrays, None, None)
    for entry in manifest["arrays"].values():
        entry["sha256"] = "0" * 64
    return packed_bytes(arrays, {FORMAT: seal(manifest)})


def _check_kind(path: Path, as_file: bool) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).exists():
        raise FileExistsError(
            f"io.save: {path} is a folder that holds something other than a model; "
            "choose another name."
        )
    if path.is_file() and not as_file:
        raise FileExistsError(
            f"io.save: {path} is a file, but arrays above max_shard_bytes need a "
            "directory; remove it first, or choose another name."
        )


def _write_directory(
    folder: Path, manifest: Manifest, arrays: Arrays, limit: int
) -> None:
    """Shards first, under names that no other content has; then the manifest."""
    shards = _shards(arrays, limit)
    files: dict[str, list[str]] = {}
    for i, names in enumerate(shards):
        checksums = [manifest["arrays"][name]["sha256"] for name in names]
        number = str(i).zfill(len(str(len(shards) - 1)))
        files[f"{number}_{_fingerprint(names + checksums)}.safetensors"] = names
    for file, names in track(files.items(), f"saving {folder.name}", total=len(files)):
        _replace(folder / file, pack({name: arrays[name] for name in names}))
    _sync(folder)
    holds = {name: file for file, names in files.items() for name in names}
    _replace(folder / MANIFEST, seal({**manifest, "shards": holds}).encode())
    _sync(folder)


def _update_directory(
    folder: Path, manifest: Manifest, arrays: Arrays, limit: int
) -> None:
    try:
        _write_directory(folder, manifest, arrays, limit)
    finally:
        _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what the manifest does not name: the last model, or half of the next."""
    with contextlib.suppress(FileError, OSError):
        text = (folder / MANIFEST).read_text()
        named = shard_names(unseal(text, folder), folder)
        for file in folder.glob("*.safetensors*"):
            if file.name not in named:
                file.unlink()
        (folder / _partial(MANIFEST)).unlink(missing_ok=True)


def _shards(arrays: Arrays, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, a in arrays.items():
        if shards[-1] and size + nbytes(a) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(a)
    return shards


def _fingerprint(parts: list[str]) -> str:
    """A name that only this content has."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which it takes over if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _partial(name: str) -> str:
    return f"{name}.partial"


def _replace(path: Path, data: bytes) -> None:
    """Write a file under a partial name, and rename it once it is on disk."""
    partial = path.with_name(_partial(path.name))
    _write(partial, data)
    os.replace(partial, path)


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
