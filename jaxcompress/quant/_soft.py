"""Annealed soft rounding: a smooth staircase that becomes the hard one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._quantize import encode
from jaxcompress.quant._stepped import LaidOver
from jaxcompress.quant._switched import SwitchedArray, switched_on
from jaxcompress.schedules import Schedule
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform
from jaxcompress.values import Site, check_weights, for_values, map_values


def soft_round(x: jax.Array, sharpness: Any) -> jax.Array:
    r"""A smooth increasing staircase through the integers.

    .. math::
        s_\alpha(x) = \lfloor x \rfloor + \tfrac12 +
        \frac{\tanh(\alpha r)}{2 \tanh(\alpha / 2)}, \quad
        r = x - \lfloor x \rfloor - \tfrac12

    Args:
      x: Float array.
      sharpness: :math:`\alpha > 0`: near 0 the identity, beyond 30 hardly
        distinguishable from rounding. Traced.

    Returns:
      Of `x`'s shape and dtype; integers stay where they are, to rounding.

    Examples:
      >>> soft_round(jnp.array([0.0, 0.25, 0.5, 0.75]), 10.0).round(3).tolist()
      [0.0, 0.007..., 0.5, 0.993...]

    References:
      Agustsson & Theis, `Universally Quantized Neural Compression
      <https://arxiv.org/abs/2006.09952>`_, 2020, section 4 (the soft quantizer).
    """
    sharpness = jnp.asarray(sharpness, x.dtype)
    low = jnp.floor(x)
    centred = x - low - jnp.asarray(0.5, x.dtype)
    part = jnp.tanh(sharpness * centred) / jnp.tanh(sharpness * 0.5)
    return low + (part + 1.0) * 0.5


def soft_rounding(
    fmt: NumberFormat, *, sharpness: float | Schedule, end: int
) -> Transform:
    """Train through a smooth staircase that sharpens, then through the hard grid.

    Args:
      fmt: Integers, symmetric or not, rounded to nearest.
      sharpness: Of `soft_round`; or a schedule of it, such as
        ``schedules.linear(1.0, 20.0, begin=0, end=5_000)``.
      end: Updates after which the view is the hard grid with a straight-through
        gradient, as that of `weights`. Until then the view is not what is stored, and
        what lies beyond the grid is clipped and has no gradient.

    Returns:
      A transform. From update `end` on, the view is bit for bit what `compress`
      stores; `compress` itself is always hard. Scales are the format's own, of the
      current weights, and have no gradient.

    Raises:
      ValueError: If the format is not of integers, or `end` is negative.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = soft_rounding(int4(), sharpness=5.0, end=1)
      >>> params, state = scheme.init({"w": jnp.array([[3.4], [-7.0]])})
      >>> scheme.view(params, state)["w"].materialize().round(3).tolist()
      [[3.266...], [-7.0...]]
      >>> params, state = scheme.update(params, state)
      >>> scheme.view(params, state)["w"].materialize().tolist()
      [[3.0], [-7.0]]

    References:
      Agustsson & Theis, 2020, section 4; Gong et al., `Differentiable Soft
      Quantization <https://arxiv.org/abs/1908.05033>`_, 2019, section 3 (a tanh a
      step, sharpened in training). Differs: the sharpness follows a schedule.
    """
    by = f"quant.soft_rounding({fmt.name})"
    element = fmt.element
    if not isinstance(element, Integer) or element.fraction:
        raise ValueError(f"{by}: the format must be integers; use int4().")
    if fmt.rounding != "nearest":
        raise ValueError(f"{by}: rounding must be 'nearest'; got {fmt.rounding!r}.")
    if end < 0:
        raise ValueError(f"{by}: end must not be negative; got {end}.")

    def encoded(w: jax.Array, site: Site) -> QuantizedArray:
        w = jax.lax.stop_gradient(w)
        return encode(w, fmt, axes=site.axes, path=site.path, check=False)

    def fake(w: jax.Array, site: Site, step: jax.Array) -> SwitchedArray:
        stored = encoded(w, site)
        alpha = sharpness(step) if callable(sharpness) else sharpness
        return SwitchedArray(
            dense=_soft(w, stored, alpha),
            compressed=StraightThrough(latent=w, stored=stored),
            on=switched_on(step >= end, w.shape),
        )

    def init(params: Any) -> tuple[Any, jax.Array]:
        check_weights(params, who=by)
        for_values(
            lambda w, site: jax.eval_shape(lambda a: encoded(a, site), w), params
        )
        return params, jnp.zeros((), jnp.int32)

    def view(params: Any, state: jax.Array) -> Any:
        return map_values(lambda w, site: fake(w, site, state), params, by=by)

    def update(params: Any, state: jax.Array, **extra: Any) -> tuple[Any, jax.Array]:
        del extra
        return params, state + 1

    def compress(params: Any, state: jax.Array) -> Any:
        del state
        return map_values(lambda w, site: encoded(w, site).pack(), params, by=by)

    return Transform(init, view, update, compress)


def _soft(w: jax.Array, stored: QuantizedArray, sharpness: Any) -> jax.Array:
    """The weight on the smooth staircase of a leaf's grid."""
    element = stored.element
    assert isinstance(element, Integer)
    laid = LaidOver.of(w, stored)
    zero = 0.0 if laid.zero is None else laid.zero
    scaled = laid.parts / jnp.where(laid.scale > 0, laid.scale, 1.0)
    scaled = jnp.clip(scaled, element.low - zero, element.high - zero)
    return laid.back(soft_round(scaled, sharpness) * laid.scale).astype(w.dtype)
