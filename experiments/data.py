"""The real data that experiments read: where they are, and how they are laid out.

The folder is the argument `root`, else the environment variable JAXCOMPRESS_DATA, else
``shared/data`` beside the repository. `README.md` in it says where each set is from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

SIBLING = Path(__file__).parents[2] / "shared" / "data"
CIFAR10_FILES = {
    "train": ("train_00000_05000.webp", "train_05000_10000.webp"),
    "test": ("test_00000_01000.webp",),
}


class Images(NamedTuple):
    """Images ``uint8[n, height, width, channels]`` and their classes ``int32[n]``."""

    x: np.ndarray
    y: np.ndarray


class Pairs(NamedTuple):
    """Pairs of sentences and how alike people found them, 0 to 5."""

    scores: np.ndarray
    first: list[str]
    second: list[str]

    def head(self, n: int) -> Pairs:
        """The first `n` pairs."""
        return Pairs(self.scores[:n], self.first[:n], self.second[:n])


def find(name: str, root: Path | str | None = None) -> Path:
    """Path of the file `name` in the data folder.

    Args:
      name: Relative to the folder, with ``/``.
      root: The folder; by default JAXCOMPRESS_DATA, then the repository's sibling.

    Raises:
      FileNotFoundError: If it is not there; says where it was looked for.
    """
    root = Path(root or os.environ.get("JAXCOMPRESS_DATA") or SIBLING)
    path = root / name
    if not path.exists():
        raise FileNotFoundError(
            f"data.find: no {name!r} in {str(root)!r}; set JAXCOMPRESS_DATA to the "
            "folder that holds the data."
        )
    return path


def load_npz(name: str, root: Path | str | None = None) -> dict[str, np.ndarray]:
    """All arrays of a file of plain arrays."""
    with np.load(find(name, root), allow_pickle=False) as arrays:
        return dict(arrays)


def mnist(part: str, root: Path | str | None = None) -> Images:
    """MNIST in its official order: ``train`` (60,000) or ``test`` (10,000)."""
    arrays = load_npz("mnist/mnist.npz", root)
    return Images(arrays[f"x_{part}"][..., None], arrays[f"y_{part}"].astype(np.int32))


def cifar10(part: str, root: Path | str | None = None) -> Images:
    """CIFAR-10: ``train`` (the 10,000 of data_batch_1) or ``test`` (the first 1,000).

    The files are lossless mosaics of 32x32 tiles, in rows.
    """
    names = CIFAR10_FILES[part]
    x = np.concatenate([_tiles(find(f"cifar10/{name}", root)) for name in names])
    y = load_npz("cifar10/labels.npz", root)[f"y_{part}"]
    return Images(x, y.astype(np.int32))


def _tiles(path: Path, size: int = 32) -> np.ndarray:
    """The tiles of a mosaic, ``uint8[n, size, size, 3]``."""
    from PIL import Image

    with Image.open(path) as image:
        mosaic = np.asarray(image.convert("RGB"))
    rows, columns = mosaic.shape[0] // size, mosaic.shape[1] // size
    tiles = mosaic.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    return tiles.reshape(rows * columns, size, size, 3)


def sts(name: str, root: Path | str | None = None) -> Pairs:
    """Sentence pairs: stsb_train, stsb_dev, stsb_test, sts13, sts14 or sts15."""
    text = find(f"sts/{name}.tsv", root).read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.split("\n") if line]
    scores, first, second = zip(*lines, strict=True)
    return Pairs(np.array(scores, np.float64), list(first), list(second))


def stories(
    first: int, last: int, root: Path | str | None = None, *, length: int = 513
) -> list[np.ndarray]:
    """TinyStories `first` to `last` (excluded), each the ``int32`` ids of 512 pieces.

    Stories 0-1199 are to calibrate and tune on, 1200-1599 to evaluate.

    Args:
      first: Index of the first story.
      last: One past the index of the last.
      root: The data folder.
      length: Ids kept of a story at most; the first is BOS.
    """
    arrays = load_npz("stories260k/tinystories_0000_1600_tok512.npz", root)
    ids, offsets = arrays["ids"].astype(np.int32), arrays["offsets"]
    bounds = zip(offsets[first:last], offsets[first + 1 : last + 1], strict=True)
    return [ids[start:stop][:length] for start, stop in bounds]
