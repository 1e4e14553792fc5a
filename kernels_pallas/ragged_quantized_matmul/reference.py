"""``x[i] @ dequantize(w[expert of i]).T`` in plain `jax.numpy`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul.reference import dequantize


def ragged_quantized_matmul(
    x: jax.Array, weight: Weight, group_sizes: jax.Array, fmt: Format
) -> jax.Array:
    """Every row with every expert, then the one that is its own.

    Args:
      x: ``float[M, K]``, rows sorted by expert.
      weight: In the portable layout, ``[E, N, K]``.
      group_sizes: ``int32[E]``: rows of each expert.
      fmt: What the codes stand for.

    Returns:
      ``float32[M, N]``; rows past the last expert's are zero.
    """
    m, k = x.shape
    w = jax.vmap(lambda w: dequantize(w, fmt, k=k))(weight)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(m, dtype=ends.dtype)[:, None]
    own = (row >= (ends - group_sizes)[None]) & (row < ends[None])
    y = jnp.einsum("mk,enk->men", x.astype(jnp.float32), w, precision="highest")
    return jnp.where(own[..., None], y, 0.0).sum(1)
