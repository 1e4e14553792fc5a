"""The matmul of a quantized weight with activations as they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax

from jaxcompress.leaf import Ran
from jaxcompress.quant._kernels import (
    Operand,
    as_matrices,
    kernel_result,
    kernel_rows,
)
from kernels_pallas.quantized_matmul import choose, quantized_matmul
from kernels_pallas.ragged_quantized_matmul import choose as choose_ragged
from kernels_pallas.ragged_quantized_matmul import ragged_quantized_matmul
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
    if leaf.words is None:  # A frame, whose elements another leaf stores.
        return False
    return _core_size(leaf) >= LEAST and current_target().platform == "cpu"


def pays(leaf: QuantizedArray, x: jax.Array, site: Site) -> bool:
    """Whether the kernel beats a dequantized dot for so many rows."""
    rows = math.prod(x.shape[a] for a in site.free)
    return rows <= FEW_ROWS or _core_size(leaf) >= MANY


def _core_size(leaf: QuantizedArray) -> int:
    stack = len(leaf.shape) - len(leaf.layout.order)
    return math.prod(leaf.shape[stack:])


def by_experts(leaf: Any, numbers: Any) -> bool:
    """Whether a ragged dot multiplies rows ``[M, K]`` by the matrices of a leaf.

    Args:
      leaf: ``[E, K, N]`` or ``[E, N, K]``, with its layout.
      numbers: `jax.lax.RaggedDotDimensionNumbers`.
    """
    (rows, contract), (_, batch) = numbers.dot_dimension_numbers
    rank = len(leaf.shape)
    layout = leaf.layout.absorb_stack(rank - len(leaf.layout.order))
    return (
        rank == 3
        and not batch
        and tuple(rows) == (1,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and layout.contract == tuple(a - rank for a in contract)
        and layout.out[0] == -rank
    )


def ragged_weight_only_dot(
    operand: Operand, x: jax.Array, group_sizes: jax.Array, dtype: Any
) -> Ran:
    """Rows times the weights of their experts, dequantized in the kernel.

    Args:
      operand: The weights, ``[E, N, ...]``.
      x: ``float[M, K]``.
      group_sizes: ``int32[E]``.
      dtype: Of the result.
    """
    y = ragged_quantized_matmul(
        x, operand.weight, group_sizes, operand.fmt, dtype=dtype, **operand.options
    )
    return Ran(y, choose_ragged(operand.fmt, layout=operand.layout).how)


def weight_only_dot(operand: Operand, x: jax.Array, site: Site, dtype: Any) -> Ran:
    """``x`` times a weight, dequantized in the kernel.

    Args:
      operand: The weight, its batch axes those of the site.
      x: Floating activations.
      site: How they meet.
      dtype: Of the result.
    """
    rows = kernel_rows(x, site)
    matrices = as_matrices(rows, site)
    m, k = matrices.shape[-2:]
    n, fmt, layout = math.prod(operand.out), operand.fmt, operand.layout
    choice = choose(m, n, k, fmt, layout=layout, target=current_target())
    y = quantized_matmul(matrices, operand.weight, fmt, dtype=dtype, **operand.options)
    return Ran(kernel_result(y, rows, operand.out, site), choice.how)
