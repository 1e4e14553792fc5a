"""Matmuls whose forward and backward passes run on 8-bit operands."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.quant._elements import E4M3, E5M2, Integer, Minifloat
from jaxcompress.quant._rounding import divisor, round_to_integer

Element = Integer | Minifloat

INT8 = Integer(bits=8)
FP8_DTYPES: dict[Element, Any] = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    forward: Element,
    backward: Element | None,
    key: jax.Array | None = None,
) -> jax.Array:
    r"""`jax.lax.dot_general` on operands rounded to 8 bits, forward and backward.

    Each operand is scaled to the format's range over the axes that are contracted,
    so that its scale stands outside the sum, and rounded:

    .. math:: y_{mn} = s_m t_n \sum_k Q(x_{mk} / s_m)\, Q(w_{kn} / t_n), \quad
        s_m = \max_k |x_{mk}| / q_{max}

    Integers are summed in int32, floats in float32. The gradients are such products
    again, of the incoming gradient (in `backward`) with the other operand (in
    `forward`), each rounded anew along the axes then contracted.

    Args:
      lhs: Float array.
      rhs: Float array.
      dimension_numbers: As of `jax.lax.dot_general`.
      precision: Ignored; so that this can be passed as ``dot_general=`` to a layer.
      preferred_element_type: Dtype of the result.
      forward: Format of both operands: symmetric `quant.Integer`, `quant.E4M3` or
        `quant.E5M2`. Static.
      backward: Format of incoming gradients, of the same kind; None computes
        gradients from the operands themselves, unrounded. Static.
      key: Rounds incoming gradients stochastically, without bias; else to nearest.

    Returns:
      The product, in `preferred_element_type` or the operands' dtype. Slices of
      zeros give exact zeros; a slice with an infinite or NaN entry gives infinite
      or NaN results, so that overflow stays visible to `loss_scaling`.
      Integer sums over more than 2^31 / q_max^2 terms run in float32.

    Raises:
      ValueError: If a format is none of those, or the two are of different kinds.

    Examples:
      >>> x, w = jnp.array([[1.0, 0.5]]), jnp.array([[1.0], [0.25]])
      >>> numbers = (((1,), (0,)), ((), ()))
      >>> y = dot_general(x, w, numbers, forward=INT8, backward=INT8)
      >>> y.round(3).tolist()  # 0.5 is 64/127 and 0.25 is 32/127.
      [[1.127...]]

    References:
      Wang et al., `Training Deep Neural Networks with 8-bit Floating Point Numbers
      <https://arxiv.org/abs/1812.08011>`_, 2018, section 2 (8-bit operands in all
      three matmuls); Banner et al., `Scalable Methods for 8-bit Training
      <https://arxiv.org/abs/1805.11046>`_, 2018; Micikevicius et al., `FP8 Formats
      for Deep Learning <https://arxiv.org/abs/2209.05433>`_, 2022, section 3 (e4m3
      forward, e5m2 backward). Differs: scales for each row and column, not for the
      tensor; float32 accumulation.
    """
    del precision
    check_formats(forward, backward, who="dot_general")
    (lc, rc), (lb, rb) = dimension_numbers
    left, n_left = canonical(lhs, lb, lc)
    right, n_right = canonical(rhs, rb, rc)
    site = _Site(
        batch=len(lb),
        left=n_left,
        right=n_right,
        forward=forward,
        backward=backward,
        dtype=jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs)),
    )
    return _product(site, left, right, key)


def check_formats(forward: Element, backward: Element | None, *, who: str) -> None:
    """Refuse formats that no 8-bit matmul has.

    Raises:
      ValueError: Naming the format.
    """
    for name, element in (("forward", forward), ("backward", backward)):
        if element is None and name == "backward":
            continue
        whole = (
            isinstance(element, Integer) and element.symmetric and not element.fraction
        )
        if not whole and element not in FP8_DTYPES:
            raise ValueError(
                f"{who}: {name} must be a symmetric quant.Integer, quant.E4M3 or "
                f"quant.E5M2; got {element!r}."
            )
    if backward is not None and type(forward) is not type(backward):
        raise ValueError(
            f"{who}: forward and backward must both be integers or both floats, since "
            f"they meet in one matmul; got {forward.label} and {backward.label}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Site:
    """A product of ``[batch, left, contracted]`` and ``[batch, right, contracted]``."""

    batch: int
    left: int
    right: int
    forward: Element
    backward: Element | None
    dtype: Any


def canonical(a: jax.Array, batch: Any, contract: Any) -> tuple[jax.Array, int]:
    """Axes in the order ``[batch, free, contracted]``, and the number of free ones."""
    free = [i for i in range(a.ndim) if i not in batch and i not in contract]
    return jnp.transpose(a, (*batch, *free, *contract)), len(free)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    site: _Site, left: jax.Array, right: jax.Array, key: jax.Array | None
) -> jax.Array:
    del key
    n = site.batch
    y = contract(
        quantize(left, site.forward, _axes(n + site.left, left.ndim)),
        quantize(right, site.forward, _axes(n + site.right, right.ndim)),
        n,
    )
    return y.astype(site.dtype)


def _forward(site: _Site, left: jax.Array, right: jax.Array, key: Any) -> Any:
    return _product(site, left, right, key), (left, right, key)


def _backward(site: _Site, saved: Any, g: jax.Array) -> Any:
    """``dleft = g right`` over right's free axes, ``dright = g left`` over left's."""
    left, right, key = saved
    n, middle = site.batch, site.batch + site.left
    left_axes, right_axes = _axes(n, middle), _axes(middle, g.ndim)
    keys = (None, None) if key is None else jax.random.split(key)

    def meet(other: jax.Array, g_axes: Any, noise: Any) -> jax.Array:
        axes = _axes(n, n + len(g_axes))  # Free axes of `other` follow its batch.
        if site.backward is None:
            return _plain(g, other, g_axes, axes, n).astype(other.dtype)
        a = quantize(g, site.backward, g_axes, noise)
        return contract(a, quantize(other, site.forward, axes), n).astype(other.dtype)

    d_left = meet(right, right_axes, keys[0])
    d_right = meet(left, left_axes, keys[1])
    return d_left.astype(left.dtype), d_right.astype(right.dtype), None


_product.defvjp(_forward, _backward)


def _axes(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _plain(g: jax.Array, other: jax.Array, i: Any, j: Any, n: int) -> jax.Array:
    """The dense product with float32 sums, in the dtype of both or in float32."""
    dtype = g.dtype if g.dtype == other.dtype else jnp.float32
    batch = _axes(0, n)
    return jax.lax.dot_general(
        g.astype(dtype),
        other.astype(dtype),
        ((i, j), (batch, batch)),
        preferred_element_type=jnp.float32,
    )


class Operand(NamedTuple):
    """A rounded operand: ``codes * scale``, plus infinity where it was not finite.

    Attributes:
      codes: int8 or float8, of the operand's shape.
      scale: float32, the contracted axes of size one.
      beyond: 0, or infinity for slices with infinite or NaN entries; as `scale`.
      axes: The contracted axes.
    """

    codes: jax.Array
    scale: jax.Array
    beyond: jax.Array
    axes: tuple[int, ...]


def quantize(
    a: jax.Array,
    element: Element,
    axes: tuple[int, ...],
    key: jax.Array | None = None,
) -> Operand:
    """Round an operand, with a scale for each slice along `axes`."""
    a = a.astype(jnp.float32)
    absmax = jnp.abs(a).max(axes, keepdims=True, initial=0.0)
    finite = jnp.isfinite(absmax)
    scale = jnp.where(finite, absmax, 0.0) / element.largest
    codes = round_codes(jnp.where(finite, a, 0.0) / divisor(scale), element, key)
    return Operand(codes, scale, jnp.where(finite, 0.0, jnp.inf), axes)


def round_codes(
    scaled: jax.Array, element: Element, key: jax.Array | None = None
) -> jax.Array:
    """Scaled float32 as int8 or float8; beyond the format's range it saturates."""
    noise = None if key is None else jax.random.uniform(key, scaled.shape, jnp.float32)
    rounding = "nearest" if key is None else "stochastic"
    if isinstance(element, Integer):
        codes = round_to_integer(scaled, rounding, noise)
        # By way of int32: a CPU has vector instructions for these casts.
        codes = jnp.clip(codes, element.low, element.high).astype(jnp.int32)
        return codes.astype(jnp.int8)
    if noise is not None:
        scaled = element.decode(element.encode(scaled, rounding, noise))
    clipped = jnp.clip(scaled, -element.largest, element.largest)
    return clipped.astype(FP8_DTYPES[element])


