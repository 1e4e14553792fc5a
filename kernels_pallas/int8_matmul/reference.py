"""Integer matmul in plain `jax.numpy`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.formats import Integer
from kernels_pallas.layouts import Weight


def quantize_rows(
    x: jax.Array, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Activations as int8, a scale for each row.

    Args:
      x: ``float[..., K]``.
      scale: float32, ``[..., 1]`` or what broadcasts to it; None for the largest
        magnitude of each row over 127. A zero scale gives zeros.

    Returns:
      ``int8[..., K]`` codes in -127..127 and the ``float32[..., 1]`` scale.

    Examples:
      >>> codes, scale = quantize_rows(jnp.array([[0.5, -1.0]]))
      >>> codes.tolist(), round(scale.item() * 127, 6)
      ([[64, -127]], 1.0)
    """
    x = x.astype(jnp.float32)
    if scale is None:
        scale = jnp.abs(x).max(-1, keepdims=True) / 127.0
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (*x.shape[:-1], 1))
    steps = jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)
    codes = jnp.clip(jnp.round(steps), -127.0, 127.0)
    # By way of int32: a CPU has vector instructions for these casts.
    return codes.astype(jnp.int32).astype(jnp.int8), scale


def int8_matmul(
    codes: jax.Array, scale: jax.Array, weight: Weight, fmt: Integer
) -> jax.Array:
    """Sums of each group in int32, then the scales.

    Args:
      codes: ``int8[M, K]``.
      scale: ``float32[M, 1]``.
      weight: In the portable layout, ``[N, K]``, without zero points.
      fmt: Signed integers.

    Returns:
      ``float32[M, N]``.
    """
    m, k = codes.shape
    groups = weight.scale.shape[-1]
    w = fmt.integers(packing.unpack(weight.words, bits=fmt.bits, count=k))
    sums = jnp.einsum(
        "mgk,ngk->mng",
        codes.reshape(m, groups, -1).astype(jnp.int32),
        w.reshape(*weight.scale.shape, -1),
    )
    y = (sums.astype(jnp.float32) * weight.scale.astype(jnp.float32)[None]).sum(-1)
    return y * scale
