"""`NumberFormat`: everything about how a weight is quantized, and its constructors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxcompress.layout import Axes
from jaxcompress.leaf import static_type
from jaxcompress.quant._activations import Activations
from jaxcompress.quant._elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    Binary,
    Element,
    Integer,
    Minifloat,
    Table,
    Ternary,
    check_table,
    lloyd_max,
    logarithmic,
    normal_quantiles,
)
from jaxcompress.quant._granularity import Granularity, PerChannel, PerGroup
from jaxcompress.quant._ranges import HQQ, Search
from jaxcompress.quant._rounding import ROUNDINGS, Rounding

ScaleFormat = Literal["float32", "bfloat16", "float16", "e8m0", "nvfp4"]
SCALE_FORMATS = ("float32", "bfloat16", "float16", "e8m0", "nvfp4")


@static_type
class NumberFormat:
    """A number format for weights; stands for `weights(format)` as a rule.

    Attributes:
      element: What a code stands for.
      granularity: Which weights share a scale.
      scale: How scales are stored: a float dtype, ``"e8m0"`` (powers of two), or
        ``"nvfp4"`` (e4m3, with one float32 scale a tensor).
      axes: Roles of the weight's axes, or its contracting axes; None for a plain
        matrix, or to take them from the traced function.
      rounding: Of codes.
      clip_gradient: Pass the gradient only where the grid does not clip.
      search: How the range of a block is found; None for its largest weight.
      activations: How the matmul treats its other operand; None leaves it alone.
      label: What reports call it, where the parts do not say.
    """

    element: Element
    granularity: Granularity = PerChannel()
    scale: ScaleFormat = "float32"
    axes: Axes | int | tuple[int, ...] | None = None
    rounding: Rounding = "nearest"
    clip_gradient: bool = False
    activations: Activations | None = None
    label: str = ""
    search: Search | None = None

    @property
    def name(self) -> str:
        """``"int4 g128"``, for reports."""
        base = self.label or f"{self.element.label}{self.granularity.label}"
        base = f"{base} {self.search.label}" if self.search else base
        return f"{base} + {self.activations.label}" if self.activations else base

    def replace(self, **changes: Any) -> NumberFormat:
        """A copy with some attributes replaced."""
        return dataclasses.replace(self, **changes)

    def as_transform(self) -> Any:
        """The weight transform of this format."""
        from jaxcompress.quant._weights import weights

        return weights(self)


def number_format(
    element: Element,
    *,
    group_size: int | None = None,
    granularity: Granularity | None = None,
    scale_dtype: Any = np.float32,
    axes: Axes | int | tuple[int, ...] | None = None,
    rounding: Rounding = "nearest",
    clip_gradient: bool = False,
    search: Search | None = None,
    activations: Activations | None = None,
) -> NumberFormat:
    """A format with a floating scale for each group, or output channel, or as said.

    Args:
      element: What a code stands for.
      group_size: Consecutive inputs that share a scale; divides the contracting axes.
      granularity: Instead of `group_size`: `PerTensor`, `PerChannel`, `Block2D`.
      scale_dtype: float32, bfloat16 or float16.
      axes: Contracting axes of the weight, negative, or `Axes`; see `resolve_axes`.
      rounding: ``"nearest"``, ``"stochastic"`` (needs a key) or ``"toward_zero"``.
      clip_gradient: Clipped straight-through: no gradient beyond the grid.
      search: `mse()`, `percentile(...)` or `hqq()`: the range of a block, where it is
        not to be that of its largest weight.
      activations: `dynamic(...)` or `static(...)`.

    Raises:
      ValueError: If both `group_size` and `granularity` are given, or an option is
        none of those named.
    """
    if group_size is not None and granularity is not None:
        raise ValueError(
            f"{element.label}: give group_size or granularity, not both; got "
            f"{group_size} and {granularity}."
        )
    if group_size is not None and group_size < 1:
        raise ValueError(
            f"{element.label}: group_size must be positive; got {group_size}."
        )
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"{element.label}: rounding must be one of {ROUNDINGS}; got {rounding!r}."
        )
    scale = np.dtype(scale_dtype).name
    if scale not in SCALE_FORMATS[:3]:
        raise ValueError(
            f"{element.label}: scale_dtype must be one of {SCALE_FORMATS[:3]}; got "
            f"{scale}."
        )
    if search is not None and isinstance(element, Binary | Ternary):
        raise ValueError(
            f"{element.label}: search must be left out; the scale is a mean, already "
            f"that of least squared error. Got {search}."
        )
    if granularity is None:
        granularity = PerChannel() if group_size is None else PerGroup(size=group_size)
    return NumberFormat(
        element=element,
        granularity=granularity,
        scale=scale,
        axes=axes if not isinstance(axes, list) else tuple(axes),
        rounding=rounding,
        clip_gradient=clip_gradient,
        search=search,
        activations=activations,
    )


def integer(
    bits: int, *, symmetric: bool = True, narrow: bool | None = None, **options: Any
) -> NumberFormat:
    r"""Integers of 2 to 8 bits: symmetric, or with a zero point.

    .. math::
        q = \operatorname{clip}(\lfloor w/s \rceil, -Q, Q), \quad
        q = \operatorname{clip}(\lfloor w/s \rceil + z, 0, 2^b - 1)

    with :math:`s = \max|w| / Q`, :math:`Q = 2^{b-1} - 1`; or
    :math:`s = (\max(w, 0) - \min(w, 0)) / (2^b - 1)`, so that zero is on the grid.

    Args:
      bits: 2 to 8.
      symmetric: Without a zero point.
      narrow: Leave out the lowest code; by default if symmetric.
      **options: As for `number_format`: ``group_size=128``, ``axes=-2``, ...

    Raises:
      ValueError: If `bits` is out of range.

    References:
      Jacob et al., `Quantization and Training of Neural Networks
      <https://arxiv.org/abs/1712.05877>`_, 2018, eq. 1 and 13.
    """
    if not 2 <= bits <= 8:
        raise ValueError(
            f"integer: bits must be 2 to 8; got {bits}. One bit is binary()."
        )
    narrow = symmetric if narrow is None else narrow
    element = Integer(bits=bits, symmetric=symmetric, narrow=narrow)
    return number_format(element, **options)


def int2(**options: Any) -> NumberFormat:
    """2-bit `integer`."""
    return integer(2, **options)


def int3(**options: Any) -> NumberFormat:
    """3-bit `integer`."""
    return integer(3, **options)


def int4(**options: Any) -> NumberFormat:
    """4-bit `integer`.

    Examples:
      >>> int4(group_size=128).name, int4(symmetric=False).name
      ('int4 g128', 'uint4')
    """
    return integer(4, **options)


def int5(**options: Any) -> NumberFormat:
    """5-bit `integer`."""
    return integer(5, **options)


def int6(**options: Any) -> NumberFormat:
    """6-bit `integer`."""
    return integer(6, **options)


def int7(**options: Any) -> NumberFormat:
    """7-bit `integer`."""
    return integer(7, **options)


def int8(**options: Any) -> NumberFormat:
    """8-bit `integer`."""
    return integer(8, **options)


def ternary(**options: Any) -> NumberFormat:
    r""":math:`\{-\alpha, 0, \alpha\}`: zero below :math:`0.7\,\overline{|w|}`.

    References:
      Li et al., `Ternary Weight Networks <https://arxiv.org/abs/1605.04711>`_, 2016,
      eq. 3, 5 and 6.
    """
    return number_format(Ternary(), **options)


def binary(**options: Any) -> NumberFormat:
    r""":math:`\operatorname{sign}(w)\,\overline{|w|}`; zero counts as positive.

    References:
      Rastegari et al., `XNOR-Net <https://arxiv.org/abs/1603.05279>`_, 2016, eq. 6.
    """
    return number_format(Binary(), **options)


def fp8_e4m3(**options: Any) -> NumberFormat:
    """8-bit float, largest 448, no infinities."""
    return number_format(E4M3, **options)


def fp8_e5m2(**options: Any) -> NumberFormat:
    """8-bit float, largest 57344; saturates instead of overflowing."""
    return number_format(E5M2, **options)


def fp6_e3m2(**options: Any) -> NumberFormat:
    """6-bit float, largest 28."""
    return number_format(E3M2, **options)


def fp6_e2m3(**options: Any) -> NumberFormat:
    """6-bit float, largest 7.5."""
    return number_format(E2M3, **options)


def fp4_e2m1(**options: Any) -> NumberFormat:
    """4-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    return number_format(E2M1, **options)


