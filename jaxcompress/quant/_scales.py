"""Scales of a weight: how each format computes them, and how they are stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.quant._elements import E4M3, Binary, Integer, Minifloat, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import Blocks, split_blocks, spread
from jaxcompress.quant._rounding import divisor, floor_log2, power_of_two, round_scale

_TWN_THRESHOLD = 0.7


class Scales(NamedTuple):
    """Scales as stored, and as used; one for each block, in flat order.

    Attributes:
      stored: Float, or uint8 codes.
      value: float32 scales that codes are multiplied by.
      zero: Zero points as float32 integers, or None.
      tensor: float32 tensor scale, or None.
    """

    stored: jax.Array
    value: jax.Array
    zero: jax.Array | None
    tensor: jax.Array | None


def compute_scales(
    a: jax.Array, blocks: Blocks, stack: int, fmt: NumberFormat
) -> Scales:
    """The scale of each block, as its format defines it."""
    element = fmt.element
    if isinstance(element, Integer) and not (element.symmetric and element.narrow):
        return _affine_scales(a, blocks, element, fmt)
    if isinstance(element, Binary | Ternary):
        count = blocks.reduce(jnp.sum, (a != 0).astype(jnp.float32))
        if isinstance(element, Binary):
            count = jnp.broadcast_to(blocks.sizes(), count.shape)
        largest = blocks.reduce(jnp.sum, jnp.abs(a)) / jnp.maximum(count, 1.0)
    else:
        largest = blocks.reduce(jnp.max, jnp.abs(a))
    if fmt.scale == "e8m0":
        return _shared_exponents(largest, element)
    if fmt.scale == "nvfp4":
        return _two_level_scales(largest, stack, element)
    return _float_scales(largest / element.largest, fmt)


def store_scales(value: jax.Array, fmt: NumberFormat, stack: int) -> Scales:
    """Real scales, rounded to the nearest that the format can store."""
    if fmt.scale == "e8m0":
        exponent = jnp.clip(jnp.round(jnp.log2(divisor(value))), -126, 127)
        exponent = jnp.where(value > 0, exponent, 0.0).astype(jnp.int32)
        stored = jnp.where(value > 0, exponent + 127, 0).astype(jnp.uint8)
        used = jnp.where(value > 0, power_of_two(exponent), 0.0)
        return Scales(stored, used, None, None)
    if fmt.scale == "nvfp4":
        return _two_level_scales(value * fmt.element.largest, stack, fmt.element)
    stored = round_scale(value, fmt.scale, "nearest")
    return Scales(stored, stored.astype(jnp.float32), None, None)


def _float_scales(scale: jax.Array, fmt: NumberFormat) -> Scales:
    if isinstance(fmt.element, Binary | Ternary):
        direction = "nearest"  # A mean, which sums may miss by their rounding.
    else:
        direction = "down" if fmt.rounding == "toward_zero" else "up"
    # Computed once a block: XLA would fuse it into the loop over all weights.
    stored = jax.lax.optimization_barrier(round_scale(scale, fmt.scale, direction))
    return Scales(stored, stored.astype(jnp.float32), None, None)


def _affine_scales(
    a: jax.Array, blocks: Blocks, element: Integer, fmt: NumberFormat
) -> Scales:
    """Scales of a range that includes zero but is not symmetric around it."""
    low = jnp.minimum(blocks.reduce(jnp.min, a), 0.0)
    high = jnp.maximum(blocks.reduce(jnp.max, a), 0.0)
    if element.symmetric:
        return _float_scales(jnp.maximum(high / element.high, low / element.low), fmt)
    scales = _float_scales((high - low) / (element.high - element.low), fmt)
    zero = element.low - jnp.round(low / divisor(scales.value))
    return scales._replace(zero=jnp.clip(zero, element.low, element.high))


def _shared_exponents(largest: jax.Array, element: Any) -> Scales:
    """OCP MX v1.0, section 6.3: ``2^(floor(log2(max)) - emax)``, as e8m0."""
    top = element.top_exponent if isinstance(element, Minifloat) else 0
    exponent = jnp.clip(floor_log2(largest) - top, -126, 127)
    value = jnp.where(largest > 0, power_of_two(exponent), 0.0)
    stored = jnp.where(largest > 0, exponent + 127, 0).astype(jnp.uint8)
    return Scales(stored, value, None, None)


def _two_level_scales(largest: jax.Array, stack: int, element: Any) -> Scales:
    """NVFP4: e4m3 scales relative to one float32 scale a tensor."""
    over = tuple(range(stack, largest.ndim))
    top = largest.max(over, keepdims=True)
    tensor = round_scale(top / (element.largest * E4M3.largest), "float32", "nearest")
    relative = largest / element.largest / divisor(tensor)
    stored = E4M3.encode(relative, "nearest")
    return Scales(stored, E4M3.decode(stored) * tensor, None, tensor)


def above_threshold(a: jax.Array, blocks: Blocks) -> jax.Array:
    """Zero the weights below TWN's threshold, 0.7 of the mean magnitude."""
    mean = blocks.reduce(jnp.sum, jnp.abs(a)) / blocks.sizes()
    parts, _ = split_blocks(a, blocks.counts)
    kept = jnp.abs(parts) > _TWN_THRESHOLD * spread(mean, a.shape)
    return jnp.where(kept, parts, 0.0).reshape(a.shape)
