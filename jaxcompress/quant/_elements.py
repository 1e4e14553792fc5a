"""Element formats: what a code of a few bits stands for, before its scale.

Each is a frozen dataclass with ``bits``, ``label``, ``range`` (lowest and highest
value), ``largest`` (the magnitude that a block's largest weight is scaled to),
``encode`` (scaled float32 to codes in uint8) and ``decode`` (codes to float32, exact
for every code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.leaf import static_type
from jaxcompress.quant._rounding import (
    Rounding,
    floor_log2,
    power_of_two,
    round_to_integer,
)
from kernels_pallas import formats


@static_type
class Integer:
    """Two's complement, or with a zero point unsigned, integers of 2 to 8 bits.

    Attributes:
      bits: 2 to 8.
      symmetric: Codes ``-Q..Q`` around zero, ``Q = 2^(bits-1) - 1``; else
        ``0..2^bits - 1`` with a zero point.
      narrow: Leave out the lowest code (``-Q - 1``, or 0).
      fraction: Binary places: a code stands for ``code * 2^-fraction``.
    """

    bits: int
    symmetric: bool = True
    narrow: bool = True
    fraction: int = 0

    @property
    def label(self) -> str:
        """``"int4"``; ``"uint4"`` with a zero point."""
        return f"{'' if self.symmetric else 'u'}int{self.bits}"

    @property
    def low(self) -> int:
        """Lowest code."""
        if not self.symmetric:
            return int(self.narrow)
        return -(2 ** (self.bits - 1)) + int(self.narrow)

    @property
    def high(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - int(self.symmetric)) - 1

    @property
    def largest(self) -> float:
        """Largest value."""
        return self.high * 2.0**-self.fraction

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value."""
        unit = 2.0**-self.fraction
        return self.low * unit, self.high * unit

    def encode(
        self, x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
    ) -> jax.Array:
        """Nearest codes of scaled values, the zero point not yet added."""
        q = round_to_integer(x * 2.0**self.fraction, rounding, noise)
        # By way of int32, as below: a CPU has vector instructions for these casts.
        return jnp.clip(q, self.low, self.high).astype(jnp.int32).astype(jnp.uint8)

    def integers(self, codes: jax.Array) -> jax.Array:
        """Signed integers (int32) of symmetric codes."""
        sign = 2 ** (self.bits - 1)
        kept = codes.astype(jnp.int32) & (2**self.bits - 1)
        return (kept ^ sign) - sign

    def decode(self, codes: jax.Array) -> jax.Array:
        """Values of codes; of asymmetric ones with the zero point still in."""
        q = self.integers(codes) if self.symmetric else codes
        return q.astype(jnp.float32) * 2.0**-self.fraction


@static_type
class Ternary:
    """-1, 0 or 1, in 2 bits; the threshold and scale are those of TWN."""

    bits: int = 2

    @property
    def label(self) -> str:
        """The field's name."""
        return "ternary"

    @property
    def largest(self) -> float:
        """Largest value."""
        return 1.0

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value."""
        return -1.0, 1.0

    def encode(
        self, x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
    ) -> jax.Array:
        """Signs of values; those below the threshold have been zeroed."""
        del rounding, noise
        return jnp.sign(x).astype(jnp.int8).astype(jnp.uint8) & jnp.uint8(3)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Values of codes."""
        return Integer(bits=2).decode(codes)


@static_type
class Binary:
    """-1 or 1, in one bit; zero counts as positive."""

    bits: int = 1

    @property
    def label(self) -> str:
        """The field's name."""
        return "binary"

    @property
    def largest(self) -> float:
        """Largest value."""
        return 1.0

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value."""
        return -1.0, 1.0

    def encode(
        self, x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
    ) -> jax.Array:
        """1 where positive or zero."""
        del rounding, noise
        return (x >= 0).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Values of codes."""
        return 2.0 * (codes & jnp.uint8(1)).astype(jnp.float32) - 1.0


_INFINITY_BITS, _NAN_BITS = 0x7F800000, 0x7FC00000


