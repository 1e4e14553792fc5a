"""DoReFa: weights squashed by tanh onto a grid without zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, resolve_axes
from jaxcompress.quant._activations import static
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Integer, Table
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import PerTensor
from jaxcompress.quant._quantize import encode
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform, stateless
from jaxcompress.values import Site


def dorefa(
    *,
    bits: int,
    activation_bits: int | None = None,
    axes: Axes | int | tuple[int, ...] | None = None,
) -> Transform:
    r"""Squash weights into :math:`[-1, 1]` and round them to :math:`2^k` points there.

    .. math::
        w_q = 2\,\operatorname{quantize}_k\!\left(
              \frac{\tanh w}{2 \max |\tanh w|} + \frac12\right) - 1, \quad
        \operatorname{quantize}_k(r) = \frac{\lfloor (2^k - 1)\, r \rceil}{2^k - 1}

    What is stored is :math:`w_q`, which is not near :math:`w`: the model must be
    trained so, with a normalization after each such layer. The maximum is over one
    weight (one layer of a stack).

    Args:
      bits: k of the weights, 2 to 8. With one bit use ``binary()``.
      activation_bits: Also clip activations to [0, 1] and round them to so many bits,
        2 to 8; the gradient beyond is zero.
      axes: Contracting axes of the weights, or `Axes`.

    Returns:
      A transform. The gradient is straight through the rounding, and that of tanh and
      the maximum before it. A weight of zeros is stored as zeros; elsewhere zero is
      not on the grid. Of 2 or 3 bits, what is stored is a fixed point.

    Raises:
      ValueError: If `bits` or `activation_bits` is out of range.

    Examples:
      >>> scheme = dorefa(bits=2)
      >>> params, state = scheme.init({"w": jnp.array([[0.1, -5.0], [0.4, 2.0]])})
      >>> scheme.compress(params, state)["w"].materialize().round(2).tolist()
      [[0.32999..., -1.0], [0.32999..., 1.0]]

    References:
      Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016, eq. 5, 9
      and 11. Differs: gradients are not quantized; ties of :math:`r` go to the lower
      point.
    """
    if not 2 <= bits <= 8:
        raise ValueError(
            f"dorefa: bits must be 2 to 8; got {bits}. One bit is binary()."
        )
    if activation_bits is not None and not 2 <= activation_bits <= 8:
        raise ValueError(
            f"dorefa: activation_bits must be 2 to 8; got {activation_bits}."
        )
    points = np.linspace(-1.0, 1.0, 2**bits)
    fmt = NumberFormat(
        element=Table(values=tuple(map(float, points)), name=f"dorefa{bits}"),
        granularity=PerTensor(),
        axes=axes,
    )
    given: dict[str, Any] = {}
    if activation_bits is not None:
        element = Integer(bits=activation_bits, symmetric=False, narrow=False)
        fmt = fmt.replace(activations=static(element))
        given = {"activation_scale": 1.0 / element.high, "activation_zero": 0.0}
    by = f"quant.dorefa({fmt.name})"

    def squashed(w: jax.Array, site: Site) -> tuple[jax.Array, jax.Array]:
        """The weight in [-1, 1], and in storage order a scale of 1, or 0 of zeros."""
        stated = axes if axes is not None else site.axes
        roles = resolve_axes(w.shape, stated, who=by, path=site.path)
        t = jnp.tanh(w.astype(jnp.float32))
        largest = jnp.abs(t).max(tuple(range(roles.stack, w.ndim)), keepdims=True)
        found = largest > 0
        scale = found.astype(jnp.float32).reshape(
            *w.shape[: roles.stack], *(1,) * (w.ndim - roles.stack)
        )
        return t / jnp.where(found, largest, 1.0), _merge(scale, roles)

    def encoded(w: jax.Array, scale: jax.Array, site: Site) -> QuantizedArray:
        w = jax.lax.stop_gradient(w)
        return encode(
            w, fmt, axes=site.axes, scale=scale, path=site.path, check=False, **given
        )

    def view(w: jax.Array, site: Site) -> StraightThrough:
        latent, scale = squashed(w, site)
        stored = encoded(latent, scale, site).replace(dtype_name=w.dtype.name)
        return StraightThrough(latent=latent.astype(w.dtype), stored=stored)

    def stored(w: jax.Array, site: Site) -> QuantizedArray:
        latent, scale = squashed(w, site)
        return encoded(latent, scale, site).replace(dtype_name=w.dtype.name).pack()

    def check(w: jax.Array, site: Site) -> None:
        jax.eval_shape(lambda a: stored(a, site), w)

    return stateless(view, stored, by=by, check=check)


def _merge(scale: jax.Array, roles: Axes) -> jax.Array:
    """``[*stack, 1, ...]`` with one axis for all contracting ones."""
    ndim = scale.ndim - len(roles.contract) + 1
    return scale.reshape(*scale.shape[: roles.stack], *(1,) * (ndim - roles.stack))
