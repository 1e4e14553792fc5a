"""Block-sparse matmul by plain XLA: what runs on a CPU, and where no kernel fits.

The blocks of x that a row of blocks names are gathered, and the row is one dot over all
of them. A CPU takes the rows one after the other, so that neither the gathered inputs
nor dequantized blocks leave the cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_matmul.layout import (
    BlockSparse,
    block_shape,
    dense_blocks,
    slots,
)
from kernels_pallas.chunks import map_rows
from kernels_pallas.formats import Format
from kernels_pallas.values import floats, with_floats


def block_sparse_matmul(
    x: jax.Array,
    weight: BlockSparse,
    fmt: Format | None,
    *,
    at_once: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """``x @ unpack(weight).T``.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      at_once: Rows of blocks to multiply at a time. Static.
      dtype: Of the products; sums are float32. Static.

    Returns:
      ``float32[M, R bn]``.
    """
    blocks = _blocks(x.astype(dtype), block_shape(weight.values, fmt)[1])

    def rows(part: BlockSparse) -> jax.Array:
        w = dense_blocks(part.values, fmt).astype(dtype)
        return _product(w, blocks[slots(part.columns, len(blocks) - 1)])

    y = map_rows(rows, weight, at_once)
    return y.reshape(-1, y.shape[-1]).T


def gradients(
    dy: jax.Array,
    x: jax.Array,
    weight: BlockSparse,
    fmt: Format | None,
    *,
    at_once: int,
) -> tuple[jax.Array, Any]:
    """Cotangents of x and of what `floats` finds in the values.

    Args:
      dy: ``float[M, R bn]``.
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: As for `block_sparse_matmul`.
      at_once: Rows of blocks at a time, a divisor of R. Static.

    Returns:
      ``float32[M, K]``, and the others in the shapes and dtypes of what they belong to.
    """
    bn, bk = block_shape(weight.values, fmt)
    blocks = _blocks(x.astype(jnp.float32), bk)
    split = lambda a: a.reshape(-1, at_once, *a.shape[1:])
    dy = dy.astype(jnp.float32).T.reshape(-1, at_once, bn, len(dy))

    def step(dx: jax.Array, part: tuple[BlockSparse, jax.Array]) -> Any:
        weight, dy = part
        at = slots(weight.columns, len(blocks) - 1)

        def product(values: Any, gathered: jax.Array) -> jax.Array:
            w = dense_blocks(with_floats(weight.values, values), fmt)
            return _product(w.astype(jnp.float32), gathered)

        _, back = jax.vjp(product, floats(weight.values), blocks[at])
        dvalues, dgathered = back(dy)
        return dx.at[at].add(dgathered), dvalues

    parts = (jax.tree.map(split, weight), dy)
    dx, dvalues = jax.lax.scan(step, jnp.zeros_like(blocks), parts)
    dx = dx[:-1].reshape(-1, len(x)).T[:, : x.shape[1]]
    return dx, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), dvalues)


def _blocks(x: jax.Array, bk: int) -> jax.Array:
    """``[B + 1, bk, M]``: the blocks of x, and one of zeros for empty places."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % bk + bk)))
    return padded.T.reshape(-1, bk, len(x))


def _product(w: jax.Array, x: jax.Array) -> jax.Array:
    """``float32[r, bn, M]`` of blocks ``[r, C, bn, bk]`` and ``[r, C, bk, M]``."""
    rows, places, bn, bk = w.shape
    w = w.swapaxes(1, 2).reshape(rows, bn, places * bk)
    x = x.reshape(rows, places * bk, -1)
    return jnp.matmul(w, x, precision="highest", preferred_element_type=jnp.float32)
