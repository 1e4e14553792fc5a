"""What a folder of teacher outputs holds, and under which names.

``dataset.jc`` has the settings and the form of one example; ``shard_000012.jc`` has
the examples from ``12 * shard_examples`` on. Both are files of `jaxcompress.io`, so
they appear whole or not at all. A shard names the digest of its dataset, so that one
of another run is not taken for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress import io

from ._top_k import TopK

FOLDER_FILE = "dataset.jc"
VERSION = 1

Outputs = Mapping[str, Any]
"""By name, an array with examples on its first axis, or a `TopK` of such arrays."""

Header = dict[str, Any]


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"shard_{shard:06d}.jc"


def shard_count(header: Header) -> int:
    """Number of shards; the last may be shorter."""
    return -(-header["examples"] // header["shard_examples"])


def shard_indices(header: Header, shard: int) -> np.ndarray:
    """``int64``, the examples of a shard."""
    first = shard * header["shard_examples"]
    return np.arange(first, min(first + header["shard_examples"], header["examples"]))


def read_header(folder: Path) -> Header:
    """The dataset file of a folder.

    Raises:
      FileError: If it is missing, damaged, or of a newer version.
    """
    path = folder / FOLDER_FILE
    if not path.is_file():
        raise io.FileError(
            f"{path}: it is missing, so the folder holds no teacher outputs; write "
            "them with distill.offline.write."
        )
    header = io.load(path, as_numpy=True)
    if not isinstance(header, dict) or header.get("kind") != "teacher outputs":
        raise io.FileError(f"{path}: it does not describe teacher outputs.")
    if header["version"] > VERSION:
        raise io.FileError(
            f"{path}: it has version {header['version']} of this format; this library "
            f"reads up to {VERSION}. Update jaxcompress."
        )
    return header


def digest(header: Header) -> str:
    """What a shard says about the dataset it belongs to."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def form(outputs: Outputs) -> dict[str, Any]:
    """Shapes and dtypes of one example, and the settings of every `TopK`."""
    return {
        name: {
            "arrays": {
                part: {"shape": list(a.shape[1:]), "dtype": a.dtype.name}
                for part, a in _parts(value).items()
            },
            "top_k": {
                "temperatures": list(value.temperatures),
                "classes": value.classes,
            }
            if isinstance(value, TopK)
            else None,
        }
        for name, value in outputs.items()
    }


def flatten(outputs: Outputs) -> dict[str, np.ndarray]:
    """The arrays by the names they have in a file.

    Raises:
      ValueError: If there are none, or two have one name.
    """
    named = [
        (f"{name}{part}", a)
        for name, value in outputs.items()
        for part, a in _parts(value).items()
    ]
    arrays = dict(named)
    if not arrays or len(arrays) < len(named):
        raise ValueError(
            "distill.offline: outputs must have one array or more, each with a name of "
            f"its own; got {[name for name, _ in named]}. Rename them."
        )
    return arrays


def rebuild(arrays: Mapping[str, Any], outputs: dict[str, Any]) -> Any:
    """Undo `flatten`, given the form of the outputs."""
    return {
        name: TopK(
            indices=arrays[f"{name}.indices"],
            values=arrays[f"{name}.values"],
            residual=arrays[f"{name}.residual"],
            temperatures=tuple(entry["top_k"]["temperatures"]),
            classes=entry["top_k"]["classes"],
        )
        if entry["top_k"]
        else arrays[name]
        for name, entry in outputs.items()
    }


def array_forms(header: Header) -> dict[str, Any]:
    """Shape and dtype of one example of every array, by its name in a file."""
    return {
        f"{name}{part}": array
        for name, entry in header["outputs"].items()
        for part, array in entry["arrays"].items()
    }


def _parts(value: Any) -> dict[str, Any]:
    if isinstance(value, TopK):
        fields = ("indices", "values", "residual")
        return {f".{field}": getattr(value, field) for field in fields}
    return {"": value}
