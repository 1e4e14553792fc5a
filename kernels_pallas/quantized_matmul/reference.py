"""``x @ dequantize(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight


def dequantize(weight: Weight, fmt: Format, *, k: int) -> jax.Array:
    """The dense weight.

    Args:
      weight: In the portable layout.
      fmt: What its codes stand for.
      k: Inputs.

    Returns:
      ``float32[N, K]``.
    """
    codes = packing.unpack(weight.words, bits=fmt.bits, count=k)
    spread = lambda a: jnp.repeat(
        a.astype(jnp.float32), k // a.shape[-1], axis=-1, total_repeat_length=k
    )
    values = fmt.decode(codes)
    if weight.zero is not None:
        values -= spread(weight.zero)
    return values * spread(weight.scale)


def quantized_matmul(x: jax.Array, weight: Weight, fmt: Format) -> jax.Array:
    """Dequantize, then multiply in float32.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What its codes stand for.

    Returns:
      ``float32[M, N]``.
    """
    w = dequantize(weight, fmt, k=x.shape[-1])
    return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
