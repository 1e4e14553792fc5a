"""Scales of a weight: how each format computes them, and how they are stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.quant._elements import E4M3, Binary, Integer, Minifloat, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import Blocks, split_blocks, spread
from jaxcompress.quant._range_search import (
    Ends,
    half_quadratic,
    least_error,
    nearest_rank,
    ratios,
)
from jaxcompress.quant._ranges import HQQ, MSE, Percentile
from jaxcompress.quant._rounding import (
    divisor,
    floor_log2,
    power_of_two,
    round_scale,
    round_to_integer,
)

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
    a: jax.Array,
    blocks: Blocks,
    stack: int,
    fmt: NumberFormat,
    importance: jax.Array | None = None,
) -> Scales:
    """The scale of each block, as its format defines it.

    Args:
      a: Weight in float32 and flat order.
      blocks: Which weights share a scale.
      stack: Number of stack axes.
      fmt: The format.
      importance: ``float32[*stack, K]``, what a squared error of an input counts for
        in the search by `mse`, or ``float32[*stack, K, K]``, second moments of the
        inputs: errors are then those of the outputs. Of other searches ignored.
    """
    if isinstance(fmt.search, HQQ | MSE):
        return _search_scales(a, importance, blocks=blocks, stack=stack, fmt=fmt)
    return _range_scales(_reach(a, blocks, fmt), stack, fmt)


@functools.partial(jax.jit, static_argnames=("blocks", "stack", "fmt"))
def _search_scales(
    a: jax.Array,
    importance: jax.Array | None,
    *,
    blocks: Blocks,
    stack: int,
    fmt: NumberFormat,
) -> Scales:
    """By a loop: jitted here, or each call outside of jit would compile it again."""
    reach = _reach(a, blocks, fmt)
    if isinstance(fmt.search, HQQ):
        return _solve(fmt.search, a, blocks, _range_scales(reach, stack, fmt), fmt)
    assert isinstance(fmt.search, MSE)
    moved = _moved_by(importance, blocks)
    # Errors are those of rounding to nearest: noise has none to compare.
    plain = fmt.replace(rounding="nearest") if fmt.rounding == "stochastic" else fmt

    def error(part: Ends) -> jax.Array:
        scales = _range_scales(reach, stack, fmt, part)
        delta = round_trip(a, blocks, scales, plain) - a
        return blocks.reduce(jnp.sum, delta * moved(delta))

    tried = ratios(fmt.search, powers_of_two=fmt.scale == "e8m0")
    ones = jax.tree.map(jnp.ones_like, reach)
    return _range_scales(reach, stack, fmt, least_error(error, ones, tried))


def _moved_by(
    importance: jax.Array | None, blocks: Blocks
) -> Callable[[jax.Array], jax.Array]:
    """A weight's error times the moments of its inputs, those of its own block."""
    if importance is None:
        return lambda delta: delta
    flat, importance = blocks.flat, importance.astype(jnp.float32)
    if importance.ndim == flat.stack + 1:
        dims = [1] * len(blocks.counts)
        dims[: flat.stack], dims[flat.position] = flat.shape[: flat.stack], flat.k
        return functools.partial(jnp.multiply, importance.reshape(dims))
    groups = blocks.counts[flat.position]
    *stack, k, _ = importance.shape
    split = importance.reshape(*stack, groups, k // groups, groups, k // groups)
    own = jnp.moveaxis(jnp.diagonal(split, axis1=-4, axis2=-2), -1, -3)

    def moved(delta: jax.Array) -> jax.Array:
        stored = flat.to_storage(delta)
        rows = stored.reshape(*stack, -1, groups, k // groups)
        product = jnp.einsum("...ngi,...gij->...ngj", rows, own, precision="highest")
        return flat.from_storage(product.reshape(stored.shape))

    return moved


def _reach(a: jax.Array, blocks: Blocks, fmt: NumberFormat) -> Ends:
    """What the grid has to reach in each block: its ends, or a magnitude."""
    element, top, bottom = fmt.element, jnp.max, jnp.min
    if isinstance(fmt.search, Percentile):
        top = nearest_rank(fmt.search.percent)
        bottom = nearest_rank(fmt.search.percent, lower=True)
    if isinstance(element, Integer) and not (element.symmetric and element.narrow):
        return Ends(
            low=jnp.minimum(blocks.reduce(bottom, a), 0.0),
            high=jnp.maximum(blocks.reduce(top, a), 0.0),
        )
    if isinstance(element, Binary | Ternary):
        count = blocks.reduce(jnp.sum, (a != 0).astype(jnp.float32))
        if isinstance(element, Binary):
            count = jnp.broadcast_to(blocks.sizes(), count.shape)
        return Ends(blocks.reduce(jnp.sum, jnp.abs(a)) / jnp.maximum(count, 1.0))
    return Ends(blocks.reduce(top, jnp.abs(a)))


def _range_scales(
    reach: Ends, stack: int, fmt: NumberFormat, part: Ends | None = None
) -> Scales:
    """Scales whose grid reaches so far, or (`part`) to these parts of it."""
    element = fmt.element
    if fmt.scale == "nvfp4":
        return _two_level_scales(reach.high, stack, element, part)
    if part is not None:
        reach = jax.tree.map(jnp.multiply, reach, part)
    if reach.low is not None:
        assert isinstance(element, Integer)
        return _affine_scales(reach.low, reach.high, element, fmt)
    if fmt.scale == "e8m0":
        return _shared_exponents(reach.high, element)
    return _float_scales(reach.high / element.largest, fmt)


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
    low: jax.Array, high: jax.Array, element: Integer, fmt: NumberFormat
) -> Scales:
    """Scales of a range that includes zero but is not symmetric around it."""
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


def _two_level_scales(
    largest: jax.Array, stack: int, element: Any, part: Ends | None = None
) -> Scales:
    """NVFP4: e4m3 scales relative to one float32 scale a tensor."""
    over = tuple(range(stack, largest.ndim))
    top = largest.max(over, keepdims=True)
    tensor = round_scale(top / (element.largest * E4M3.largest), "float32", "nearest")
    if part is not None:  # The tensor's scale must stay that of its largest weight.
        largest = jnp.where(largest < top, largest * part.high, largest)
    relative = largest / element.largest / divisor(tensor)
    stored = E4M3.encode(relative, "nearest")
    return Scales(stored, E4M3.decode(stored) * tensor, None, tensor)


def _solve(
    search: HQQ, a: jax.Array, blocks: Blocks, first: Scales, fmt: NumberFormat
) -> Scales:
    """Scales and zero points by half-quadratic splitting."""
    element, unit = fmt.element, first.value
    count = blocks.sizes()

    def residual(scales: Scales) -> tuple[jax.Array, jax.Array]:
        points = decode_blocks(
            encode_blocks(a, blocks, scales, fmt), scales, fmt, a.shape
        )
        parts, _ = split_blocks(a, blocks.counts)
        error = parts - points * spread(scales.value, a.shape)
        return (
            points.reshape(a.shape),
            (error / spread(divisor(unit), a.shape)).reshape(a.shape),
        )

    def solve(scales: Scales, points: jax.Array, small: jax.Array) -> Scales:
        square = blocks.reduce(jnp.sum, points * points)
        slope = blocks.reduce(jnp.sum, points * small) / divisor(square)
        # No wider than the range, whose ends the grid then reaches.
        value = jnp.clip(scales.value + unit * slope, unit * 0.125, unit)
        stored = round_scale(value, fmt.scale, "nearest")
        used = jnp.minimum(stored.astype(jnp.float32), unit)
        new = scales._replace(stored=used.astype(stored.dtype), value=used)
        if scales.zero is None:
            return new
        assert isinstance(element, Integer)
        mean = blocks.reduce(jnp.sum, small) / count
        zero = scales.zero - mean * unit / divisor(scales.value)
        low = blocks.reduce(jnp.min, a) / divisor(used)
        high = blocks.reduce(jnp.max, a) / divisor(used)
        zero = jnp.maximum(jnp.round(zero), element.high - jnp.round(high))
        zero = jnp.minimum(zero, element.low - jnp.round(low))
        return new._replace(zero=jnp.clip(zero, element.low, element.high))

    total = lambda x: blocks.reduce(jnp.sum, x)
    return half_quadratic(search, first, residual=residual, solve=solve, total=total)


def encode_blocks(
    a: jax.Array,
    blocks: Blocks,
    scales: Scales,
    fmt: NumberFormat,
    noise: jax.Array | None = None,
) -> jax.Array:
    """Codes of a flat weight, in the shape of `split_blocks`."""
    parts, _ = split_blocks(a, blocks.counts)
    scaled = parts / spread(divisor(scales.value), a.shape)
    noise = None if noise is None else noise.reshape(scaled.shape)
    if scales.zero is None:
        return fmt.element.encode(scaled, fmt.rounding, noise)
    assert isinstance(fmt.element, Integer)
    shifted = round_to_integer(scaled, fmt.rounding, noise)
    shifted = shifted + spread(scales.zero, a.shape)
    return jnp.clip(shifted, fmt.element.low, fmt.element.high).astype(jnp.uint8)


def decode_blocks(
    codes: jax.Array, scales: Scales, fmt: NumberFormat, dims: tuple[int, ...]
) -> jax.Array:
    """What the codes of a weight of flat `dims` stand for, before their scale."""
    points = fmt.element.decode(codes)
    return points if scales.zero is None else points - spread(scales.zero, dims)


def round_trip(
    a: jax.Array, blocks: Blocks, scales: Scales, fmt: NumberFormat
) -> jax.Array:
    """A flat weight as these scales would store it, in float32."""
    points = decode_blocks(encode_blocks(a, blocks, scales, fmt), scales, fmt, a.shape)
    return (points * spread(scales.value, a.shape)).reshape(a.shape)


def above_threshold(a: jax.Array, blocks: Blocks) -> jax.Array:
    """Zero the weights below TWN's threshold, 0.7 of the mean magnitude."""
    mean = blocks.reduce(jnp.sum, jnp.abs(a)) / blocks.sizes()
    parts, _ = split_blocks(a, blocks.counts)
    kept = jnp.abs(parts) > _TWN_THRESHOLD * spread(mean, a.shape)
    return jnp.where(kept, parts, 0.0).reshape(a.shape)


def stored_scale(
    value: jax.Array, scale_format: str, tensor: jax.Array | None
) -> jax.Array:
    """Scales that can be stored, as they are stored; exact."""
    if scale_format == "e8m0":
        code = floor_log2(value) + 127
        return jnp.where(value > 0, code, 0).astype(jnp.uint8)
    if scale_format == "nvfp4":
        assert tensor is not None
        return E4M3.encode(value / divisor(tensor), "nearest")
    return value.astype(scale_format)
