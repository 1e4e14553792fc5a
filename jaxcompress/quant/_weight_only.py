"""The matmul of a quantized weight with activations as they are, by the kernels."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Ran
from jaxcompress.quant._elements import (
    E4M3,
    E5M2,
    Binary,
    Element,
    Integer,
    Minifloat,
    Table,
    Ternary,
)
from kernels_pallas import formats
from kernels_pallas.layouts import PORTABLE, Weight
from kernels_pallas.quantized_matmul import choose, quantized_matmul
from kernels_pallas.target import current_target

if TYPE_CHECKING:
    from jaxcompress.quant._array import QuantizedArray
    from jaxcompress.quant._matmul import Site

LEAST = 2**18
"""Weights of a matrix from which on its kernel beats a dense copy on a CPU: 1 MB."""


def has_kernel(leaf: QuantizedArray) -> bool:
    """Whether the device has more than a dequantized dot for a weight of this size."""
    stack = len(leaf.shape) - len(leaf.layout.order)
    large = math.prod(leaf.shape[stack:]) >= LEAST
    return large and current_target().platform == "cpu"


def weight_only_dot(leaf: QuantizedArray, x: jax.Array, site: Site, dtype: Any) -> Ran:
    """``x`` times the leaf, dequantized in the kernel.

    Args:
      leaf: Packed or not.
      x: Floating activations.
      site: How they meet.
      dtype: Of the result.
    """
    fmt, unit = kernel_format(leaf.element)
    leaf = leaf.pack()
    weight = _weight(leaf, site, unit)
    axes = tuple(a for a, _ in site.batch)
    rows = jnp.transpose(x, (*axes, *site.free, *site.contract))
    lead = rows.shape[: len(axes) + len(site.free)]
    rows = rows.reshape(*lead, -1)
    choice = choose(
        math.prod(lead[len(axes) :]),
        weight.words.shape[-2],
        rows.shape[-1],
        fmt,
        layout=PORTABLE,
        target=current_target(),
    )
    y = quantized_matmul(rows, weight, fmt, dtype=dtype)
    batch = {s for _, s in site.batch}
    out = [n for i, n in enumerate(leaf.words.shape[:-1]) if i not in batch]
    return Ran(jnp.transpose(y.reshape(*lead, *out), site.order), choice.how)


def _weight(leaf: QuantizedArray, site: Site, unit: float) -> Weight:
    """Storage as the kernels read it, ``[*batch, N, ...]``."""
    batch = tuple(s for _, s in site.batch)
    outputs = leaf.words.shape[:-1]

    def arrange(a: jax.Array) -> jax.Array:
        for axis, n in enumerate(outputs):
            if a.shape[axis] not in (1, n):
                a = jnp.repeat(a, n // a.shape[axis], axis=axis)
        a = jnp.broadcast_to(a, (*outputs, a.shape[-1]))
        a = jnp.moveaxis(a, batch, range(len(batch)))
        return a.reshape(*a.shape[: len(batch)], -1, a.shape[-1])

    zero = None if leaf.zero_point is None else arrange(leaf.zero_point)
    return Weight(arrange(leaf.words), arrange(leaf.scales() * unit), zero)


@functools.cache
def kernel_format(element: Element) -> tuple[formats.Format, float]:
    """The kernels' name for an element, and what its scale is multiplied by."""
    match element:
        case Integer():
            fmt = formats.Integer(element.bits, signed=element.symmetric)
            return fmt, 2.0**-element.fraction
        case Ternary():
            return formats.INT2, 1.0
        case Binary():
            return formats.Table(values=(-1.0, 1.0), name="binary"), 1.0
        case Table():
            return formats.Table(values=element.values, name=element.name), 1.0
        case _ if element == E4M3:
            return formats.FP8_E4M3, 1.0
        case _ if element == E5M2:
            return formats.FP8_E5M2, 1.0
        case Minifloat():
            return formats.Table(values=_values(element), name=element.label), 1.0


def _values(element: Minifloat) -> tuple[float, ...]:
    """What each code stands for, of an element without NaN."""
    unit = element.low_exponent - element.mantissa
    half = []
    for code in range(2 ** (element.bits - 1)):
        exponent, mantissa = divmod(code, 2**element.mantissa)
        whole = mantissa + (2**element.mantissa if exponent else 0)
        half.append(math.ldexp(whole, max(exponent, 1) - 1 + unit))
    return (*half, *(-v for v in half))
