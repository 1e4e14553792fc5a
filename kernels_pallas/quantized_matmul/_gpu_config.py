"""How a weight-only matmul is cut for the H200."""

from __future__ import annotations

import dataclasses
from typing import Any

from kernels_pallas._gpu_words import BLOCK
from kernels_pallas.formats import Format
from kernels_pallas.layouts import width

SHARED_MEMORY = 225_000
"""Bytes of a processor's 227 KiB that the buffers may take; barriers need the rest."""

_MOST_STAGES, _ENOUGH_STAGES = 6, 3
_SHAPES = {8: (1, 4), 16: (1, 4), 32: (2, 2), 64: (2, 1), 96: (2, 1)}
"""Strips and splits by ``tile_m``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut.

    Attributes:
      tile_m: Rows of x that a block of threads takes: 8 to 96, a multiple of 8; more
        would spill registers.
      tile_k: Inputs of a stage.
      strips: Strips of 64 outputs of a block of threads.
      splits: Warpgroups that share a strip, each with its part of a stage's inputs.
      stages: Stages in flight.
      split_k: Blocks of threads that share a tile of the result, each with its part
        of the inputs; their results are summed afterwards, in a fixed order.
    """

    tile_m: int
    tile_k: int
    strips: int
    splits: int
    stages: int
    split_k: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the kernel.

    Attributes:
      m: Rows of x.
      n: Outputs, a multiple of ``64 strips``.
      k: Inputs, a multiple of ``tile_k split_k``.
      fmt: What the codes stand for.
      dtype: Of x: ``bfloat16`` or ``float16``.
      out_dtype: Of the result, or of its parts if ``split_k > 1``.
      group: Inputs that share a scale, or None: all of them.
      zeros: Whether there are zero points.
      config: How it is cut.
      staged: Whether operand A goes through shared memory, as interpretation wants it.
    """

    m: int
    n: int
    k: int
    fmt: Format
    dtype: Any
    out_dtype: Any
    group: int | None
    zeros: bool
    config: Config
    staged: bool

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply; one more copies."""
        return self.config.strips * self.config.splits

    @property
    def steps(self) -> int:
        """Stages that a block of threads goes through."""
        return self.k // (self.config.tile_k * self.config.split_k)

    @property
    def chunk(self) -> int:
        """Inputs of a stage that a warpgroup accumulates before it scales."""
        share = self.config.tile_k // self.config.splits
        return share if self.group is None else min(self.group, share)

    @property
    def depth(self) -> int:
        """Inputs of one operand A: half a block where a group is."""
        return min(self.chunk, BLOCK)

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """Of the parts; copies clip at M, but interpreted ones do not."""
        tile = self.config.tile_m
        rows = -(-self.m // tile) * tile if self.staged else self.m
        return self.config.split_k, rows, self.n


def config_for(
    m: int,
    n: int,
    k: int,
    fmt: Format,
    groups: int,
    *,
    zeros: bool = False,
    num_sms: int = 132,
) -> Config:
    """A good cut: enough blocks of threads for all processors, deep stages.

    Args:
      m: Rows of x.
      n: Outputs of the layout, a multiple of 64.
      k: Inputs of the layout, a multiple of 128.
      fmt: What the codes stand for.
      groups: Groups of the layout; 1: one scale for each output.
      zeros: Whether there are zero points: one accumulator more.
      num_sms: Processors of the device.

    Raises:
      NotImplementedError: If groups are neither of 32 nor of a multiple of 64 inputs.
    """
    group = _group(k, groups)
    half = group == BLOCK // 2
    tile_m = _rows(m, most=96 if not zeros else 32 if half else 64)
    strips, splits = _SHAPES[tile_m]
    if n % (strips * BLOCK):
        strips, splits = 1, strips * splits
    best = None
    for tile_k, share in _stages(k, group, splits):
        config = Config(
            tile_m=tile_m, tile_k=tile_k, strips=strips, splits=share, stages=1
        )
        steps = k // tile_k
        blocks = n // (strips * BLOCK) * -(-m // tile_m)
        fits = lambda s, steps=steps, blocks=blocks: (
            s == 1 or (steps % s == 0 and blocks * s <= num_sms)
        )
        split_k = max(s for s in range(1, 9) if fits(s))
        stages = min(_MOST_STAGES, _room(config, fmt, group), steps // split_k)
        config = dataclasses.replace(config, stages=stages, split_k=split_k)
        if stages >= min(_ENOUGH_STAGES, steps // split_k):
            return config
        best = max(best or config, config, key=lambda c: c.stages)
    assert best is not None
    return best


def shared_memory(config: Config, fmt: Format, group: int | None) -> int:
    """Bytes of the buffers of a block of threads."""
    c = config
    x = 2 * c.tile_m * c.tile_k
    words = c.strips * BLOCK * c.tile_k * width(fmt) // 8
    scales = 0 if group is None else 8 * c.strips * BLOCK * max(c.tile_k // group, 1)
    results = 4 * c.strips * BLOCK * c.tile_m * c.splits
    ones = 2 * BLOCK * BLOCK
    return c.stages * (x + words + scales) + results + ones


def _rows(m: int, most: int) -> int:
    """Rows of a tile: few tiles, as each decodes the weight, and little padding."""
    work = lambda tile: -(-m // tile) * (tile + BLOCK)
    return min((t for t in _SHAPES if t <= most), key=work)


def _room(config: Config, fmt: Format, group: int | None) -> int:
    """How many stages fit."""
    bytes_of = lambda stages: shared_memory(
        dataclasses.replace(config, stages=stages), fmt, group
    )
    return (SHARED_MEMORY - bytes_of(0)) // (bytes_of(1) - bytes_of(0))


def _group(k: int, groups: int) -> int | None:
    """Inputs that share a scale, or None: all of them."""
    if groups == 1:
        return None
    group = k // groups
    if group != BLOCK // 2 and group % BLOCK:
        raise NotImplementedError(
            "quantized_matmul (GPU): groups must be of 32 inputs or of a multiple of "
            f"64; got {group}. Repeat the scales for groups of 32 or 64, or keep the "
            "weight in the portable layout."
        )
    return group


def _stages(k: int, group: int | None, splits: int) -> list[tuple[int, int]]:
    """Inputs of a stage and splits that groups allow, the best first."""
    fits = lambda share: group is None or share % group == 0 or group % share == 0
    return [
        (size, count)
        for count in (4, 2, 1)
        for size in range(8 * BLOCK, 0, -BLOCK)
        if count <= splits
        if k % size == 0 and size % (count * BLOCK) == 0 and fits(size // count)
    ]
