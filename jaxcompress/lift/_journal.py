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
_DIGEST = hashlib.sha256().digest_size


class Journal:
    """A folder with a log of every layer and the compressed layers themselves.

    ``sweep.json`` holds the fingerprint, ``log.jsonl`` one line a layer,
    ``layer_00012.bin`` the checksum and the components of the thirteenth leaf. A file
    is complete before it has its name.
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
        sizes = [a.size * np.dtype(a.dtype).itemsize for a in arrays]
        data = path.read_bytes()
        digest, body = data[:_DIGEST], data[_DIGEST:]
        if len(body) != sum(sizes) or digest != hashlib.sha256(body).digest():
            raise LiftError(
                f"sweep: {path} does not hold what it should; remove it, and the layer "
                "is compressed again."
            )
        ends = np.cumsum(sizes)
        return jax.tree.unflatten(
            structure,
            [
                jnp.asarray(
                    np.frombuffer(body[end - n : end], a.dtype).reshape(a.shape)
                )
                for end, n, a in zip(ends, sizes, arrays, strict=True)
            ],
        )

    def save(self, number: int, leaf: Any) -> None:
        """Keep a finished layer."""
        body = b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(leaf))
        _write(self._layer(number), hashlib.sha256(body).digest() + body)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer_{number:05d}.bin"


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


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".tmp")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
