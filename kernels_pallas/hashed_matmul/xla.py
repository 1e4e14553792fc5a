"""Hashed matmul by plain XLA: what runs on a CPU, and where no kernel fits."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import map_rows
from kernels_pallas.hashed_matmul.reference import Hashing, Origin
from kernels_pallas.hashing import bucket, murmur3, negative

CHUNK = 2**20
"""Weights that are dense at a time: 4 MB of float32."""


def hashed_matmul(
    x: jax.Array,
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    origin: Origin = (0, 0),
    chunk: int = CHUNK,
) -> jax.Array:
    """Look some rows of the weight up, multiply, go on.

    Differentiable: the rows are looked up again for the gradients.

    Args:
      x: ``float[M, K]``.
      buckets: ``float[B]``.
      hashing: Which bucket a weight is. Static.
      n: Outputs. Static.
      origin: Where in the whole weight this part of it begins, in whole blocks.
      chunk: Weights to look up at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    k, bk = x.shape[-1], hashing.block[1]
    table = buckets.astype(jnp.float32).reshape(-1, bk)
    x = x.astype(jnp.float32)
    first, left = (jnp.asarray(o, jnp.int32) for o in origin)
    columns = left // bk + jnp.arange(-(-k // bk), dtype=jnp.int32)

    def multiplied(rows: jax.Array) -> jax.Array:
        w = _rows(table, rows, columns, hashing).reshape(len(rows), -1)[:, :k]
        return jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision="highest")

    multiplied = jax.checkpoint(multiplied, prevent_cse=False)
    rows = first + jnp.arange(n, dtype=jnp.int32)
    return map_rows(multiplied, rows, max(1, chunk // k)).T


def _rows(
    table: jax.Array, rows: jax.Array, columns: jax.Array, hashing: Hashing
) -> jax.Array:
    """``float32[rows, columns, bk]`` of a table ``[R, bk]``, by columns of blocks."""
    count, rows = len(table), rows[:, None]
    block = (rows // hashing.block[0]).astype(jnp.uint32)
    h = murmur3(block, columns[None].astype(jnp.uint32), seed=hashing.seed)
    line = bucket(h, count) + jax.lax.rem(rows, jnp.full_like(rows, hashing.block[0]))
    line = line if hashing.block[0] == 1 else line % jnp.int32(count)
    values = table.at[line].get(mode="promise_in_bounds")
    return jnp.where(negative(h)[..., None], -values, values)
