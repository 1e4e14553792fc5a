"""`compress`: one call from parameters and rules to the stored form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxcompress.lift._explain import trace_axes
from jaxcompress.transform import select


def compress(
    params: Any,
    rules: Mapping[Any, Any],
    *,
    fn: Callable[..., Any] | None = None,
    example: Any = (),
) -> Any:
    """Compress the leaves that the rules choose, without training.

    Args:
      params: Parameter pytree.
      rules: From glob patterns, `where(...)` or predicates ``(path, leaf) -> bool``
        to number formats, presets or transforms.
      fn: The function the parameters are for; then which axes each weight contracts
        is read off its trace. Without it, plain matrices contract axis -2 and
        weights of higher rank need ``axes=`` in their rule.
      example: Example arguments of `fn` after the parameters: a tuple, or one
        argument.

    Returns:
      `params` with compressed leaves where the rules chose; other leaves are the
      same objects.

    Raises:
      ValueError: If a rule matches nothing, two rules match one leaf, a weight is not
        finite, a group does not divide, or axes are unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> compress({"kernel": jnp.ones((64, 8))}, {"*": jc.quant.int4(group_size=32)})
      {'kernel': QuantizedArray(int4 g32, float32[64, 8])}
    """
    axes = None
    if fn is not None:
        args = example if isinstance(example, tuple) else (example,)
        axes = trace_axes(fn, params, *args)
    scheme = select(rules, axes=axes)
    return scheme.compress(*scheme.init(params))
