"""Block sizes of the TPU kernel, and what is counted against the fast memory."""

from __future__ import annotations

import itertools
from typing import NamedTuple

LANES = 128
SUBLANES = 16
"""Rows of a bfloat16 tile: M is padded to a multiple of it."""

VMEM_BYTES = 12 * 2**20
"""Of the 16 MiB that the compiler grants a kernel by default on v4 and v5e."""

UNROLLED = 4096
"""Sub-vectors times tables that the code of a block is written out for."""


class Blocks(NamedTuple):
    """Rows of x, outputs and sub-vectors of a grid step."""

    m: int
    n: int
    s: int


def adds_up(m: int, d: int) -> bool:
    """Whether partial products are gathered rather than entries."""
    return m < d


def fits(m: int, shape: tuple[int, ...]) -> bool:
    """Whether the smallest block does, for M and the shape of the codebooks."""
    blocks, books, entries, d = shape
    lines = 1 if blocks == 1 and not adds_up(m, d) else LANES
    tables = (books, min(m, d), lines, entries + -entries % LANES)
    return vmem_bytes(Blocks(block_rows(m, d), LANES, LANES), tables) <= VMEM_BYTES


def block_rows(m: int, d: int) -> int:
    """Rows of x in a block: all that partial products are made of, or up to 512."""
    return m if adds_up(m, d) else min(m + -m % SUBLANES, 512)


def blocks_for(
    m: int, d: int, outputs: int, count: int, tables: tuple[int, ...]
) -> Blocks:
    """The largest blocks that divide the padded sizes and fit in VMEM.

    Args:
      m: Rows of x.
      d: Inputs of a sub-vector.
      outputs: N' of the layout.
      count: Sub-vectors, S' of the layout.
      tables: Shape of the tables, ``(A, M or d, S' or 1, E')``.
    """
    rows = block_rows(m, d)
    most = max(LANES, min(512, UNROLLED // (tables[0] * tables[1])))
    sizes = itertools.product(_divisors(outputs, 1024), _divisors(count, most))
    blocks = [Blocks(rows, n, s) for n, s in sizes]
    fitting = [b for b in blocks if vmem_bytes(b, tables) <= VMEM_BYTES]
    return max(fitting, key=lambda b: (b.n * b.s, b.n), default=blocks[0])


def vmem_bytes(blocks: Blocks, tables: tuple[int, ...]) -> int:
    """Buffers of a grid step, each twice: x, codes, tables, outputs."""
    books, components, lines, entries = tables
    lines = 8 if lines == 1 else blocks.s
    x = 4 * components * blocks.m * blocks.s
    codes = books * blocks.s * blocks.n
    read = 4 * books * components * lines * entries
    return 2 * (x + codes + read + 4 * blocks.m * blocks.n)


def _divisors(size: int, most: int) -> list[int]:
    """Multiples of 128 that divide `size`, up to `most`."""
    return [n for n in range(LANES, most + 1, LANES) if size % n == 0]
