"""The matmul of a quantized weight with activations as they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax

from jaxcompress.leaf import Ran
from jaxcompress.quant._kernels import (
    as_matrices,
    kernel_operands,
    kernel_result,
    kernel_rows,
)
from kernels_pallas.layouts import PORTABLE
from kernels_pallas.quantized_matmul import choose, quantized_matmul
from kernels_pallas.target import current_target

if TYPE_CHECKING:
    from jaxcompress.quant._array import QuantizedArray
    from jaxcompress.quant._matmul import Site

LEAST = 2**18
"""Weights of a matrix from which on its kernel beats a dense copy on a CPU: 1 MB."""

MANY = 2**21
"""Weights from which on it does for any number of rows: a dense copy of 8 MB."""

FEW_ROWS = 32
"""Rows up to which it does for fewer weights than `MANY`."""


def has_kernel(leaf: QuantizedArray) -> bool:
    """Whether the device has more than a dequantized dot for a weight of this size."""
    return _core_size(leaf) >= LEAST and current_target().platform == "cpu"


def pays(leaf: QuantizedArray, x: jax.Array, site: Site) -> bool:
    """Whether the kernel beats a dequantized dot for so many rows."""
    rows = math.prod(x.shape[a] for a in site.free)
    return rows <= FEW_ROWS or _core_size(leaf) >= MANY


def _core_size(leaf: QuantizedArray) -> int:
    stack = len(leaf.shape) - len(leaf.layout.order)
    return math.prod(leaf.shape[stack:])


def weight_only_dot(leaf: QuantizedArray, x: jax.Array, site: Site, dtype: Any) -> Ran:
    """``x`` times the leaf, dequantized in the kernel.

    Args:
      leaf: Packed or not.
      x: Floating activations.
      site: How they meet.
      dtype: Of the result.
    """
    leaf = leaf.pack()
    weight, fmt = kernel_operands(leaf, site)
    rows = kernel_rows(x, site)
    matrices = as_matrices(rows, site)
    (m, k), n = matrices.shape[-2:], weight.words.shape[-2]
    choice = choose(m, n, k, fmt, layout=PORTABLE, target=current_target())
    y = quantized_matmul(matrices, weight, fmt, dtype=dtype)
    return Ran(kernel_result(y, rows, leaf, site), choice.how)
