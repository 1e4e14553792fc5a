"""`delayed`: quantization that begins after some training."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf, materialize
from jaxcompress.quant._switched import SwitchedArray, switched_on
from jaxcompress.transform import Transform, as_transform
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Oriented


class DelayedState(NamedTuple):
    """State of `delayed`.

    Attributes:
      inner: The rule's state.
      step: ``int32`` updates so far.
    """

    inner: Any
    step: jax.Array


def delayed(rule: Any, *, begin: int) -> Transform:
    """Train dense weights until a step, and from then on as a rule says.

    Args:
      rule: A number format or transform. What acts on the same weights before it
        stays outside, ``chain(prune.magnitude(...), delayed(int4(), begin=...))``;
        what comes after it, inside.
      begin: Updates before the rule is applied and its own updates are run.

    Returns:
      A transform. Until `begin` the view is dense (without its quantized activations
      too); from then on it is the rule's, bit for bit what `compress` stores.
      `compress` always applies the rule. What the rule's ``init`` adds to the params
      (steps, clips) is there from the first step on, and starts from the weights that
      ``init`` saw.

    Raises:
      ValueError: If `begin` is negative.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = delayed(int4(), begin=1)
      >>> params, state = scheme.init({"w": jnp.array([[3.4], [-7.0]])})
      >>> scheme.view(params, state)["w"].materialize().round(1).tolist()
      [[3.4...], [-7.0]]
      >>> params, state = scheme.update(params, state)
      >>> scheme.view(params, state)["w"].materialize().tolist()
      [[3.0], [-7.0]]

    References:
      Jacob et al., 2018, section 3.1 (activations are quantized after a delay).
      Differs: weights too.
    """
    if begin < 0:
        raise ValueError(f"delayed: begin must not be negative; got {begin}.")
    part = as_transform(rule)

    def init(params: Any) -> tuple[Any, DelayedState]:
        params, inner = part.init(params)
        return params, DelayedState(inner, jnp.zeros((), jnp.int32))

    def view(params: Any, state: DelayedState) -> Any:
        flat, structure = flatten(part.view(params, state.inner))
        before, _ = flatten(params)
        on = state.step >= begin
        return unflatten(
            structure,
            {path: _switch(before[path], leaf, on) for path, leaf in flat.items()},
        )

    def update(
        params: Any, state: DelayedState, **extra: Any
    ) -> tuple[Any, DelayedState]:
        params, inner = jax.lax.cond(
            state.step >= begin,
            lambda: part.update(params, state.inner, **extra),
            lambda: (params, state.inner),
        )
        return params, DelayedState(inner, state.step + 1)

    def compress(params: Any, state: DelayedState) -> Any:
        return part.compress(params, state.inner)

    return Transform(init, view, update, compress)


def _switch(before: Any, after: Any, on: jax.Array) -> Any:
    """A leaf of the view; what the rule left alone stays as it is."""
    if isinstance(after, Oriented):
        return after.replace(value=_switch(before, after.value, on))
    if not isinstance(after, Leaf) or after is before:
        return after
    dense = materialize(before)
    return SwitchedArray(dense=dense, compressed=after, on=switched_on(on, dense.shape))
