"""Block sizes of the TPU kernel, and what it refuses."""

from __future__ import annotations

import math
from typing import NamedTuple

from kernels_pallas.hashed_matmul.reference import Hashing

LANES = 128
SUBLANES = 16
"""Rows of a bfloat16 tile: M is padded to a multiple of it."""

MOST = 512
"""Rows and columns of the largest tile of the weight: 1 MiB of float32."""

SINGLE_BUCKETS = 512
"""Buckets that single weights are gathered from: 4 registers, one gather each."""

TABLE_BYTES = 8 * 2**20
"""Buckets of blocks, all of them in VMEM."""


class Blocks(NamedTuple):
    """Rows of x, outputs and inputs of a grid step."""

    m: int
    n: int
    k: int


def refusal(hashing: Hashing, buckets: int) -> str:
    """Why the kernel cannot run, or nothing."""
    bn, bk = hashing.block
    if not hashing.aligned and bk > 1:
        return "runs begin anywhere"
    if hashing.block == (1, 1):
        few = buckets <= SINGLE_BUCKETS
        return "" if few else f"more than {SINGLE_BUCKETS} buckets for single weights"
    if bk % LANES or bn % SUBLANES:
        return f"blocks are not whole multiples of ({SUBLANES}, {LANES})"
    if max(math.lcm(bn, LANES), bk) > MOST:
        return f"blocks do not tile {MOST} x {MOST}"
    if 4 * (buckets + bn * bk) > TABLE_BYTES:
        return f"buckets of more than {TABLE_BYTES >> 20} MiB"
    return ""


def blocks_for(m: int, n: int, k: int, hashing: Hashing) -> Blocks:
    """Tiles of whole blocks, up to `MOST` a side."""
    bn, bk = hashing.block
    rows = min(m + -m % SUBLANES, MOST // 2)
    return Blocks(rows, _size(n, math.lcm(bn, LANES)), _size(k, math.lcm(bk, LANES)))


def _size(whole: int, unit: int) -> int:
    """The multiple of `unit` that covers `whole`, or the largest up to `MOST`."""
    return min(-(-whole // unit), MOST // unit) * unit
