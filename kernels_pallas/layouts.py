"""What each back end reads, and the way there and back.

A weight of ``N`` outputs and ``K`` inputs is codes of ``b`` bits with a scale (and a
zero point) for each of ``G`` groups of consecutive inputs. Three layouts hold it:

``portable`` (files, and what runs by plain XLA): ``words`` is
    ``uint8[N, ceil(K b / 8)]``, a little-endian bit stream along K
    (`kernels_pallas.packing`); ``scale`` and ``zero`` are ``[N, G]``.
``tpu``: ``words`` is ``int32[K' B / 32, N']``; word ``r`` of a column holds the codes
    of inputs ``32 r / B`` and on, lowest bits first, as the chip's own bitcast from
    32-bit words to ``B``-bit rows reads them. ``scale`` and ``zero`` are
    ``float32[G', N']``.
``gpu``: ``words`` is ``int32[N' / 64, 2 K' B]``, in the order in which the threads of
    a warpgroup hold an operand of wgmma (`kernels_pallas._gpu_words`); ``scale`` and
    ``zero`` are ``float32[G', N']``.

The last two widen codes to ``B = 2, 4 or 8`` bits (int3 becomes int4), shift unsigned
codes to signed ones, the zero point with them, and pad K to ``K'``, a multiple of the
layout's tile and of the group, and N to ``N'``; all padding is zeros.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import _gpu_words, packing
from kernels_pallas.formats import Format, Integer


class Weight(NamedTuple):
    """The arrays of a quantized weight, in one of the layouts.

    Attributes:
      words: Its codes.
      scale: Of each group.
      zero: Zero point of each group, or None.
    """

    words: Any
    scale: Any
    zero: Any = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout by name, and the multiples that K and N are padded to."""

    name: str
    tile_k: int = 1
    tile_n: int = 1

    @property
    def dtype(self) -> jnp.dtype:
        """Of the words."""
        return jnp.dtype(jnp.uint8 if self.name == "portable" else jnp.int32)

    def sizes(self, scale: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and groups that a scale of this shape has, padding included."""
        a, b = scale[-2:]
        return (a, b) if self.name == "portable" else (b, a)

    def words_shape(self, n: int, k: int, groups: int, fmt: Format) -> tuple[int, int]:
        """Shape of the words of a weight ``[n, k]``."""
        rows, columns = self.padded(n, k, groups)
        if self.name == "portable":
            return rows, packing.packed_length(columns, bits=fmt.bits)
        if self.name == "tpu":
            return columns * width(fmt) // 32, rows
        return rows // _gpu_words.BLOCK, 2 * columns * width(fmt)

    def padded(self, n: int, k: int, groups: int) -> tuple[int, int]:
        """``(N', K')`` of a weight ``[n, k]`` in `groups` groups."""
        if self.name == "portable":
            return n, k
        unit = math.lcm(self.tile_k, k // groups if groups > 1 else 1)
        return _up(n, self.tile_n), _up(k, unit)


PORTABLE = Layout("portable")
TPU = Layout("tpu", tile_k=128, tile_n=128)
GPU = Layout("gpu", tile_k=128, tile_n=64)
LAYOUTS = {layout.name: layout for layout in (PORTABLE, TPU, GPU)}


class Stored(NamedTuple):
    """What is static about a stored weight.

    Attributes:
      fmt: What its codes stand for.
      n: Outputs.
      k: Inputs.
      groups: Groups of inputs.
      layout: How it lies.
    """

    fmt: Format
    n: int
    k: int
    groups: int
    layout: Layout = PORTABLE


def width(fmt: Format) -> int:
    """Bits of a code in the layouts of the chips: 2, 4 or 8."""
    return next(b for b in (2, 4, 8) if b >= fmt.bits)


def repack(weight: Weight, fmt: Format, *, n: int, k: int, to: Layout) -> Weight:
    """A portable weight in another layout.

    Args:
      weight: In the portable layout, ``[N, ...]``; of a stack, by `jax.vmap`.
      fmt: What its codes stand for. Static.
      n: Outputs. Static.
      k: Inputs. Static.
      to: The layout. Static.

    Returns:
      The weight as `to` reads it; `unpack` undoes it bit for bit.
    """
    if to == PORTABLE:
        return weight
    bits = width(fmt)
    groups = weight.scale.shape[-1]
    rows, columns = to.padded(n, k, groups)
    codes = packing.unpack(weight.words, bits=fmt.bits, count=k)
    codes = jnp.pad(_signed(codes, fmt), ((0, rows - n), (0, columns - k)))
    if to.name == TPU.name:
        words = packing.pack(codes, bits=bits).reshape(rows, -1, 4).swapaxes(0, 1)
        words = jax.lax.bitcast_convert_type(words, jnp.int32)
    else:
        words = _gpu_words.arrange(codes, bits=bits)
    count = groups if groups == 1 else columns // (k // groups)
    side = lambda a: jnp.pad(
        a.astype(jnp.float32).T, ((0, count - groups), (0, rows - n))
    )
    zero = (
        None
        if weight.zero is None
        else side(weight.zero.astype(jnp.float32) - _offset(fmt))
    )
    return Weight(words, side(weight.scale), zero)


def unpack(weight: Weight, stored: Stored) -> Weight:
    """The portable weight: the inverse of `repack`.

    Args:
      weight: As `stored` says, ``[...]`` without a stack.
      stored: How it lies. Static.
    """
    fmt, n, k, groups, layout = stored
    if layout == PORTABLE:
        return weight
    if layout.name == TPU.name:
        words = jax.lax.bitcast_convert_type(weight.words, jnp.uint8)
        words = words.swapaxes(0, 1).reshape(words.shape[1], -1)[:n]
        codes = packing.unpack(words, bits=width(fmt), count=k)
    else:
        codes = _gpu_words.restore(weight.words, bits=width(fmt))[:n, :k]
    words = packing.pack(codes + jnp.uint8(_offset(fmt)), bits=fmt.bits)
    side = lambda a: a[:groups, :n].T
    zero = None if weight.zero is None else side(weight.zero) + _offset(fmt)
    return Weight(words, side(weight.scale), zero)


def signed_zero(weight: Weight, fmt: Format) -> jax.Array | None:
    """Zero points of a chip's signed codes; unsigned codes without have one, too."""
    if weight.zero is None and _offset(fmt):
        return jnp.full_like(weight.scale, -_offset(fmt))
    return weight.zero


def _offset(fmt: Format) -> int:
    """What unsigned codes are lowered by, so that the chips' signed types hold them."""
    full = isinstance(fmt, Integer) and not fmt.signed and fmt.bits == width(fmt)
    return 2 ** (fmt.bits - 1) if full else 0


def _signed(codes: jax.Array, fmt: Format) -> jax.Array:
    """Codes of `fmt` as codes of `width(fmt)` bits."""
    if isinstance(fmt, Integer) and fmt.signed:
        return fmt.integers(codes).astype(jnp.uint8)
    return codes - jnp.uint8(_offset(fmt))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
