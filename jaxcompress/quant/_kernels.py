"""Between a quantized leaf and the kernels, which read ``[*batch, N, ...]``."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

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
from kernels_pallas.layouts import PORTABLE, Layout, Weight

if TYPE_CHECKING:
    from jaxcompress.quant._array import QuantizedArray
    from jaxcompress.quant._matmul import Site


class Operand(NamedTuple):
    """A weight as a kernel takes it.

    Attributes:
      weight: ``[*batch, N, ...]`` in `layout`.
      fmt: What its codes stand for.
      out: Sizes of the storage axes that N merges.
      layout: How the weight lies.
      groups: Groups of inputs.
    """

    weight: Weight
    fmt: formats.Format
    out: tuple[int, ...]
    layout: Layout
    groups: int

    @property
    def options(self) -> dict[str, Any]:
        """What the kernels need to be told of the layout."""
        n = math.prod(self.out)
        return {"n": n, "groups": self.groups, "layout": self.layout}


def portable_operand(leaf: QuantizedArray, batch: tuple[int, ...]) -> Operand:
    """A packed leaf with the storage axes `batch` in front, scales spread over outputs.

    Args:
      leaf: Packed.
      batch: Storage axes.
    """
    fmt, unit = kernel_format(leaf.element)
    outputs = leaf.words.shape[:-1]

    def arrange(a: jax.Array) -> jax.Array:
        for axis, n in enumerate(outputs):
            if a.shape[axis] not in (1, n):
                a = jnp.repeat(a, n // a.shape[axis], axis=axis)
        a = jnp.broadcast_to(a, (*outputs, a.shape[-1]))
        a = jnp.moveaxis(a, batch, range(len(batch)))
        return a.reshape(*a.shape[: len(batch)], -1, a.shape[-1])

    zero = None if leaf.zero_point is None else arrange(leaf.zero_point)
    return Operand(
        Weight(arrange(leaf.words), arrange(leaf.scales() * unit), zero),
        fmt,
        out=tuple(n for i, n in enumerate(outputs) if i not in batch),
        layout=PORTABLE,
        groups=leaf.scale.shape[-1],
    )


def kernel_rows(x: jax.Array, site: Site) -> jax.Array:
    """Activations ``[*batch, *free, K]``, the contracted axes in storage order."""
    axes = (*(a for a, _ in site.batch), *site.free, *site.contract)
    x = jnp.transpose(x, axes)
    return x.reshape(*x.shape[: x.ndim - len(site.contract)], -1)


def as_matrices(rows: jax.Array, site: Site) -> jax.Array:
    """``[*batch, *free, ...]`` with one free axis: ``[*batch, M, ...]``."""
    return rows.reshape(*rows.shape[: len(site.batch)], -1, rows.shape[-1])


def kernel_result(
    y: jax.Array, rows: jax.Array, out: tuple[int, ...], site: Site
) -> jax.Array:
    """A kernel's ``[*batch, M, N]`` with the axes of the `dot_general`."""
    return jnp.transpose(y.reshape(*rows.shape[:-1], *out), site.order)


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
