"""``jnp.take(dequantize(w), ids, axis=0)``: what every form must agree with."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul.reference import dequantize

Mode = Literal["clip", "fill"]


def quantized_embedding_lookup(
    ids: jax.Array, weight: Weight, fmt: Format, *, k: int, mode: Mode
) -> jax.Array:
    """Dequantize the whole table, then take rows.

    Args:
      ids: ``integer[...]``.
      weight: Portable, a row a token, ``[V, K]``.
      fmt: What its codes stand for.
      k: Size of a row.
      mode: Of `jnp.take`.

    Returns:
      ``float32[..., K]``.
    """
    return jnp.take(dequantize(weight, fmt, k=k), ids, axis=0, mode=mode)
