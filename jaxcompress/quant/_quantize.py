"""Scales and codes of a weight: the arithmetic that every number format shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, resolve_axes
from jaxcompress.leaf import straight_through
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import E4M3, Binary, Integer, Minifloat, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import Blocks, Flat, split_blocks, spread
from jaxcompress.quant._rounding import (
    divisor,
    floor_log2,
    power_of_two,
    round_scale,
    round_to_integer,
)
from jaxcompress.transform import check_weight

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


def quantize(
    w: jax.Array,
    fmt: NumberFormat,
    *,
    axes: Axes | int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    activation_scale: jax.Array | None = None,
    activation_zero: jax.Array | None = None,
    path: str = "w",
) -> QuantizedArray:
    r"""Round a weight to the nearest points of its grid, and pack the codes.

    .. math:: w \approx (q - z)\, s

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format. Static.
      axes: Roles of its axes, or its contracting axes; a plain matrix contracts
        axis -2. Static.
      key: For stochastic rounding.
      activation_scale: Calibrated scale of static activations, a scalar or one a
        stack entry.
      activation_zero: Its zero point, if asymmetric.
      path: Named in errors.

    Returns:
      A leaf of `w`'s shape and dtype. For integers without a clipping range the
      elementwise error is at most ``scale / 2`` plus rounding in `w`'s dtype; blocks
      of zeros come back as exact zeros. Quantizing ``materialize()`` of a float32
      leaf again gives the same leaf.

    Raises:
      ValueError: If `w` is empty, a scalar or not finite; if a group does not divide;
        if the axes are unknown; or if an argument that the format needs is missing.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> w = jnp.array([[0.0], [0.5], [-1.0], [3.5]])
      >>> quantize(w, int4()).materialize()[:, 0].tolist()
      [0.0, 0.5, -1.0, 3.5]
    """
    return encode(
        w,
        fmt,
        axes=axes,
        key=key,
        activation_scale=activation_scale,
        activation_zero=activation_zero,
        path=path,
    ).pack()


def fake_quantize(
    w: jax.Array, fmt: NumberFormat, *, axes: Any = None, key: jax.Array | None = None
) -> jax.Array:
    """The dense values of `quantize`, with a straight-through gradient.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format. Static.
      axes: As for `quantize`.
      key: For stochastic rounding.
    """
    leaf = encode(jax.lax.stop_gradient(w), fmt, axes=axes, key=key)
    return straight_through(w, leaf.materialize())


def encode(
    w: jax.Array,
    fmt: NumberFormat,
    *,
    axes: Any = None,
    key: jax.Array | None = None,
    activation_scale: jax.Array | None = None,
    activation_zero: jax.Array | None = None,
    path: str = "w",
    check: bool = True,
) -> QuantizedArray:
    """As `quantize`, with the codes left unpacked: the training view's stored form."""
    who = f"quantize to {fmt.name}"
    if check:
        check_weight(w, path, who)
    stated = fmt.axes if fmt.axes is not None else axes
    w = jnp.asarray(w)
    roles = resolve_axes(w.shape, stated, who=who, path=path)
    blocks = Blocks(w.shape, roles, fmt.granularity, who=who, path=path)
    flat = blocks.flat
    a = flat.flatten(w.astype(jnp.float32))
    if isinstance(fmt.element, Ternary):
        a = _above_threshold(a, blocks)
    scales = _scales(a, blocks, roles.stack, fmt)
    codes = _codes(a, blocks, scales, fmt, _noise(a, fmt, key, who))
    ndim = len(blocks.counts)
    stack = w.shape[: roles.stack]
    return QuantizedArray(
        words=flat.unflatten(codes),
        scale=flat.to_storage(scales.stored),
        zero_point=_stored(flat, scales.zero, jnp.uint8),
        tensor_scale=_stored(flat, scales.tensor, jnp.float32),
        activation_scale=_static_scale(
            activation_scale, activation_zero, stack, ndim, fmt, who
        ),
        activation_zero=_per_stack(activation_zero, stack, ndim),
        element=fmt.element,
        scale_format=fmt.scale,
        label=fmt.name,
        layout=blocks.layout,
        packed=False,
        pad=0,
        dtype_name=np.dtype(w.dtype).name,
        activations=fmt.activations,
    )


def _stored(flat: Flat, a: jax.Array | None, dtype: Any) -> jax.Array | None:
    return None if a is None else flat.to_storage(a).astype(dtype)


def _static_scale(
    scale: Any,
    zero: Any,
    stack: tuple[int, ...],
    ndim: int,
    fmt: NumberFormat,
    who: str,
) -> jax.Array | None:
    if fmt.activations is None or not fmt.activations.static:
        if scale is not None or zero is not None:
            raise ValueError(
                f"{who}: activation_scale and activation_zero belong to static "
                "activations; leave them out, or give the format static(...)."
            )
        return None
    if scale is None:
        raise ValueError(
            f"{who}: static activations need their calibrated scale; pass "
            "activation_scale=, or use a dynamic scheme (FP8_DYNAMIC, W8A8)."
        )
    element = fmt.activations.element
    if isinstance(element, Integer) and not element.symmetric and zero is None:
        raise ValueError(
            f"{who}: static activations with a zero point need it; pass "
            "activation_zero=, or use symmetric activations."
        )
    return _per_stack(scale, stack, ndim)


def _per_stack(a: Any, stack: tuple[int, ...], ndim: int) -> jax.Array | None:
    """A scalar, or one value a stack entry, as ``[*stack, 1, ...]`` of rank `ndim`."""
    if a is None:
        return None
    a = jnp.broadcast_to(jnp.asarray(a, jnp.float32), stack)
    return a.reshape(*stack, *(1,) * (ndim - len(stack)))


def _above_threshold(a: jax.Array, blocks: Blocks) -> jax.Array:
    """Zero the weights below TWN's threshold, 0.7 of the mean magnitude."""
    mean = blocks.reduce(jnp.sum, jnp.abs(a)) / blocks.sizes()
    parts, _ = split_blocks(a, blocks.counts)
    kept = jnp.abs(parts) > _TWN_THRESHOLD * spread(mean, a.shape)
    return jnp.where(kept, parts, 0.0).reshape(a.shape)


def _scales(a: jax.Array, blocks: Blocks, stack: int, fmt: NumberFormat) -> Scales:
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


def _noise(
    a: jax.Array, fmt: NumberFormat, key: jax.Array | None, who: str
) -> jax.Array | None:
    if fmt.rounding != "stochastic":
        return None
    if key is None:
        raise ValueError(
            f"{who}: stochastic rounding needs a key; pass key=jax.random.key(...)."
        )
    return jax.random.uniform(key, a.shape, jnp.float32)


def _codes(
    a: jax.Array, blocks: Blocks, scales: Scales, fmt: NumberFormat, noise: Any
) -> jax.Array:
    """Codes of a flat weight."""
    parts, _ = split_blocks(a, blocks.counts)
    scaled = parts / spread(divisor(scales.value), a.shape)
    noise = None if noise is None else noise.reshape(scaled.shape)
    if scales.zero is None:
        codes = fmt.element.encode(scaled, fmt.rounding, noise)
    else:
        assert isinstance(fmt.element, Integer)
        shifted = round_to_integer(scaled, fmt.rounding, noise)
        shifted = shifted + spread(scales.zero, a.shape)
        codes = jnp.clip(shifted, fmt.element.low, fmt.element.high).astype(jnp.uint8)
    return codes.reshape(a.shape)
