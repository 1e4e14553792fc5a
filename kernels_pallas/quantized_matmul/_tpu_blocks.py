"""Block sizes of the TPU kernel, and what is counted against the fast memory."""

from __future__ import annotations

import dataclasses
import math

from kernels_pallas.formats import Format
from kernels_pallas.layouts import TPU, width

SUBLANES = 16
"""Rows of a bfloat16 tile: M is padded to a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one grid step works on.

    Attributes:
      m: Rows of x, a multiple of 16 (or all).
      n: Outputs, a multiple of 128.
      k: Inputs, a multiple of 128 and of eight groups (or all).
      scale_after: Multiply by the scales after the dot of each group, rather than the
        weights before it. After is exact in the codes and costs operations in
        proportion to M; before rounds the scaled weight to x's dtype and costs the
        same for any M.
    """

    m: int
    n: int
    k: int
    scale_after: bool = True


VMEM_BYTES = 12 * 2**20
"""Of the 16 MiB that the compiler grants a kernel by default on v4 and v5e."""

RESIDENT_BYTES = 2 * 2**20
"""The largest row block of x that stays in VMEM for all of K instead of streaming."""

_WORD_BYTES = 2**20
_LARGEST = Blocks(m=256, n=1024, k=2048)
_STEPS = 4


def blocks_for(m: int, n: int, k: int, fmt: Format, groups: int) -> Blocks:
    """Blocks of about 1 MiB of words: large enough to stream at the memory's rate.

    Args:
      m: Rows of x.
      n: Outputs, ``N'`` of the layout.
      k: Inputs, ``K'`` of the layout.
      fmt: What the codes stand for.
      groups: Groups of inputs, ``G'`` of the layout.

    Returns:
      Blocks whose buffers fit `VMEM_BYTES`.

    Examples:
      >>> from kernels_pallas.formats import INT4
      >>> blocks_for(16, 4096, 4096, INT4, 32)
      Blocks(m=16, n=1024, k=2048, scale_after=True)
    """
    rows, columns = min(_up(m, SUBLANES), _LARGEST.m), min(n, _LARGEST.n)
    unit = k_unit(k, groups)
    inputs = min(_WORD_BYTES * 8 // (width(fmt) * columns), _LARGEST.k)
    inputs = min(k, max(unit, inputs // unit * unit))
    # A dot for each group fills the matrix unit only with groups of 128 or more.
    few = 128 if k // groups >= TPU.tile_k else 32
    blocks = Blocks(rows, columns, inputs, scale_after=groups == 1 or rows <= few)
    while blocks.n > 2 * TPU.tile_n and (
        vmem_bytes(blocks, k, fmt, groups) > VMEM_BYTES
        or math.ceil(n / blocks.n) * math.ceil(k / blocks.k) < _STEPS
    ):
        blocks = dataclasses.replace(blocks, n=_up(blocks.n // 2, TPU.tile_n))
    return blocks


def k_unit(k: int, groups: int) -> int:
    """What a block of K is a multiple of: 128 lanes of x, and 8 rows of scales."""
    return TPU.tile_k if groups == 1 else math.lcm(TPU.tile_k, 8 * (k // groups))


def vmem_bytes(blocks: Blocks, k: int, fmt: Format, groups: int) -> int:
    """Buffers of a grid step: inputs and the output twice, and the sum."""
    m, n, size = blocks.m, blocks.n, blocks.k
    words = size * n * width(fmt) // 8
    sides = 2 * 4 * n * max(1, groups * size // k)
    inputs = max(4 * m * size, min(RESIDENT_BYTES, 4 * m * k))
    return 2 * (words + sides + inputs) + 3 * 4 * m * n


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
