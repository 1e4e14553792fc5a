"""A key-value cache that stays quantized while a model decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress.layout import Axes
from jaxcompress.leaf import Leaf
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import PerChannel, PerGroup
from jaxcompress.quant._normalized import NormalizedArray
from jaxcompress.quant._quantize import encode


def kv_cache(
    shape: Sequence[int],
    fmt: NumberFormat,
    *,
    dtype: Any = jnp.float32,
    mean: jax.Array | None = None,
    deviation: jax.Array | None = None,
) -> Leaf:
    """An empty cache of keys or values, for decoding with a lifted function.

    Each vector along the last axis has scales of its own, one or one a group, so that
    a token can be written without touching the others. Passed to `lift` where the
    model expects its dense cache, it is written by ``lax.dynamic_update_slice`` or
    ``cache.at[...].set(...)`` (whose indices must not repeat), read by the attention's
    matmuls, carried and scanned by loops, and handed back as a leaf of the same form.
    No gradient flows through what is written.

    Args:
      shape: ``[..., length, heads, head_dim]``, layers or batch in front, or any
        other order whose last axis is not cut by an update. Static.
      fmt: The number format, per channel or in groups along the last axis. Static.
      dtype: What the model reads, and writes.
      mean: Of each channel, as far as it is the same for all tokens: keys often have
        channels that are large in every token, and then share their scale with small
        ones. Of `shape`, or with ones in it; at least where tokens differ. Taken off
        before rounding and added to what is read.
      deviation: Of each channel about its mean, likewise: divided by before rounding;
        zero, of a channel that never varied, counts as one.

    Returns:
      A leaf of zeros (with a `mean`, of means). What is written reads back as
      `quantize` with ``axes=-1`` of it: for integers each element within
      ``scale / 2``, times the channel's deviation.

    Raises:
      ValueError: If `shape` is empty, a group does not divide the last axis, or the
        format has other blocks, stochastic or truncating rounding, or static
        activations; if `mean` or `deviation` does not fit the shape, is not finite or,
        the latter, negative.

    Examples:
      >>> import jaxcompress as jc
      >>> cache = kv_cache((1, 4, 2, 8), jc.quant.int8())
      >>> write = jc.lift(lambda c, k, i: jax.lax.dynamic_update_slice_in_dim(
      ...     c, k, i, axis=1))
      >>> cache = write(cache, jnp.full((1, 1, 2, 8), 0.5), jnp.int32(3))
      >>> cache, cache.materialize()[0, :, 0, 0].round(2).tolist()
      (QuantizedArray(int8, float32[1, 4, 2, 8]), [0.0, 0.0, 0.0, 0.5])

    References:
      Sheng et al., `FlexGen <https://arxiv.org/abs/2303.06865>`_, 2023, section 5.1
      (groups of 4 bits); Liu et al., `KIVI <https://arxiv.org/abs/2402.02750>`_, 2024,
      section 3.2 (channels of keys). Differs: keys too have a scale for each token; a
      channel has its calibrated mean and deviation, where KIVI has a scale for each
      channel over many tokens, and a dense window of the last ones.
    """
    shape = tuple(shape)
    _check(shape, fmt)
    for name, side in (("mean", mean), ("deviation", deviation)):
        if side is not None:
            _check_side(name, side, shape)
    fmt = fmt.replace(axes=None)
    one = jnp.zeros((1,) * (len(shape) - 1) + shape[-1:], dtype)
    vector = encode(one, fmt, axes=_roles(one.ndim), path="kv_cache").pack()
    cache = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (*shape[:-1], a.shape[-1])), vector
    )
    if mean is None and deviation is None:
        return cache
    ones = (1,) * (len(shape) - 1) + shape[-1:]
    return NormalizedArray(
        inner=cache,
        mean=jnp.zeros(ones) if mean is None else jnp.float32(mean),
        deviation=jnp.ones(ones) if deviation is None else _varying(deviation),
        layout=cache.layout,
    )


def _varying(deviation: jax.Array) -> jax.Array:
    deviation = jnp.asarray(deviation, jnp.float32)
    return jnp.where(deviation > 0, deviation, 1.0)


def _roles(ndim: int) -> Axes:
    """A stack of vectors."""
    return Axes(contract=(-1,), stack=ndim - 1)


def _check(shape: tuple[int, ...], fmt: NumberFormat) -> None:
    if not shape or 0 in shape:
        raise ValueError(
            f"kv_cache: shape must have at least one axis and no zero; got {shape}."
        )
    if fmt.rounding != "nearest":
        raise ValueError(
            f"kv_cache: what is written is rounded to nearest; got {fmt.rounding!r}."
        )
    if not isinstance(fmt.granularity, PerGroup) and fmt.granularity != PerChannel():
        raise ValueError(
            "kv_cache: each vector has its own scales, PerChannel() or PerGroup(); got "
            f"{fmt.granularity}."
        )
    if fmt.activations is not None and fmt.activations.static:
        raise ValueError(
            f"kv_cache: a cache has no place for a calibrated scale; got {fmt.name}. "
            "Use dynamic activations."
        )


def _check_side(name: str, side: jax.Array, shape: tuple[int, ...]) -> None:
    sizes = np.shape(side)
    fits = len(sizes) == len(shape) and sizes[-1] == shape[-1]
    if not fits or any(n not in (1, m) for n, m in zip(sizes, shape, strict=True)):
        raise ValueError(
            f"kv_cache: {name} must have the shape of the cache, {shape}, or ones in "
            f"it, but along the last axis; got {sizes}. Take it over tokens with "
            "keepdims=True."
        )
    if isinstance(side, Tracer):
        return
    found = np.asarray(side)
    low, rule = (-np.inf, "finite") if name == "mean" else (0.0, "finite, not negative")
    if not (np.isfinite(found) & (found >= low)).all():
        raise ValueError(
            f"kv_cache: {name} must be {rule}; got {found.min()} to {found.max()}. "
            "Look at the tokens it was taken over."
        )


def encode_like(leaf: QuantizedArray, values: jax.Array) -> Leaf:
    """Dense values in the format of a quantized array, rounded to nearest.

    Its components may replace parts of the leaf's along the stack axes; or
    ``NotImplemented`` where values cannot be encoded apart.
    """
    core = len(leaf.layout.order)
    *lead, k = jax.eval_shape(leaf.elements).shape
    own = (leaf.scale, leaf.zero_point, leaf.tensor_scale)
    if (
        not leaf.packed
        or leaf.activation_scale is not None
        or any(a is not None and list(a.shape[:-1]) != lead for a in own)
    ):
        return NotImplemented  # Scales that several vectors share.
    fmt = NumberFormat(
        element=leaf.element,
        granularity=PerGroup(size=k // leaf.scale.shape[-1]),
        scale=leaf.scale_format,  # type: ignore[arg-type]
        label=leaf.label,
    )
    axes = Axes(contract=leaf.layout.contract, stack=values.ndim - core)
    part = encode(jax.lax.stop_gradient(values), fmt, axes=axes, check=False).pack()
    if part.layout != leaf.layout:
        return NotImplemented  # The axes lie in another order.
    return leaf.replace(
        words=part.words,
        scale=part.scale,
        zero_point=part.zero_point,
        tensor_scale=part.tensor_scale,
    )