def nf4(**options: Any) -> NumberFormat:
    """4-bit NormalFloat: 16 values fitted to a normal distribution.

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, appendix E.
    """
    return number_format(NF4, **options)


def log(bits: int, **options: Any) -> NumberFormat:
    """Zero and signed powers of two, in `bits` bits; see `logarithmic`."""
    return number_format(logarithmic(_table_bits("log", bits)), **options)


def normal(bits: int, **options: Any) -> NumberFormat:
    """Quantiles of a normal distribution; see `normal_quantiles`."""
    return number_format(normal_quantiles(_table_bits("normal", bits)), **options)


def lloyd(bits: int, **options: Any) -> NumberFormat:
    """The grid of least squared error for a normal distribution; see `lloyd_max`."""
    return number_format(lloyd_max(_table_bits("lloyd", bits)), **options)


def table(
    values: Sequence[float], *, name: str = "table", **options: Any
) -> NumberFormat:
    """Any grid, given by its values; a block's largest weight is scaled to the largest.

    Args:
      values: 2 to 256 ascending numbers.
      name: What reports call it.
      **options: As for `number_format`.

    Raises:
      ValueError: If the values are not ascending, finite, or of that number.
    """
    return number_format(Table(values=check_table(values), name=name), **options)


def _table_bits(who: str, bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"{who}: bits must be 2 to 8; got {bits}.")
    return bits


