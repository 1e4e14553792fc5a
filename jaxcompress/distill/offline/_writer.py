"""Writing teacher outputs once, by one process or several, to be resumed if killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxcompress import io
from jaxcompress.lift import _journal
from jaxcompress.progress import track

from . import _layout as layout
from ._layout import Header, Outputs
from ._ready import check_examples, ready

PathLike = str | os.PathLike[str]


def write(
    folder: PathLike,
    teacher: Callable[[np.ndarray], Outputs],
    *,
    examples: int,
    batch_size: int,
    shard_examples: int = 1024,
    dtype: Any = None,
    fingerprint: str = "",
    metadata: dict[str, str] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Write a teacher's outputs for a data set; go on where an earlier call stopped.

    Args:
      folder: Made if it is not there.
      teacher: From ``int64[batch_size]`` numbers of examples to outputs by name:
        arrays with the examples on their first axis, or the result of `top_k`. The
        last batch of a shard is filled up by repeating an example, so that a jitted
        teacher compiles once.
      examples: Number of examples in the data set.
      batch_size: Examples in a call of `teacher`.
      shard_examples: Examples in a file.
      dtype: Of floating arrays in the files; as they are if None. What `top_k` gave
        is left as it is.
      fingerprint: Of the teacher, so that outputs of another are not mixed in; see
        `distill.offline.fingerprint`.
      metadata: Free text entries.
      process_index: Which of several writing processes this is,
        ``jax.process_index()`` for one.
      process_count: How many there are. Each writes every `process_count`-th shard;
        the number may change between runs.

    Returns:
      Nothing. A shard is on disk whole or not at all, and those that are there are
      not asked for again: after any number of kills, the files are those of a run
      that was left alone, if `teacher` is deterministic.

    Raises:
      ValueError: If a setting is out of range, differs from those of the folder, or
        the outputs have NaN or another form than in earlier shards.
      OSError: If the disk is full; the shards written so far stay.

    Examples:
      >>> import tempfile
      >>> from jaxcompress.distill import offline
      >>> logits = np.arange(20, dtype=np.float32).reshape(10, 2)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     teacher = lambda i: {"logits": logits[i]}
      ...     write(folder, teacher, examples=10, batch_size=2, shard_examples=4)
      ...     offline.open(folder)[np.array([9, 0])]["logits"].tolist()
      [[18.0, 19.0], [0.0, 1.0]]
    """
    _positive("distill.offline.write", "batch_size", batch_size)
    writer = Writer(
        folder,
        examples=examples,
        shard_examples=shard_examples,
        dtype=dtype,
        fingerprint=fingerprint,
        metadata=metadata,
        process_index=process_index,
        process_count=process_count,
    )
    for shard in track(writer.missing, "writing teacher outputs"):
        writer.write(shard, _outputs(teacher, writer.indices(shard), batch_size))


def fingerprint(params: Any) -> str:
    """A digest of a teacher's parameters: of paths, shapes, dtypes and every byte."""
    return _journal.fingerprint(params, [], {})


