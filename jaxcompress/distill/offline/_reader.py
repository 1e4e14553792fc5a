"""Reading teacher outputs in any order, from memory-mapped files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.io import FileError
from jaxcompress.io._manifest import FORMAT, Manifest, malformed, unseal
from jaxcompress.progress import track

from . import _layout as layout
from ._writer import PathLike

_REMEDY = "Remove the file and run the writing again, which writes only what is missing"


def open(
    folder: PathLike, *, fingerprint: str | None = None, check: bool = True
) -> Stored:
    """Open a folder of teacher outputs for reading.

    Args:
      folder: Of `distill.offline.write`.
      fingerprint: What the outputs must have been written with, if given.
      check: Compare a shard with its checksums the first time it is read, which reads
        it all once. Without it only the form of a shard is checked then.

    Returns:
      The outputs: ``stored[indices]`` reads some of them.

    Raises:
      FileError: If the folder holds no outputs, or shards are missing.
      ValueError: If the fingerprint is another one.
    """
    header = layout.read_header(Path(folder))
    if fingerprint is not None and header["fingerprint"] != fingerprint:
        raise ValueError(
            f"distill.offline.open: {folder} was written with the fingerprint "
            f"{header['fingerprint']!r}; got {fingerprint!r}. Its outputs are another "
            "teacher's: write them again, to another folder."
        )
    stored = Stored(Path(folder), header, check)
    if missing := [s for s in range(stored.shards) if not stored.path(s).is_file()]:
        raise FileError(
            f"{stored.path(missing[0])}: it is missing, and {len(missing)} of "
            f"{stored.shards} shards in all. Run the writing again, by every process; "
            "it writes only what is missing."
        )
    return stored


class Stored:
    """Teacher outputs on disk.

    Attributes:
      examples: Number of examples.
      shards: Number of files.
      fingerprint: As given to `write`.
      metadata: As given to `write`.
      outputs: By name, shapes and dtypes of one example, and of a `TopK` its
        temperatures and classes.
    """

    def __init__(self, folder: Path, header: layout.Header, check: bool) -> None:
        """Made by `open`."""
        self._folder, self._header, self._check = folder, header, check
        self._open: dict[int, dict[str, np.ndarray]] = {}
        self.examples: int = header["examples"]
        self.shards = layout.shard_count(header)
        self.fingerprint: str = header["fingerprint"]
        self.metadata: dict[str, str] = header["metadata"]
        self.outputs: dict[str, Any] = header["outputs"]

    def __len__(self) -> int:
        """Number of examples."""
        return self.examples

    def __getitem__(self, indices: Any) -> dict[str, Any]:
        """Outputs of some examples, in the order asked for.

        Args:
          indices: ``int[...]``, or a slice, or an integer; negative from the end.

        Returns:
          By name, NumPy arrays (or a `TopK` of them) of shape ``indices.shape +
          shape``, copies that may be passed to a jitted function.

        Raises:
          IndexError: If an index is out of range or not an integer.
          FileError: If a shard is missing, damaged or foreign; names it.
        """
        wanted = self._wanted(indices)
        shard_of, at = np.divmod(wanted, self._header["shard_examples"])
        arrays = {
            name: np.empty((*wanted.shape, *a["shape"]), jnp.dtype(a["dtype"]))
            for name, a in layout.array_forms(self._header).items()
        }
        for shard in np.unique(shard_of):
            here, mapped = shard_of == shard, self._shard(int(shard))
            for name, a in arrays.items():
                a[here] = mapped[name][at[here]]
        return layout.rebuild(arrays, self.outputs)

    def verify(self) -> None:
        """Read every byte and compare it with the checksums.

        Raises:
          FileError: Naming every shard that is missing, damaged or foreign.
        """
        problems = []
        for shard in track(range(self.shards), "verifying teacher outputs"):
            try:
                _mapped(self.path(shard), self._header, shard, check=True)
            except FileError as error:
                problems.append(str(error))
        if problems:
            raise FileError("\n".join(problems))

    @property
    def stored_bytes(self) -> int:
        """Size of all files, on disk."""
        files = [self._folder / layout.FOLDER_FILE, *map(self.path, range(self.shards))]
        return sum(file.stat().st_size for file in files)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self._folder / layout.shard_name(shard)

    def _wanted(self, indices: Any) -> np.ndarray:
        if isinstance(indices, slice):
            return np.arange(self.examples)[indices]
        wanted = np.asarray(indices)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if not np.issubdtype(wanted.dtype, np.integer):
            raise IndexError(
                f"distill.offline: indices must be integers; got {wanted.dtype}. Of a "
                "mask, pass np.flatnonzero(mask)."
            )
        wanted = wanted.astype(np.int64)
        outside = (wanted < -self.examples) | (wanted >= self.examples)
        if outside.any():
            raise IndexError(
                f"distill.offline: indices must be below the {self.examples} examples "
                f"of {self._folder}; got {wanted[outside].flat[0]}."
            )
        return np.where(wanted < 0, wanted + self.examples, wanted)

    def _shard(self, shard: int) -> dict[str, np.ndarray]:
        if shard not in self._open:
            self._open[shard] = _mapped(
                self.path(shard), self._header, shard, check=self._check
            )
        return self._open[shard]


def _mapped(
    path: Path, header: layout.Header, shard: int, *, check: bool
) -> dict[str, np.ndarray]:
    """A shard's arrays, on the disk.

    Raises:
      FileError: If it is not what the writer made.
    """
    try:
        if not path.stat().st_size:  # Which could not be mapped.
            raise FileError(f"{path}: it is empty.")
        data = np.memmap(path, np.uint8, mode="r")
        entries, manifest = _opening(path, data)
        with malformed(path):
            _check_origin(path, manifest, header, shard)
            return {
                name: _array(path, name, data, entries, manifest, check)
                for name in layout.array_forms(header)
            }
    except FileNotFoundError:
        raise FileError(
            f"{path}: it is missing. Run the writing again, which writes only what is "
            "missing."
        ) from None
    except FileError as error:
        raise FileError(f"{error} {_REMEDY} ({path.name}).") from error


def _opening(path: Path, data: np.ndarray) -> tuple[dict[str, Any], Manifest]:
    """Where each array's bytes are, and the sealed manifest.

    The entries are not sealed, but bytes elsewhere would not match the checksums.
    """
    with malformed(path):
        length = int.from_bytes(data[:8].tobytes(), "little")
        if length > len(data) - 8:
            raise FileError(f"{path}: its beginning is damaged, or it is cut off.")
        entries = json.loads(data[8 : 8 + length].tobytes())
        manifest = unseal(entries["__metadata__"][FORMAT], path)
        spans = {
            name: [8 + length + offset for offset in entry["data_offsets"]]
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        if max(end for _, end in spans.values()) != len(data):
            raise FileError(f"{path}: it is cut off, or has bytes left over.")
    return spans, manifest


def _check_origin(
    path: Path, manifest: Manifest, header: layout.Header, shard: int
) -> None:
    """Whether the shard is of this dataset, in its own place, and of the right form."""
    told = manifest["metadata"]
    if told != {"dataset": layout.digest(header), "shard": str(shard)}:
        raise FileError(
            f"{path}: it belongs to another dataset, or to another place in this one."
        )
    examples = len(layout.shard_indices(header, shard))
    expected = {
        name: ([examples, *a["shape"]], a["dtype"])
        for name, a in layout.array_forms(header).items()
    }
    found = {n: (a["shape"], a["dtype"]) for n, a in manifest["arrays"].items()}
    if found != expected:
        raise FileError(f"{path}: it holds {found}, not {expected}.")


def _array(
    path: Path,
    name: str,
    data: np.ndarray,
    spans: dict[str, Any],
    manifest: Manifest,
    check: bool,
) -> np.ndarray:
    expected, (begin, end) = manifest["arrays"][name], spans[name]
    body = data[begin:end]
    if check and hashlib.sha256(body.data).hexdigest() != expected["sha256"]:
        raise FileError(f"{path}: {name!r} does not match its checksum; it is damaged.")
    return body.view(jnp.dtype(expected["dtype"])).reshape(expected["shape"])
