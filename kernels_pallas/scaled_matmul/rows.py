"""Activations as int8 or fp8, with a scale for each row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Float8, Integer


def operand_dtype(fmt: Integer | Float8) -> jnp.dtype:
    """Of both operands of the dot: ``int8``, or the format's own."""
    return jnp.dtype(fmt.dtype if isinstance(fmt, Float8) else jnp.int8)


def sum_dtype(fmt: Integer | Float8) -> jnp.dtype:
    """Of the dot's sums."""
    return jnp.dtype(jnp.float32 if isinstance(fmt, Float8) else jnp.int32)


def largest(fmt: Integer | Float8) -> float:
    """The magnitude that a row's largest is scaled to: 127, or the largest float."""
    if isinstance(fmt, Float8):
        return float(jnp.finfo(operand_dtype(fmt)).max)
    return 127.0


def quantize_rows(
    x: jax.Array, fmt: Integer | Float8, scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Activations in the operand dtype of a format, a scale for each row.

    Args:
      x: ``float[..., K]``.
      fmt: Of the weight; integers of any bits meet int8 activations. Static.
      scale: float32, ``[..., 1]`` or what broadcasts to it; None for the largest
        magnitude of each row over `largest`. A zero scale gives zeros.

    Returns:
      Codes ``[..., K]``, symmetric and saturating, and the ``float32[..., 1]`` scale.

    Examples:
      >>> from kernels_pallas.formats import INT8
      >>> codes, scale = quantize_rows(jnp.array([[0.5, -1.0]]), INT8)
      >>> codes.tolist(), round(scale.item() * 127, 6)
      ([[64, -127]], 1.0)
    """
    x, top = x.astype(jnp.float32), largest(fmt)
    if scale is None:
        scale = jnp.abs(x).max(-1, keepdims=True) / top
    scale = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), (*x.shape[:-1], 1))
    steps = jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)
    steps = jnp.clip(steps, -top, top)
    if isinstance(fmt, Float8):
        return steps.astype(operand_dtype(fmt)), scale
    # By way of int32: a CPU has vector instructions for these casts.
    return jnp.round(steps).astype(jnp.int32).astype(jnp.int8), scale
