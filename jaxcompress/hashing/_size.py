"""How many buckets a weight gets, and what a hash may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kernels_pallas.hashed_matmul import Hashing
from kernels_pallas.hashing import MOST

ELEMENTS = Hashing()
"""Each weight hashed apart."""


def bucket_count(
    sizes: Sequence[int], ratio: float, hashing: Hashing, *, who: str, path: str
) -> int:
    """Buckets of one weight, one for every `ratio` weights, in whole runs.

    Raises:
      ValueError: If `ratio` is below 1, or there would be too many.
    """
    check_ratio(ratio, who)
    return whole_runs(math.prod(sizes) / ratio, sizes, hashing, who=who, path=path)


def whole_runs(
    wanted: float, sizes: Sequence[int], hashing: Hashing, *, who: str, path: str
) -> int:
    """The number of buckets nearest to what is wanted.

    Raises:
      ValueError: If a run would exceed the weight, or there would be too many buckets.
    """
    width = hashing.block[1] if hashing.aligned else 1
    if hashing.block[1] > sizes[-1]:
        raise ValueError(
            f"{who}: a block must not be wider than the inputs of {path!r}, "
            f"{sizes[-1]}; got {hashing.block}."
        )
    count = max(round(wanted / width), 1) * width
    if count > MOST:
        raise ValueError(
            f"{who}: {path!r} would have {count} buckets, more than {MOST}; ask for a "
            "larger ratio, or cut the weight in parts."
        )
    return count


def check_ratio(ratio: float, who: str) -> None:
    """Refuse a ratio below 1."""
    if not ratio >= 1:
        raise ValueError(
            f"{who}: ratio is of weights to buckets, at least 1; got {ratio}. An 8 "
            "times smaller weight has ratio=8.0."
        )


def check_hashing(hashing: Hashing, who: str) -> None:
    """Refuse what no hash can be.

    Raises:
      ValueError: If a block is empty, the seed is not of 32 bits, or a table that grows
        has blocks.
    """
    if min(hashing.block) < 1 or not 0 <= hashing.seed < 2**32:
        raise ValueError(
            f"{who}: blocks must be positive and seeds of 32 bits; got {hashing}. "
            "block=(1, 1) hashes each weight apart."
        )
    if hashing.linear and hashing.block != (1, 1):
        raise ValueError(
            f"{who}: a table that grows bucket by bucket hashes each weight apart; got "
            f"block={hashing.block}."
        )


def common_ratio(
    weights: Sequence[Any], *, ratio: float | None, bytes: float | None, who: str
) -> float:
    """Weights to a bucket: as given, or to fit into so many bytes.

    Args:
      weights: All that are hashed.
      ratio: As given, or None.
      bytes: Of the buckets of all weights together, or None.
      who: Function named in errors.

    Raises:
      ValueError: Unless one of both is given, or if the bytes exceed the weights'.
    """
    if (ratio is None) == (bytes is None):
        raise ValueError(
            f"{who}: give ratio= (weights to a bucket) or bytes= (of all buckets), not "
            f"both or none; got ratio={ratio}, bytes={bytes}."
        )
    if ratio is None:
        assert bytes is not None
        dense = sum(w.size * np.dtype(w.dtype).itemsize for w in weights)
        if not 0 < bytes <= dense:
            raise ValueError(
                f"{who}: bytes must be positive and at most those of the weights, "
                f"{dense}; got {bytes}."
            )
        ratio = dense / bytes
    check_ratio(ratio, who)
    return ratio
