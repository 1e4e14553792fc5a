"""Quantization of the other operand of a quantized weight's matmul."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.leaf import static_type
from jaxcompress.quant._elements import Integer, Minifloat
from jaxcompress.quant._rounding import divisor
from jaxcompress.straight_through import straight_through


@static_type
class Activations:
    """How a matmul quantizes its activations.

    Attributes:
      element: Their number format.
      per: ``"token"``: a scale for each row; ``"tensor"``: one for all.
      static: The scale was calibrated and is stored in the leaf; else it is
        computed from the activations.
    """

    element: Integer | Minifloat
    per: Literal["token", "tensor"] = "token"
    static: bool = False

    @property
    def label(self) -> str:
        """``"int8 activations per token"``."""
        kind = "static" if self.static else f"per {self.per}"
        return f"{self.element.label} activations {kind}"


def dynamic(
    element: Integer | Minifloat, *, per: Literal["token", "tensor"] = "token"
) -> Activations:
    """Activations whose scale is computed in the forward pass.

    Args:
      element: `Integer` or `Minifloat`.
      per: A scale for each row of the matmul's operand, or one for the tensor.

    Raises:
      ValueError: If `per` is neither.
    """
    if per not in ("token", "tensor"):
        raise ValueError(f"dynamic: per must be 'token' or 'tensor'; got {per!r}.")
    return Activations(element=element, per=per)


def static(element: Integer | Minifloat) -> Activations:
    """Activations with one calibrated scale, given to `quantize` or `weights`."""
    return Activations(element=element, per="tensor", static=True)


def activation_scale(
    x: jax.Array, activations: Activations, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array | None]:
    """Scale, and zero point if asymmetric, over `axes` (kept with size one).

    Args:
      x: float32 activations.
      activations: A dynamic scheme.
      axes: Contracted axes of `x`: those of one token.
    """
    over = None if activations.per == "tensor" else axes
    element = activations.element
    if isinstance(element, Integer) and not element.symmetric:
        low = jnp.minimum(x.min(over, keepdims=True), 0.0)
        high = jnp.maximum(x.max(over, keepdims=True), 0.0)
        scale = (high - low) / (element.high - element.low)
        return scale, element.low - jnp.round(low / divisor(scale))
    absmax = jnp.abs(x).max(over, keepdims=True)
    return absmax / element.largest, None


def encode_activations(
    x: jax.Array, scale: jax.Array, zero: jax.Array | None, element: Integer | Minifloat
) -> jax.Array:
    """Codes of activations in float32 (integers, or values on the float grid)."""
    scaled = x / divisor(scale)
    if isinstance(element, Minifloat):
        return element.decode(element.encode(scaled, "nearest"))
    shifted = jnp.round(scaled) + (0.0 if zero is None else zero)
    return jnp.clip(shifted, element.low, element.high)


def fake_quantize_activations(
    x: jax.Array,
    activations: Activations,
    *,
    axes: tuple[int, ...],
    scale: jax.Array | None = None,
    zero: jax.Array | None = None,
) -> jax.Array:
    """Activations rounded to the grid, with a straight-through gradient.

    Args:
      x: Float activations.
      activations: The scheme.
      axes: Contracted axes of `x`.
      scale: The calibrated scale, broadcastable; needed if static. Beyond its range
        the gradient is zero (clipped straight-through).
      zero: Its zero point.

    Returns:
      Values of `x`'s dtype.
    """
    wide = jax.lax.stop_gradient(x).astype(jnp.float32)
    clipped = scale is not None
    if scale is None:
        scale, zero = activation_scale(wide, activations, axes)
    codes = encode_activations(wide, scale, zero, activations.element)
    value = ((codes - (0.0 if zero is None else zero)) * scale).astype(x.dtype)
    if clipped:
        inside = _in_range(wide, scale, zero, activations.element)
        x = jnp.where(inside, x, jax.lax.stop_gradient(x))
    return straight_through(x, value)


def _in_range(x: jax.Array, scale: jax.Array, zero: Any, element: Any) -> jax.Array:
    offset = 0.0 if zero is None else zero
    low, high = element.range
    return (x >= (low - offset) * scale) & (x <= (high - offset) * scale)
