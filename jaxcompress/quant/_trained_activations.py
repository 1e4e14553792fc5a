"""Static activations whose range is trained, beside any weight transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import resolve_axes
from jaxcompress.quant._activations import Activations
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._ranged import RangedArray, TrainedActivations, usable
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Oriented, bare

Gradient = Literal["lsq", "pact"]


class Start(NamedTuple):
    """A range at first, ``float32[*stack]``: the step or clip, and the lowest value."""

    step: jax.Array
    offset: jax.Array | None


def on_stack(a: Any, path: str, stack: tuple[int, ...], by: str) -> jax.Array:
    """A number, that of a path, or one a stack entry, as ``float32[*stack]``.

    Raises:
      ValueError: If the path is missing or the shape is another.
    """
    if isinstance(a, Mapping):
        if path not in a:
            raise ValueError(f"{by}: there is none for {path!r}, only for {sorted(a)}.")
        a = a[path]
    a = jnp.asarray(a, jnp.float32)
    if a.shape not in ((), stack):
        raise ValueError(
            f"{by}: {path!r} has a stack {stack}, but its activations start from "
            f"{a.shape}; state the axes of the weight, as with axes=-2."
        )
    return jnp.broadcast_to(a, stack)


def trained_activations(
    rule: Transform,
    activations: Activations,
    start: Callable[[str, tuple[int, ...]], Start],
    *,
    gradient: Gradient,
    axes: Any,
    by: str,
) -> Transform:
    """A transform of weights, with static activations whose range is trained.

    Args:
      rule: Quantizes the weights and leaves activations alone.
      activations: Static, of integers.
      start: From a path and the sizes of its stack axes to the range at first.
      gradient: Whose gradients the range has.
      axes: Roles of the weights' axes, or their contracting axes.
      by: Name of the transform, for errors.
    """

    def stored(leaf: QuantizedArray, taught: RangedArray) -> QuantizedArray:
        if leaf.activations is not None:
            raise ValueError(
                f"{by}: the weights' format must leave activations alone; got "
                f"{leaf.label}."
            )
        scale, zero = _grid(taught, activations)
        lead = lambda a: a.reshape(
            *a.shape, *(1,) * (leaf.scale.ndim - taught.step.ndim)
        )
        return leaf.replace(
            activations=activations,
            activation_scale=lead(scale),
            activation_zero=None if zero is None else lead(zero),
            label=f"{leaf.label} + {activations.label}",
        )

    def trained(leaf: StraightThrough, taught: RangedArray) -> TrainedActivations:
        assert isinstance(leaf.stored, QuantizedArray)
        inner = leaf.replace(stored=stored(leaf.stored, taught))
        assert isinstance(inner.stored, QuantizedArray)
        assert inner.stored.activation_scale is not None
        shape = inner.stored.activation_scale.shape
        offset = None if taught.offset is None else taught.offset.reshape(shape)
        return TrainedActivations(
            inner=inner,
            step=taught.step.reshape(shape),
            offset=offset,
            gradient=gradient,
        )

    def fresh(path: str, leaf: Any) -> RangedArray:
        stated = axes
        if isinstance(leaf, Oriented):
            stated = axes if axes is not None else leaf.axes
            leaf = leaf.value
        stack = resolve_axes(leaf.shape, stated, who=by, path=path).stack
        found = start(path, leaf.shape[:stack])
        return RangedArray(inner=leaf, gradient=gradient, **found._asdict())

    def init(params: Any) -> tuple[Any, Any]:
        ranges = _ranges(params)
        inner, state = rule.init(_bare(params))
        flat, structure = flatten(inner)
        for path, leaf in flat.items():
            if path not in ranges:
                ranges[path] = fresh(path, leaf)
        params = unflatten(structure, _with_ranges(flat, ranges))
        jax.eval_shape(view, params, state)
        return params, state

    def apply(params: Any, kind: type, found: Any, f: Callable[..., Any]) -> Any:
        """`f` of the leaves of a kind in the inner rule's result, with their range."""
        ranges = _ranges(params)
        flat, structure = flatten(found)
        is_kind = lambda x: isinstance(x, kind)
        result = {}
        for path, leaf in flat.items():
            if path not in ranges:
                raise ValueError(
                    f"{by}: {path!r} has no learned range; pass the params that init "
                    "returned."
                )
            inside = [x for x in jax.tree.leaves(leaf, is_leaf=is_kind) if is_kind(x)]
            if len(inside) != 1:
                raise ValueError(
                    f"{by}: the rule must quantize one weight at {path!r}; it "
                    f"quantizes {len(inside)}. Give it a number format."
                )
            result[path] = jax.tree.map(
                lambda x, p=path: f(x, ranges[p]) if is_kind(x) else x,
                leaf,
                is_leaf=is_kind,
            )
        return unflatten(structure, result)

    def view(params: Any, state: Any) -> Any:
        found = rule.view(_bare(params), state)
        return apply(params, StraightThrough, found, trained)

    def update(
        params: Any, state: Any, *, grads: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        inner, state = rule.update(_bare(params), state, grads=_bare(grads), **extra)
        flat, structure = flatten(inner)
        return unflatten(structure, _with_ranges(flat, _ranges(params))), state

    def compress(params: Any, state: Any) -> Any:
        return apply(
            params, QuantizedArray, rule.compress(_bare(params), state), stored
        )

    return Transform(init, view, update, compress)


def _grid(taught: RangedArray, activations: Activations) -> Any:
    """Scale and zero point of a range."""
    element = activations.element
    assert isinstance(element, Integer)
    step = usable(taught.step)
    if taught.gradient == "pact":
        scale = step / (element.high - element.low)
        return scale, jnp.full_like(scale, element.low)
    if element.symmetric:
        return step, None
    if taught.offset is None:
        return step, jnp.full_like(step, element.low)
    zero = element.low - jnp.round(taught.offset / step)
    return step, jnp.clip(zero, element.low, element.high)


def _is_ranged(x: Any) -> bool:
    return isinstance(x, RangedArray)


def _ranges(params: Any) -> dict[str, RangedArray]:
    """The range of each leaf that has one, by path."""
    flat, _ = flatten(params)
    return {p: bare(x) for p, x in flat.items() if _is_ranged(bare(x))}


def _bare(params: Any) -> Any:
    """The weights without their ranges."""
    return jax.tree.map(
        lambda x: x.inner if _is_ranged(x) else x, params, is_leaf=_is_ranged
    )


def _with_ranges(
    flat: Mapping[str, Any], ranges: Mapping[str, RangedArray]
) -> dict[str, Any]:
    """Undo `_bare`."""

    def one(leaf: Any, taught: RangedArray) -> Any:
        if isinstance(leaf, Oriented):
            return leaf.replace(value=taught.replace(inner=leaf.value))
        return taught.replace(inner=leaf)

    return {p: one(x, ranges[p]) if p in ranges else x for p, x in flat.items()}
