"""Weight formats: what a stored code stands for, before its scale and zero point.

``w[n, k] = (decode(code[n, k]) - zero[n, k // g]) * scale[n, k // g]``
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Integer:
    """Integers of 2 to 8 bits: two's complement, or unsigned with a zero point."""

    bits: int
    signed: bool = True

    @property
    def name(self) -> str:
        """``"int4"``, ``"uint4"``."""
        return f"{'' if self.signed else 'u'}int{self.bits}"

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of uint8 codes; higher bits than the format's are ignored."""
        return self.integers(codes).astype(jnp.float32)

    def integers(self, codes: jax.Array) -> jax.Array:
        """int32 values of uint8 codes."""
        kept = codes.astype(jnp.int32) & (2**self.bits - 1)
        sign = 2 ** (self.bits - 1) if self.signed else 0
        return (kept ^ sign) - sign


@dataclasses.dataclass(frozen=True)
class Table:
    """A value for each code: NF4, fp4, any codebook of 2 to 256 entries."""

    values: tuple[float, ...]
    name: str = "table"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (len(self.values) - 1).bit_length())

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of uint8 codes."""
        codes = codes & jnp.uint8(2**self.bits - 1)
        if len(self.values) > 16:
            return jnp.asarray(self.values, jnp.float32)[codes]
        return self._select(codes)

    def _select(self, codes: jax.Array) -> jax.Array:
        """A tree of selects, bit by bit: a CPU has vectors for them, none to gather."""
        values: list[Any] = [np.float32(v) for v in self.values]
        for bit in range(self.bits):
            odd = (codes >> jnp.uint8(bit)) & jnp.uint8(1) != 0
            values += values[-1:] * (len(values) % 2)
            values = [
                jnp.where(odd, b, a)
                for a, b in zip(values[::2], values[1::2], strict=True)
            ]
        return values[0]


@dataclasses.dataclass(frozen=True)
class Float8:
    """A float of 8 bits that XLA knows, by the name of its dtype."""

    dtype: str

    bits = 8

    @property
    def name(self) -> str:
        """``"fp8_e4m3"``, ``"fp8_e5m2"``."""
        return f"fp8_{self.dtype.removeprefix('float8_').removesuffix('fn')}"

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of uint8 codes."""
        half = codes.astype(jnp.uint16)
        if self.dtype == "float8_e5m2":
            return _float16(half << 8).astype(jnp.float32)
        # A float16 has four more exponent values below; the last code is NaN in both.
        magnitude = half & 0x7F
        value = _float16((half & 0x80) << 8 | magnitude << 7).astype(jnp.float32) * 256
        return jnp.where(magnitude == 0x7F, jnp.nan, value)


def _float16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float16)


Format = Integer | Table | Float8

INT8, INT4, INT3, INT2 = (Integer(bits) for bits in (8, 4, 3, 2))
UINT8, UINT4, UINT3, UINT2 = (Integer(bits, signed=False) for bits in (8, 4, 3, 2))
FP8_E4M3, FP8_E5M2 = Float8("float8_e4m3fn"), Float8("float8_e5m2")

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_E2M1 = Table(name="fp4_e2m1", values=(*_MAGNITUDES, *(-v for v in _MAGNITUDES)))
"""OCP Microscaling Formats (MX) Specification v1.0, 2023, section 5.3.3."""

NF4 = Table(
    name="nf4",
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)
"""Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, appendix E."""
