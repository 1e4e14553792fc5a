"""Rules that give a model's first and last matmul a format of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress.lift import explain
from jaxcompress.quant._format import int8

_MATMULS = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


def first_and_last(
    fn: Callable[..., Any],
    params: Any,
    *example: Any,
    inner: Any,
    outer: Any = None,
) -> dict[str, Any]:
    """Rules for every weight of a matmul or convolution, in the traced order.

    Args:
      fn: As for `lift`; `params` is its first argument.
      params: Parameter pytree, concrete or abstract.
      *example: Example arguments of `fn`.
      inner: A rule for the weights between: a number format or transform.
      outer: A rule for the weights that are used first and last; by default 8 bits,
        ``int8()``.

    Returns:
      From paths to rules, for `select` (with ``axes=trace_axes(...)``), `compress` or
      `plan`. Weights that are only looked up in (embeddings), biases and norms have no
      rule; scanned layers, of one path, have one. A weight that is used both first
      and last, or with no other, has `outer`.

    Raises:
      ValueError: If `fn` has no matmul with a weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxcompress.quant import int4
      >>> fn = lambda p, x: ((x @ p["a"]) @ p["b"]) @ p["c"]
      >>> params = {name: jnp.eye(4) for name in "abc"}
      >>> rules = first_and_last(fn, params, jnp.ones((1, 4)), inner=int4())
      >>> {path: fmt.name for path, fmt in rules.items()}
      {'a': 'int8', 'b': 'int4', 'c': 'int8'}

    References:
      Zhou et al., `DoReFa-Net <https://arxiv.org/abs/1606.06160>`_, 2016, section 2.7
      (first and last layer). Differs: of 8 bits, not left dense.
    """
    sites = [s for s in explain(fn, params, *example) if s.op in _MATMULS]
    if not sites:
        raise ValueError(
            "first_and_last: the function has no matmul with a weight of params; pass "
            "the weights as its first argument."
        )
    ends = {sites[0].path, sites[-1].path}
    outer = int8() if outer is None else outer
    return {
        path: outer if path in ends else inner
        for path in dict.fromkeys(s.path for s in sites)
    }
