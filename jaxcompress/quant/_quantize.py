"""Scales and codes of a weight: the arithmetic that every number format shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, resolve_axes
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Integer, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import Blocks, Flat
from jaxcompress.quant._scales import (
    Scales,
    above_threshold,
    compute_scales,
    encode_blocks,
    store_scales,
)
from jaxcompress.straight_through import straight_through
from jaxcompress.values import check_weight


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
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
    activation_scale: jax.Array | None = None,
    activation_zero: jax.Array | None = None,
    importance: jax.Array | None = None,
    path: str = "w",
    check: bool = True,
) -> QuantizedArray:
    """As `quantize`, with the codes left unpacked: the training view's stored form.

    ``importance``, ``float[*stack, K]``, is what a squared error in each input counts
    for in a search by `mse` (the second moment of the activations, for one), or
    ``float[*stack, K, K]``, the second moments of the inputs, for errors of outputs.
    With ``scale``, ``float[*stack, *out_blocks, G]``, and for an asymmetric format
    ``zero_point``, the grid is that one, rounded to the nearest that can be stored.
    Without ``check`` the weight itself is not looked at.
    """
    grid = Grid.of(w, fmt, axes=axes, path=path, check=check)
    a = grid.flatten(w)
    if scale is None:
        if isinstance(fmt.element, Ternary):
            a = above_threshold(a, grid.blocks)
        scales = compute_scales(a, grid.blocks, grid.roles.stack, fmt, importance)
    else:
        scales = grid.given(scale, zero_point)
    noise = _noise(a, fmt, key, grid.who)
    codes = grid.blocks.flat.unflatten(grid.codes(a, scales, noise))
    return grid.leaf(codes, scales, activation_scale, activation_zero)


class Grid(NamedTuple):
    """A weight's number format laid over its axes: all of a leaf but the numbers.

    Attributes:
      fmt: The number format.
      roles: Roles of the weight's axes.
      blocks: Which weights share a scale.
      dtype: The weight's dtype.
      who: Function named in errors.
    """

    fmt: NumberFormat
    roles: Axes
    blocks: Blocks
    dtype: np.dtype
    who: str

    @classmethod
    def of(
        cls, w: jax.Array, fmt: NumberFormat, *, axes: Any, path: str, check: bool
    ) -> Grid:
        """Lay a format over a weight.

        Raises:
          ValueError: As `quantize` does.
        """
        who = f"quantize to {fmt.name}"
        if check:
            check_weight(w, path, who)
        stated = fmt.axes if fmt.axes is not None else axes
        w = jnp.asarray(w)
        roles = resolve_axes(w.shape, stated, who=who, path=path)
        blocks = Blocks(w.shape, roles, fmt.granularity, who=who, path=path)
        return cls(fmt, roles, blocks, np.dtype(w.dtype), who)

    def flatten(self, w: jax.Array) -> jax.Array:
        """The weight in float32 and flat order."""
        return self.blocks.flat.flatten(jnp.asarray(w).astype(jnp.float32))

    def given(self, scale: jax.Array, zero_point: jax.Array | None = None) -> Scales:
        """Scales as they will be stored, from real numbers in storage order."""
        flat = self.blocks.flat
        zero = None if zero_point is None else flat.from_storage(zero_point)
        value = flat.from_storage(scale)
        return store_scales(value, self.fmt, self.roles.stack)._replace(zero=zero)

    def codes(
        self, a: jax.Array, scales: Scales, noise: jax.Array | None = None
    ) -> jax.Array:
        """Codes of a weight in flat order."""
        return encode_blocks(a, self.blocks, scales, self.fmt, noise).reshape(a.shape)

    def leaf(
        self,
        codes: jax.Array,
        scales: Scales,
        activation_scale: jax.Array | None = None,
        activation_zero: jax.Array | None = None,
    ) -> QuantizedArray:
        """The leaf of these codes, ``uint8`` in the weight's own shape, unpacked."""
        fmt, flat = self.fmt, self.blocks.flat
        ndim = len(self.blocks.counts)
        stack = flat.shape[: self.roles.stack]
        return QuantizedArray(
            words=codes,
            scale=flat.to_storage(scales.stored),
            zero_point=_stored(flat, scales.zero, jnp.uint8),
            tensor_scale=_stored(flat, scales.tensor, jnp.float32),
            activation_scale=_static_scale(
                activation_scale, activation_zero, stack, ndim, fmt, self.who
            ),
            activation_zero=_per_stack(activation_zero, stack, ndim),
            element=fmt.element,
            scale_format=fmt.scale,
            label=fmt.name,
            layout=self.blocks.layout,
            packed=False,
            pad=0,
            dtype_name=self.dtype.name,
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
