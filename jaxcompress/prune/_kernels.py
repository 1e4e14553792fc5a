"""`use_kernels`: block-sparse weights multiplied by the device's sparse kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Ran, is_leaf, result_dtype
from jaxcompress.quant._kernels import as_matrices, kernel_result, kernel_rows
from jaxcompress.quant._matmul import Site
from kernels_pallas.block_sparse_matmul import (
    BlockSparse,
    block_sparse_matmul,
    choose,
)
from kernels_pallas.layouts import PORTABLE
from kernels_pallas.target import current_target

if TYPE_CHECKING:
    from jaxcompress.prune._block_array import BlockSparseArray


def use_kernels(params: Any) -> Any:
    """Let block-sparse weights run by the sparse kernel of the device in use.

    Once, after `compress` or `io.load`. On a CPU the kernel takes time for the blocks
    that are kept alone; on a TPU it wants blocks of multiples of 128. It adds up in
    another order than the dense product of the training view, which is why it has to be
    asked for. Weights whose blocks hold codes stay as they are, and so do those of N:M,
    for which a CPU's dense product is as fast. Files do not hold the choice.

    Args:
      params: A pytree with compressed leaves.

    Returns:
      The pytree; `explain` names the kernel that runs.

    Examples:
      >>> import jaxcompress as jc
      >>> pattern = jc.prune.blocks(sparsity=0.5, shape=(1, 2))
      >>> scheme = jc.prune.magnitude(sparsity=pattern)
      >>> w = jnp.array([[1.0], [4.0], [3.0], [3.0]])
      >>> packed = use_kernels(scheme.compress(*scheme.init({"w": w})))
      >>> jc.lift(lambda p, x: x @ p["w"])(packed, jnp.ones((1, 4))).tolist()
      [[6.0]]
    """

    def turn(leaf: Any) -> Any:
        return leaf.with_kernel() if hasattr(leaf, "with_kernel") else leaf

    return jax.tree.map(turn, params, is_leaf=is_leaf)


def block_dot(
    leaf: BlockSparseArray, x: jax.Array, site: Site, params: dict[str, Any]
) -> Ran:
    """``x`` times a block-sparse weight, by the kernel.

    Args:
      leaf: Its stack axes are the batch axes of the site.
      x: Floating activations.
      site: How they meet.
      params: Of the `dot_general`.
    """
    rows = kernel_rows(x, site)
    weight = BlockSparse(leaf.elements.astype(leaf.dtype), leaf.columns)
    matrices = as_matrices(rows, site)
    target = current_target()
    choice = choose(weight, matrices, layout=PORTABLE, target=target)
    dtype = result_dtype(x, leaf, params)
    y = block_sparse_matmul(matrices, weight, n=leaf.outputs, dtype=dtype)
    return Ran(kernel_result(y, rows, leaf.out_sizes, site), choice.how)


def block_site(
    leaf: BlockSparseArray, x: jax.Array, dimension_numbers: Any, leaf_is_lhs: bool
) -> Site | None:
    """How they meet, if the kernel can run: floats, and the stack batched."""
    site = Site.of(leaf, x, dimension_numbers, leaf_is_lhs)
    if site is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    batched = tuple(s for _, s in site.batch)
    return site if batched == tuple(range(leaf.stack)) else None
