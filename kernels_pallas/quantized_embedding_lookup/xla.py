"""The rows of codes are gathered, and only they are dequantized.

Plain XLA is the right form on every device: a gather of whole rows moves
``K b / 8`` contiguous bytes a token, and what follows is fused elementwise work. A
kernel would issue the same copies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_embedding_lookup.reference import Mode
from kernels_pallas.quantized_matmul.reference import dequantize


def quantized_embedding_lookup(
    ids: jax.Array, weight: Weight, fmt: Format, *, k: int, mode: Mode
) -> jax.Array:
    """Take rows, then dequantize them.

    Args:
      ids: ``integer[T]``.
      weight: Portable, a row a token, ``[V, K]``.
      fmt: What its codes stand for. Static.
      k: Size of a row. Static.
      mode: Of `jnp.take`. The scale that ``"fill"`` finds for an id outside is NaN, so
        the row is. Static.

    Returns:
      ``float32[T, K]``.
    """
    take = lambda a: jnp.take(a, ids, axis=0, mode=mode)
    return dequantize(jax.tree.map(take, weight), fmt, k=k)
