"""PACT: activations clipped at a value that is trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.quant._activations import static
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._ranged import RangedArray
from jaxcompress.quant._trained_activations import (
    Start,
    on_stack,
    trained_activations,
)
from jaxcompress.transform import Transform, as_transform


def pact(
    rule: Any,
    *,
    bits: int = 4,
    alpha: Any = 10.0,
    axes: Axes | int | tuple[int, ...] | None = None,
) -> Transform:
    r"""Clip activations to :math:`[0, \alpha]`, quantize them, and train the clip.

    .. math::
        y = \tfrac12 (|x| - |x - \alpha| + \alpha), \quad
        y_q = \left\lfloor y\,\tfrac{2^k - 1}{\alpha} \right\rceil
              \tfrac{\alpha}{2^k - 1}, \quad
        \frac{\partial y_q}{\partial \alpha} = [x \ge \alpha]

    The clip stands in the leaf of the weight that the activations enter, and includes
    the ReLU before it.

    Args:
      rule: How the weights are quantized: a number format or a transform that leaves
        activations alone, such as `dorefa` or `lsq`.
      bits: k, 2 to 8.
      alpha: Where to clip at first: one number, or a mapping from paths, such as
        ``{path: s.high for path, s in stats.items()}``.
      axes: Contracting axes of the weights, or `Axes`, where neither a format nor a
        trace tells them.

    Returns:
      A transform whose ``init`` adds the clip of each weight (of each layer of a
      stack), of role ``"step"``, to the params; the stored form has it as a static
      activation scale. :math:`\alpha` counts by its magnitude. Add `clip_penalty` to
      the loss.

    Raises:
      ValueError: If `bits` is out of range; from ``init``, if `rule` does not quantize
        a weight or quantizes activations.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = pact(int4(), bits=2, alpha=6.0)
      >>> params, state = scheme.init({"w": jnp.eye(4)})
      >>> x = jnp.array([[-3.0, 0.9, 3.1, 9.0]])
      >>> scheme.view(params, state)["w"].prepare_activations(x).tolist()
      [[0.0, 0.0, 4.0, 6.0]]

    References:
      Choi et al., `PACT <https://arxiv.org/abs/1805.06085>`_, 2018, eq. 1 to 3.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"pact: bits must be 2 to 8; got {bits}.")
    name = f" of {rule.name}" if isinstance(rule, NumberFormat) else ""
    by = f"quant.pact{name}"
    if axes is None and isinstance(rule, NumberFormat):
        axes = rule.axes

    def start(path: str, stack: tuple[int, ...]) -> Start:
        return Start(on_stack(alpha, path, stack, by), None)

    return trained_activations(
        as_transform(rule),
        static(Integer(bits=bits, symmetric=False, narrow=False)),
        start,
        gradient="pact",
        axes=axes,
        by=by,
    )


def clip_penalty(params: Any) -> jax.Array:
    r""":math:`\sum \alpha^2` over the clips of `pact` in a tree, for the loss.

    Args:
      params: Params that ``pact(...).init`` returned, or any tree of them.

    Returns:
      float32 scalar; multiply it by the strength of the regularization.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> params, _ = pact(int4(), alpha=3.0).init({"w": jnp.eye(4)})
      >>> clip_penalty(params).item()
      9.0

    References:
      Choi et al., 2018, section 3.2 (L2 regularization of the clip).
    """
    is_clip = lambda x: isinstance(x, RangedArray) and x.gradient == "pact"
    found = jax.tree.leaves(params, is_leaf=is_clip)
    squares = [jnp.square(x.step).sum() for x in found if is_clip(x)]
    return sum(squares, jnp.zeros((), jnp.float32))
