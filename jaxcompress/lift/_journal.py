"""What a sweep writes as it goes, so that a killed one resumes where it was."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.lift._tracked import LiftError

FORMAT = 1


class Journal:
    """A folder with a log of every layer and the compressed layers themselves.

    ``sweep.json`` holds the fingerprint, ``log.jsonl`` one line a layer,
    ``layer_00012.npz`` the components of the thirteenth leaf and their checksum. A
    layer's file is complete before it has its name.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        """Open a folder, new or of an earlier run of the same sweep.

        Raises:
          LiftError: If the folder belongs to another model, data or recipe.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        head = self.folder / "sweep.json"
        want = {"format": FORMAT, "fingerprint": fingerprint}
        if not head.exists():
            _write(head, json.dumps(want).encode())
        try:
            found = json.loads(head.read_bytes())
        except ValueError as error:
            raise LiftError(
                f"sweep: {head} is damaged ({error}); pass an empty folder as work_dir."
            ) from None
        if found != want:
            raise LiftError(
                f"sweep: {self.folder} holds the work of another sweep: its model, its "
                f"batches or its rules differ (fingerprint {found.get('fingerprint')}, "
                f"now {fingerprint}). Pass an empty folder as work_dir."
            )

    def load(self, number: int, like: Any) -> Any:
        """The leaf of a layer that was finished, or None.

        Args:
          number: Which layer, in the order of the sweep.
          like: The leaf's abstract form.

        Raises:
          LiftError: If the file is damaged or of another form.
        """
        path = self._layer(number)
        if not path.exists():
            return None
        arrays, structure = jax.tree.flatten(like)
        n = len(arrays)
        try:
            with np.load(path) as stored:
                digest, *parts = [stored[f"arr_{i}"].tobytes() for i in range(n + 1)]
        except (OSError, ValueError, KeyError) as error:
            raise LiftError(
                f"sweep: {path} is damaged ({error}); remove it, and the layer is "
                "compressed again."
            ) from None
        sizes = [a.size * np.dtype(a.dtype).itemsize for a in arrays]
        if [len(p) for p in parts] != sizes or digest != _digest(parts):
            raise LiftError(
                f"sweep: {path} does not hold what it should; remove it, and the layer "
                "is compressed again."
            )
        return jax.tree.unflatten(
            structure,
            [
                jnp.asarray(np.frombuffer(p, a.dtype).reshape(a.shape))
                for p, a in zip(parts, arrays, strict=True)
            ],
        )

    def save(self, number: int, leaf: Any) -> None:
        """Keep a finished layer."""
        parts = [np.asarray(a).tobytes() for a in jax.tree.leaves(leaf)]
        path = self._layer(number)
        new = path.with_suffix(".tmp.npz")
        stored = [np.frombuffer(p, np.uint8) for p in (_digest(parts), *parts)]
        with new.open("wb") as file:
            np.savez(file, *stored)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer_{number:05d}.npz"


def fingerprint(params: Any, batches: list[Any], recipe: dict[str, str]) -> str:
    """A digest of everything the result of a sweep depends on but the code."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for part in (params, batches):
        for path, leaf in tree.flatten(part)[0].items():
            for a in jax.tree.leaves(leaf):
                key = jax.dtypes.prng_key
                if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, key):
                    a = jax.random.key_data(a)
                if hasattr(a, "dtype"):
                    digest.update(f"{path} {a.dtype} {a.shape} ".encode())
                    digest.update(np.asarray(a).tobytes())
                else:
                    digest.update(f"{path} {a!r} ".encode())
    return digest.hexdigest()[:32]


def _digest(parts: list[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.digest()


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".tmp")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