@static_type
class Minifloat:
    """Sign, exponent and mantissa in 4 to 8 bits, with subnormals; saturating.

    Attributes:
      exponent: Exponent bits.
      mantissa: Mantissa bits.
      infinities: IEEE-like top exponent (e5m2); else it holds numbers.
      nan: The all-ones code is NaN (e4m3); ignored with `infinities`.

    References:
      Micikevicius et al., `FP8 Formats for Deep Learning
      <https://arxiv.org/abs/2209.05433>`_, 2022, table 1; OCP Microscaling Formats
      (MX) Specification v1.0, 2023, section 5.3 (fp6, fp4).
    """

    exponent: int
    mantissa: int
    infinities: bool = False
    nan: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def label(self) -> str:
        """``"fp8_e4m3"``."""
        return f"fp{self.bits}_e{self.exponent}m{self.mantissa}"

    @property
    def low_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def largest_code(self) -> int:
        """Code of the largest finite number."""
        if self.infinities:
            return ((2**self.exponent - 1) << self.mantissa) - 1
        return 2 ** (self.bits - 1) - 1 - int(self.nan)

    @property
    def largest(self) -> float:
        """Largest finite value."""
        exponent, mantissa = divmod(self.largest_code, 2**self.mantissa)
        unit = 2.0 ** (exponent - 1 + self.low_exponent - self.mantissa)
        return (2**self.mantissa + mantissa) * unit

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value."""
        return -self.largest, self.largest

    @property
    def top_exponent(self) -> int:
        """Exponent of the largest value: ``emax`` of the MX specification."""
        return math.floor(math.log2(self.largest))

    def encode(
        self, x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
    ) -> jax.Array:
        """Nearest codes; beyond the largest value they saturate."""
        magnitude = jnp.minimum(jnp.abs(x), self.largest)
        exponent = jnp.maximum(floor_log2(magnitude), self.low_exponent)
        steps = magnitude * power_of_two(self.mantissa - exponent)
        n = round_to_integer(steps, rounding, noise).astype(jnp.int32)
        # A mantissa that rounds up to 2 carries into the exponent by itself.
        code = n + ((exponent - self.low_exponent) << self.mantissa)
        code = jnp.minimum(code, self.largest_code).astype(jnp.uint8)
        sign = (x < 0).astype(jnp.uint8) << jnp.uint8(self.bits - 1)
        return code | jnp.where(code > 0, sign, jnp.zeros_like(sign))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Values of codes, NaN and infinities included."""
        codes = codes.astype(jnp.int32) & (2**self.bits - 1)
        sign = 1 - 2 * (codes >> (self.bits - 1))
        code = codes & (2 ** (self.bits - 1) - 1)
        exponent, mantissa = code >> self.mantissa, code & (2**self.mantissa - 1)
        normal = jnp.minimum(exponent, 1) << self.mantissa
        unit = power_of_two(
            jnp.maximum(exponent, 1) - 1 + self.low_exponent - self.mantissa
        )
        value = (mantissa + normal).astype(jnp.float32) * unit
        if self.infinities or self.nan:
            beyond = code > self.largest_code
            infinite = self.infinities & (code == self.largest_code + 1)
            # As bits, so that a NaN exists only where a code says so.
            special = jnp.where(infinite, _INFINITY_BITS, _NAN_BITS)
            bits = jax.lax.bitcast_convert_type(value, jnp.int32)
            bits = jnp.where(beyond, special, bits)
            value = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return value * sign.astype(jnp.float32)


@static_type
class Table:
    """A grid given by its values: NF4, logarithmic, Lloyd-Max, any other.

    Attributes:
      values: Ascending, 2 to 256 of them.
      name: What reports call it.
    """

    values: tuple[float, ...]
    name: str = "table"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def label(self) -> str:
        """Its name."""
        return self.name

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value."""
        return self.values[0], self.values[-1]

    def encode(
        self, x: jax.Array, rounding: Rounding, noise: jax.Array | None = None
    ) -> jax.Array:
        """Nearest entries, ties to the lower one; or one of the two neighbours."""
        v = np.asarray(self.values, np.float32)
        if rounding == "nearest":
            return _count(x, (v[1:] + v[:-1]) / np.float32(2), strict=True)
        low = jnp.minimum(_count(x, v[1:], strict=False), np.uint8(len(v) - 2))
        grid = jnp.asarray(v)
        below, above = grid[low], grid[low + 1]
        part = jnp.clip((x - below) / (above - below), 0.0, 1.0)
        if rounding == "stochastic":
            assert noise is not None
            return low + (noise < part).astype(jnp.uint8)
        return low + ((part >= 1.0) | ((part > 0) & (x < 0))).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Values of codes."""
        return jnp.asarray(self.values, jnp.float32)[codes]


