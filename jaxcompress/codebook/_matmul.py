"""The matmul of a codebook weight by `kernels_pallas.codebook_matmul`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Ran, result_dtype
from jaxcompress.quant._kernels import as_matrices, kernel_result, kernel_rows
from jaxcompress.quant._matmul import Site
from kernels_pallas.codebook_matmul import CodebookWeight, choose, codebook_matmul
from kernels_pallas.layouts import PORTABLE
from kernels_pallas.target import current_target

if TYPE_CHECKING:
    from jaxcompress.codebook._array import CodebookArray

LEAST = 2**21
"""Weights of a matrix from which on its kernel beats a dense copy on a CPU: 8 MB."""


def has_kernel(leaf: CodebookArray) -> bool:
    """Whether the device has more than a dequantized dot for a weight of this size."""
    stack = len(leaf.shape) - len(leaf.layout.order)
    size = math.prod(leaf.shape[stack:])
    return size >= LEAST and current_target().platform == "cpu"


def site_of(
    leaf: CodebookArray, x: jax.Array, dimension_numbers: Any, leaf_is_lhs: bool
) -> Site | None:
    """How they meet, if the kernel can run: floats, codebooks along batch axes only."""
    site = Site.of(leaf, x, dimension_numbers, leaf_is_lhs)
    if site is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    batch = tuple(s for _, s in site.batch)
    return site if batch[: leaf.own] == tuple(range(leaf.own)) else None


def codebook_dot(
    leaf: CodebookArray, x: jax.Array, site: Site, params: dict[str, Any]
) -> Ran:
    """``x`` times a codebook weight.

    Args:
      leaf: Its axes with codebooks of their own are the first batch axes of the site.
      x: Floating activations.
      site: How they meet.
      params: Of the `dot_general`.
    """
    leaf = leaf.pack()
    weight, out = operand(leaf, tuple(s for _, s in site.batch))
    rows = kernel_rows(x, site)
    matrices = as_matrices(rows, site)
    dtype = result_dtype(x, leaf, params)
    y = codebook_matmul(matrices.astype(dtype), weight, bits=leaf.bits)
    m, k = matrices.shape[-2:]
    shape = weight.codebooks.shape[-4:]
    choice = choose(
        m, math.prod(out), k, shape, layout=PORTABLE, target=current_target()
    )
    return Ran(kernel_result(y, rows, out, site), choice.how)


def operand(
    leaf: CodebookArray, batch: tuple[int, ...]
) -> tuple[CodebookWeight, tuple[int, ...]]:
    """A packed leaf as the kernel reads it, and the sizes of the axes it merges.

    Args:
      leaf: Packed.
      batch: Storage axes to put in front.
    """
    outputs = leaf.words.shape[:-2]
    n = len(batch)

    def arrange(a: jax.Array) -> jax.Array:
        a = jnp.moveaxis(a, batch, range(n))
        return a.reshape(*a.shape[:n], -1, *a.shape[len(outputs) :])

    books = leaf.entries()
    core = books.shape[leaf.own :]
    books = books.reshape(*books.shape[: leaf.own], *(1,) * (n - leaf.own), *core)
    books = jnp.broadcast_to(books, (*(outputs[s] for s in batch), *core))
    scale = None if leaf.scale is None else arrange(leaf.scale)
    rest = tuple(size for i, size in enumerate(outputs) if i not in batch)
    return CodebookWeight(arrange(leaf.words), books, scale), rest
