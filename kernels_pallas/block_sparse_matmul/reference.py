"""``x @ unpack(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_matmul.layout import BlockSparse, unpack
from kernels_pallas.formats import Format


def block_sparse_matmul(
    x: jax.Array, weight: BlockSparse, fmt: Format | None, *, n: int
) -> jax.Array:
    """Put the blocks in their places, then multiply in float32.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What the codes of its values stand for; None if they are floats.
      n: Outputs.

    Returns:
      ``float32[M, N]``.
    """
    w = unpack(weight, fmt, n=n, k=x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