def _block(
    element: Element, scale: ScaleFormat, size: int, label: str, options: dict[str, Any]
) -> NumberFormat:
    """A block float: the block and the scale's format belong to the standard."""
    if fixed := {"group_size", "granularity", "scale_dtype"} & options.keys():
        raise ValueError(
            f"{label}: {sorted(fixed)} are fixed by the format; leave them out."
        )
    if isinstance(options.get("search"), HQQ):
        raise ValueError(
            f"{label}: hqq() solves floating scales, and those of the format are of a "
            "few bits; use search=mse()."
        )
    base = number_format(element, group_size=size, **options)
    return base.replace(scale=scale, label=label)


def mxfp8(*, element: Minifloat = E4M3, **options: Any) -> NumberFormat:
    """Blocks of 32 fp8 values (e4m3, or ``element=E5M2``) with a shared power of two.

    References:
      OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3.
    """
    return _block(element, "e8m0", 32, f"mx{element.label}", options)


def mxfp6(*, element: Minifloat = E3M2, **options: Any) -> NumberFormat:
    """Blocks of 32 fp6 values (e3m2, or ``element=E2M3``) and a shared power of two."""
    return _block(element, "e8m0", 32, f"mx{element.label}", options)


def mxfp4(**options: Any) -> NumberFormat:
    """Blocks of 32 fp4 (e2m1) values with a shared power of two.

    Examples:
      >>> mxfp4().name
      'mxfp4'
    """
    return _block(E2M1, "e8m0", 32, "mxfp4", options)


def mxint8(**options: Any) -> NumberFormat:
    """Blocks of 32 int8 values with 6 binary places and a shared power of two."""
    return _block(Integer(bits=8, fraction=6), "e8m0", 32, "mxint8", options)


def nvfp4(**options: Any) -> NumberFormat:
    """Blocks of 16 fp4 (e2m1) values, an e4m3 scale each, one float32 scale a tensor.

    References:
      NVIDIA, Pretraining Large Language Models with NVFP4,
      https://arxiv.org/abs/2509.25149, 2025, appendix B.
    """
    return _block(E2M1, "nvfp4", 16, "nvfp4", options)
