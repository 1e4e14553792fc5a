"""``x @ dequantize(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.codebook_matmul.layout import CodebookWeight, vectors


def dequantize(weight: CodebookWeight, *, bits: int, k: int) -> jax.Array:
    """The dense weight.

    Args:
      weight: In the portable layout. A code past the last entry reads the last.
      bits: Of a code.
      k: Inputs.

    Returns:
      ``float32[N, K]``.
    """
    blocks, books, entries, _ = weight.codebooks.shape
    n, count = weight.words.shape[0], vectors(weight, k)
    codes = packing.unpack(weight.words, bits=bits, count=count).astype(jnp.int32)
    block = jnp.arange(count) * blocks // count
    read = weight.codebooks.astype(jnp.float32)[
        block[None, None, :],
        jnp.arange(books)[None, :, None],
        jnp.minimum(codes, entries - 1),
    ]
    w = read.sum(axis=1).reshape(n, -1)[:, :k]
    return w if weight.scale is None else w * weight.scale.astype(jnp.float32)[:, None]


def codebook_matmul(x: jax.Array, weight: CodebookWeight, *, bits: int) -> jax.Array:
    """Dequantize, then multiply in float32.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      bits: Of a code.

    Returns:
      ``float32[M, N]``.
    """
    w = dequantize(weight, bits=bits, k=x.shape[-1])
    return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