def contract(a: Operand, b: Operand, n_batch: int) -> jax.Array:
    """Float32 ``[batch, free of a, free of b]`` of two rounded operands."""
    numbers = ((a.axes, b.axes), (_axes(0, n_batch), _axes(0, n_batch)))
    sums = sum_codes(a.codes, b.codes, numbers)
    a_free = a.codes.ndim - n_batch - len(a.axes)
    b_free = b.codes.ndim - n_batch - len(b.axes)

    def spread(x: jax.Array, axes: Any, *, before: bool) -> jax.Array:
        """Over the result: without its contracted axes, with the other's free ones."""
        x = jnp.squeeze(x, axes)
        at = range(n_batch, n_batch + a_free) if before else range(x.ndim, sums.ndim)
        return jnp.expand_dims(x, tuple(at))

    assert sums.ndim == n_batch + a_free + b_free
    scale_a, beyond_a = (spread(x, a.axes, before=False) for x in (a.scale, a.beyond))
    scale_b, beyond_b = (spread(x, b.axes, before=True) for x in (b.scale, b.beyond))
    return sums * scale_a * scale_b + (beyond_a + beyond_b)


def sum_codes(a: jax.Array, b: jax.Array, numbers: Any) -> jax.Array:
    """float32 `jax.lax.dot_general` of int8 (exact) or float8 codes."""
    sums = jnp.float32
    if a.dtype == jnp.int8:
        terms = math.prod(a.shape[i] for i in numbers[0][0])
        if terms * 127**2 < 2**31:
            sums = jnp.int32
        else:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=sums).astype(
        jnp.float32
    )
