"""``x @ unpack(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.nm_sparse_matmul.layout import NMSparse, unpack


def nm_sparse_matmul(
    x: jax.Array, weight: NMSparse, fmt: Format | None, *, n: int, m: int
) -> jax.Array:
    """Put the kept weights in their places, then multiply in float32.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What the codes of its values stand for; None if they are floats.
      n: Weights kept.
      m: Of so many.

    Returns:
      ``float32[M, N]``.
    """
    w = unpack(weight, fmt, n=n, m=m, k=x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
