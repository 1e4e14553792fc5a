"""Hashed weights in Python loops, by the package `xxhash`."""

from __future__ import annotations

import struct

import numpy as np
import xxhash

from kernels_pallas.hashed_matmul import Hashing

PRIME = 0x9E3779B1


def digest(seed: int, *words: int) -> int:
    """XXH32 of little-endian words."""
    return xxhash.xxh32_intdigest(struct.pack(f"<{len(words)}I", *words), seed)


def address(h: int, count: int, linear: bool) -> int:
    """Modulo the count; in a table that grows, by Litwin's rule."""
    if not linear:
        return h % count
    level = 2 ** int(np.log2(count))
    return h % (2 * level) if h % (2 * level) < count else h % level


def places(
    hashing: Hashing, count: int, n: int, k: int, row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Bucket and sign of each of ``[N, K]`` weights that begin at a row."""
    (bn, bk), width = hashing.block, hashing.block[1] if hashing.aligned else 1
    at, sign = np.zeros((n, k), int), np.zeros((n, k))
    for i, j in np.ndindex(n, k):
        key = (row + i) // bn, j // bk
        h = digest(hashing.seed, *key)
        first = address(h, count // width, hashing.linear) * width
        at[i, j] = (first + (row + i) % bn * bk + j % bk) % count
        sign[i, j] = -1 if digest((hashing.seed + PRIME) % 2**32, *key) >> 31 else 1
    return at, sign