def _count(x: jax.Array, edges: np.ndarray, *, strict: bool) -> jax.Array:
    """How many ascending edges lie below each entry (or at it, if not strict)."""
    if len(edges) <= 16:
        count = jnp.zeros(x.shape, jnp.uint8)
        for edge in edges:
            count += (x > edge if strict else x >= edge).astype(jnp.uint8)
        return count
    side = "left" if strict else "right"
    return jnp.searchsorted(jnp.asarray(edges), x, side=side).astype(jnp.uint8)


Element = Integer | Ternary | Binary | Minifloat | Table

E4M3 = Minifloat(exponent=4, mantissa=3, nan=True)
E5M2 = Minifloat(exponent=5, mantissa=2, infinities=True)
E2M1 = Minifloat(exponent=2, mantissa=1)
E3M2 = Minifloat(exponent=3, mantissa=2)
E2M3 = Minifloat(exponent=2, mantissa=3)

NF4 = Table(name=formats.NF4.name, values=formats.NF4.values)


def logarithmic(bits: int) -> Table:
    """Zero and the signed powers of two ``2^0 .. 2^-(2^(bits-1) - 2)``.

    References:
      Miyashita et al., `Convolutional Neural Networks using Logarithmic Data
      Representation <https://arxiv.org/abs/1603.01025>`_, 2016, section 3.
      Differs: one code is spent on zero, so that pruned weights stay zero; nearest
      in value, not in the logarithm.
    """
    powers = [2.0**-i for i in range(2 ** (bits - 1) - 1)]
    values = sorted([0.0, *powers, *(-p for p in powers)])
    return Table(values=tuple(values), name=f"log{bits}")


def normal_quantiles(bits: int) -> Table:
    """Medians of ``2^bits - 1`` equally likely parts of a normal, scaled to [-1, 1].

    An odd number of parts, so that zero is one of them.

    References:
      Dettmers et al., QLoRA, 2023, section 3 (the idea of NormalFloat). Differs:
      symmetric, with one code left unused.
    """
    from statistics import NormalDist

    n = 2**bits - 1
    values = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
    values[n // 2] = 0.0
    return _scaled(values, f"normal{bits}")


def lloyd_max(bits: int, *, iterations: int = 2000) -> Table:
    """The grid of least mean squared error for a unit normal, scaled to [-1, 1].

    References:
      Max, `Quantizing for Minimum Distortion
      <https://doi.org/10.1109/TIT.1960.1057548>`_, 1960, eq. 4-6. Differs: an odd
      number of levels, so that zero is one of them.
    """
    from statistics import NormalDist

    normal = NormalDist()
    n = 2**bits - 1
    values = np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    for _ in range(iterations):
        edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        mass = np.diff([normal.cdf(e) for e in edges])
        values = -np.diff([normal.pdf(e) for e in edges]) / mass
    values = (values - values[::-1]) / 2
    return _scaled(values, f"lloyd_max{bits}")


def _scaled(values: np.ndarray, name: str) -> Table:
    return Table(values=tuple((values / np.abs(values).max()).tolist()), name=name)


def check_table(values: Sequence[float]) -> tuple[float, ...]:
    """The values of a `Table`, checked.

    Raises:
      ValueError: If they are not 2 to 256 finite, ascending numbers.
    """
    v = np.asarray(values, np.float64)
    if v.ndim != 1 or not 2 <= len(v) <= 256 or not np.isfinite(v).all():
        raise ValueError(
            "table: values must be 2 to 256 finite numbers; got an array of shape "
            f"{v.shape}. Pass the grid points in ascending order."
        )
    if not (np.diff(v.astype(np.float32)) > 0).all():
        raise ValueError(
            "table: values must be strictly ascending in float32; sort them and drop "
            f"duplicates. Got {values!r}."
        )
    return tuple(v.tolist())