class Writer:
    """One process's part of the writing, for loops that `write` does not fit.

    Use it as ``for shard in writer.missing: writer.write(shard, f(writer.indices(
    shard)))``; the settings are those of `write`.

    Attributes:
      missing: Shards of this process that are not on disk, as found at the start.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        examples: int,
        shard_examples: int = 1024,
        dtype: Any = None,
        fingerprint: str = "",
        metadata: dict[str, str] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Open a folder, new or of an earlier run; remove what a kill left half done.

        Raises:
          ValueError: If a setting is out of range, or not that of the folder.
        """
        who = "distill.offline.Writer"
        for name, value in {
            "examples": examples,
            "shard_examples": shard_examples,
            "process_count": process_count,
        }.items():
            _positive(who, name, value)
        if not 0 <= process_index < process_count:
            raise ValueError(
                f"{who}: process_index must be in [0, {process_count}); got "
                f"{process_index}. It is jax.process_index()."
            )
        self._folder, self._dtype = Path(folder), dtype
        self._part = (process_index, process_count)
        self._settings: Header = {
            "kind": "teacher outputs",
            "version": layout.VERSION,
            "examples": int(examples),
            "shard_examples": int(shard_examples),
            "fingerprint": fingerprint,
            "metadata": dict(metadata or {}),
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        self._agree()
        self._sweep()
        self.missing = [
            shard
            for shard in range(layout.shard_count(self._settings))
            if self._owns(shard) and not self._path(shard).exists()
        ]

    def indices(self, shard: int) -> np.ndarray:
        """``int64``, the examples of a shard."""
        return layout.shard_indices(self._settings, shard)

    def write(self, shard: int, outputs: Outputs) -> None:
        """Write a shard whole: its examples on the first axis of every array.

        Raises:
          ValueError: If the shard is another process's or on disk, or the outputs have
            NaN, another number of examples, or another form than earlier ones.
        """
        who = f"distill.offline.Writer.write, shard {shard}"
        if not self._owns(shard) or self._path(shard).exists():
            raise ValueError(
                f"{who}: a process writes only its own shards that are not on disk; "
                f"{self._path(shard)} is there, or is not for process {self._part[0]} "
                f"of {self._part[1]}. Go through writer.missing."
            )
        examples = self.indices(shard)
        checked = {
            name: ready(f"{who}, {name!r}", value, examples, self._dtype)
            for name, value in outputs.items()
        }
        arrays = layout.flatten(checked)
        header = self._agree(layout.form(checked))
        io.save(
            self._path(shard),
            arrays,
            metadata={"dataset": layout.digest(header), "shard": str(shard)},
            max_shard_bytes=2**62,
        )

    def _agree(self, outputs: dict[str, Any] | None = None) -> Header:
        """The folder's settings, which must be ours; written if the first to know.

        If several processes write them at once, the last one stays, and those that
        differ from it learn so at their next shard.
        """
        path = self._folder / layout.FOLDER_FILE
        ours = self._settings | ({} if outputs is None else {"outputs": outputs})
        if not path.exists() and outputs is None:
            return ours
        if not path.exists():
            io.save(path, ours, overwrite=True)
        found = layout.read_header(self._folder)
        for name, value in ours.items():
            if found.get(name) != value:
                raise ValueError(
                    f"distill.offline.Writer: {self._folder} was begun with {name} = "
                    f"{found.get(name)}; got {value}. Write to an empty folder, or "
                    "with the settings and teacher of the first run."
                )
        return found

    def _owns(self, shard: int) -> bool:
        index, count = self._part
        inside = 0 <= shard < layout.shard_count(self._settings)
        return inside and shard % count == index

    def _path(self, shard: int) -> Path:
        return self._folder / layout.shard_name(shard)

    def _sweep(self) -> None:
        """Remove temporary folders that a kill left: of our shards, or all if alone."""
        for path in self._folder.glob(".*.jc.*"):
            shard = re.match(r"\.shard_(\d+)\.", path.name)
            if self._owns(int(shard[1])) if shard else self._part[1] == 1:
                shutil.rmtree(path, ignore_errors=True)


def _outputs(
    teacher: Callable[[np.ndarray], Outputs], indices: np.ndarray, batch_size: int
) -> Outputs:
    """The teacher's outputs for a shard, in batches of one size."""
    batches = []
    for first in range(0, len(indices), batch_size):
        batch = indices[first : first + batch_size]
        full = np.pad(batch, (0, batch_size - len(batch)), mode="edge")
        outputs = dict(teacher(full))
        for name, value in outputs.items():
            check_examples(f"distill.offline.write, {name!r}", value, batch_size)
        batches.append(jax.tree.map(np.asarray, outputs))
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(indices)], *batches)


def _positive(who: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{who}: {name} must be at least 1; got {value}.")
