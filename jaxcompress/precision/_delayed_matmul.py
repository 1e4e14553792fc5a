"""The fp8 product with scales known beforehand, and what it has seen."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.precision._matmul import Element, round_codes, sum_codes
from jaxcompress.quant._rounding import floor_log2, power_of_two

LOWEST, HIGHEST = -126, 127
BINS = HIGHEST - LOWEST + 1
LEFT, RIGHT, GRADIENT = range(3)


def exponent(absmax: jax.Array, element: Element) -> jax.Array:
    """Least `e` in [-126, 127] with ``absmax <= 2^e * largest``; -127 of no maximum.

    (Zero, infinity and NaN are no maximum to record.)
    """
    seen = jnp.isfinite(absmax) & (absmax > 0)
    ratio = jnp.where(seen, absmax, 1.0) / element.largest
    low = jnp.maximum(floor_log2(ratio), LOWEST)
    e = low + (ratio > power_of_two(low)).astype(jnp.int32)
    return jnp.where(seen, jnp.clip(e, LOWEST, HIGHEST), LOWEST - 1)


def scales(ages: jax.Array, window: int, margin: int) -> jax.Array:
    """``[..., BINS] -> [...]``: 2 to the largest exponent in the window, or 1."""
    exponents = jnp.arange(LOWEST, HIGHEST + 1, dtype=jnp.int32)
    exponents = exponents.reshape((1,) * (ages.ndim - 1) + (BINS,))
    e = jnp.where(ages < window, exponents, LOWEST - 1).max(-1)
    e = jnp.where(e < LOWEST, 0, e + margin)
    return power_of_two(jnp.clip(e, LOWEST, HIGHEST))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A product of ``[batch, left, contracted]`` and ``[batch, right, contracted]``.

    Attributes:
      batch: Number of batch axes.
      left: Number of the left operand's free axes.
      forward: Format of operands.
      backward: Format of incoming gradients.
      window: Updates that the scales look back.
      margin: Powers of two to spare.
    """

    batch: int
    left: int
    forward: Element
    backward: Element
    window: int
    margin: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    site: Site, left: jax.Array, right: jax.Array, ages: jax.Array
) -> jax.Array:
    """Float32 ``[batch, left, right]``; ``ages: float32[3, BINS]``."""
    return _forward(site, left, right, ages)[0]


def _forward(site: Site, left: Any, right: Any, ages: Any) -> Any:
    """Keeps the fp8 codes for the backward pass: one scale serves both."""
    scale = scales(ages, site.window, site.margin)
    ql, qr = (
        round_codes(a.astype(jnp.float32) / s, site.forward)
        for a, s in ((left, scale[LEFT]), (right, scale[RIGHT]))
    )
    n, k = site.batch, left.ndim - site.batch - site.left
    l_axes = tuple(range(left.ndim - k, left.ndim))
    r_axes = tuple(range(right.ndim - k, right.ndim))
    y = _sum(ql, qr, l_axes, r_axes, n) * scale[LEFT] * scale[RIGHT]
    tops = _absmax(left), _absmax(right)
    y += _beyond(tops[0]) + _beyond(tops[1])
    seen = [exponent(top, site.forward) for top in tops]
    empty = jnp.zeros((), left.dtype), jnp.zeros((), right.dtype)  # For their dtypes.
    return y, (ql, qr, scale, seen, empty)


def _backward(site: Site, saved: Any, g: jax.Array) -> Any:
    """Gradients from fp8 codes; as the cotangent of `ages`, what has been seen."""
    ql, qr, scale, seen, like = saved
    n, middle = site.batch, site.batch + site.left
    qg = round_codes(g / scale[GRADIENT], site.backward)
    top = _absmax(g)
    beyond = _beyond(top)
    right_axes, left_axes = tuple(range(middle, g.ndim)), tuple(range(n, middle))
    d_left = _sum(qg, qr, right_axes, tuple(range(n, n + len(right_axes))), n)
    d_right = _sum(qg, ql, left_axes, left_axes, n)
    d_left = d_left * scale[GRADIENT] * scale[RIGHT] + beyond
    d_right = d_right * scale[GRADIENT] * scale[LEFT] + beyond
    exponents = jnp.stack([*seen, exponent(top, site.backward)])
    observed = jax.nn.one_hot(exponents - LOWEST, BINS, dtype=jnp.float32)
    return d_left.astype(like[0].dtype), d_right.astype(like[1].dtype), observed


product.defvjp(_forward, _backward)


def _sum(a: jax.Array, b: jax.Array, i: Any, j: Any, n: int) -> jax.Array:
    batch = tuple(range(n))
    return sum_codes(a, b, ((i, j), (batch, batch)))


def _absmax(a: jax.Array) -> jax.Array:
    return jnp.abs(a.astype(jnp.float32)).max(initial=0.0)


def _beyond(absmax: jax.Array) -> jax.Array:
    """0, or infinity if an entry is not finite: saturating would hide an overflow."""
    return jnp.where(jnp.isfinite(absmax), 0.0, jnp.inf)


def shared(ages: jax.Array) -> jax.Array:
    """``[*stack, 3, BINS] -> [3, BINS]``: what any of a stack has seen."""
    return ages if ages.ndim == 2 else _youngest(ages)


@jax.custom_vjp
def _youngest(ages: jax.Array) -> jax.Array:
    return ages.min(range(ages.ndim - 2))


_youngest.defvjp(
    lambda ages: (_youngest(ages), ages.shape),
    lambda shape, seen: (
        jnp.broadcast_to(seen.reshape((1,) * (len(shape) - 2) + seen.shape), shape),
    ),
)
