"""Whole layers: which matter least, a model without some, and layers merged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.lift import _compat
from jaxcompress.lift._trace import Trace, Tracer
from jaxcompress.prune.structure._segments import (
    MISSING,
    Segment,
    find_segment,
    record,
    run_without,
)


class Fewer(NamedTuple):
    """The result of `remove_layers`.

    Attributes:
      params: Without the layers' params.
      fn: Runs them: each layer that is gone hands on what enters it.
    """

    params: Any
    fn: Callable[..., Any]


def remove_layers(
    fn: Callable[..., Any], params: Any, layers: Sequence[str], *example: Any
) -> Fewer:
    """A model without some of its layers.

    A layer is the part of the traced program that uses the params below one path; one
    value enters it, and one of the same shape and dtype leaves, as in residual stacks.
    (Layers stacked and scanned are a group of the dependency graph: remove its units.)

    Args:
      fn: ``fn(params, *example)``.
      params: Nested dicts of arrays.
      layers: Paths of the layers' params: ``"params/layers_3"``.
      *example: Arguments of one call; only their shapes matter.

    Returns:
      The remaining params and a function of any other arguments that `fn` accepts.

    Raises:
      ValueError: If a path has no params, or its params are not one such part.

    References:
      Men et al., `ShortGPT <https://arxiv.org/abs/2403.03853>`_, 2024.
    """
    flat, _ = tree.flatten(params)
    gone = {path for path in flat for layer in layers if _below(path, layer)}
    big = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    tracer = Tracer(fn, who="remove_layers")

    def find(trace: Trace) -> tuple[Trace, list[Segment]]:
        return trace, [_segment(trace, flat, layer) for layer in layers]

    def traced(args: Any, kwargs: Any) -> tuple[Trace, list[Segment], list[Any]]:
        signature, operands = tracer.signature((big, *args), kwargs)
        return *tracer(signature, find), operands[len(flat) :]

    def shorter(params: Any, *args: Any, **kwargs: Any) -> Any:
        trace, segments, rest = traced(args, kwargs)
        left, _ = tree.flatten(params)
        weights = [MISSING if path in gone else left[path] for path in flat]
        outs = run_without(trace.jaxpr, [*weights, *rest], segments)
        return jax.tree.unflatten(trace.out_tree, outs)

    traced(example, {})
    return Fewer(_without(params, layers), shorter)


def layer_influence(
    fn: Callable[..., Any],
    params: Any,
    layers: Sequence[str],
    batches: Iterable[tuple[Any, ...]],
) -> dict[str, float]:
    r"""How much each layer turns what it gets: the least are the first to remove.

    .. math:: 1 - \mathbb{E} \frac{x_{in}^T x_{out}}{|x_{in}| |x_{out}|}

    Args:
      fn: ``fn(params, *batch)``.
      params: Pytree of arrays.
      layers: As for `remove_layers`.
      batches: Tuples of arguments; the mean is over all rows of all of them.

    Returns:
      By path, between 0 and 2.

    Raises:
      ValueError: As `remove_layers` does; or if there are no batches.

    References:
      Men et al., `ShortGPT <https://arxiv.org/abs/2403.03853>`_, 2024, eq. 1.
    """
    flat, _ = tree.flatten(params)
    tracer = Tracer(fn, who="layer_influence")

    @jax.jit
    def measure(params: Any, *batch: Any) -> jax.Array:
        signature, operands = tracer.signature((params, *batch), {})
        trace = tracer(signature, lambda trace: trace)
        segments = [_segment(trace, flat, layer) for layer in layers]
        pairs = record(trace.jaxpr, operands, segments)
        return jnp.stack([_turned(a, b) for a, b in pairs])

    found = [measure(params, *batch) for batch in batches]
    if not found:
        raise ValueError("layer_influence: batches must not be empty; got none.")
    mean = jnp.stack(found).mean(0)
    return dict(zip(layers, mean.tolist(), strict=True))


def _turned(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return 1.0 - ((a * b).sum(-1) / jnp.maximum(norms, 1e-30)).mean()


def merge_layers(params: Any, keep: str, drop: str, *, weight: float = 0.5) -> Any:
    r"""Params in which one layer has taken up another, ready to remove that.

    .. math:: \theta_{keep} + weight \cdot (\theta_{drop} - \theta_{keep})

    Args:
      params: Nested dicts of arrays.
      keep: Path of the layer that stays.
      drop: Path of a layer with the same params; unchanged here.
      weight: 0.5 averages; 1 takes up all that the other differs by.

    Raises:
      ValueError: If the layers' params differ in structure or shape.

    References:
      Yang et al., `LaCo <https://arxiv.org/abs/2402.11187>`_, 2024, eq. 1.
    """
    flat, structure = tree.flatten(params)
    pairs = {p: drop + p[len(keep) :] for p in flat if _below(p, keep)}
    others = {p for p in flat if _below(p, drop)}
    if not pairs or set(pairs.values()) != others:
        raise ValueError(
            f"merge_layers: {keep!r} and {drop!r} must have the same params; got "
            f"{sorted(pairs)} and {sorted(others)}."
        )
    for mine, other in pairs.items():
        if flat[mine].shape != flat[other].shape:
            raise ValueError(
                f"merge_layers: {mine!r} and {other!r} must have one shape; got "
                f"{flat[mine].shape} and {flat[other].shape}."
            )
    merged = {
        mine: flat[mine]
        + (flat[other] - flat[mine]) * jnp.asarray(weight, flat[mine].dtype)
        for mine, other in pairs.items()
    }
    return tree.unflatten(structure, {**flat, **merged})


def _below(path: str, layer: str) -> bool:
    return path == layer or path.startswith(layer + "/")


def _segment(trace: Trace, flat: dict[str, Any], layer: str) -> Segment:
    mine = [_below(path, layer) for path in flat]
    if not any(mine):
        some = sorted({path.rsplit("/", 2)[0] for path in flat})
        raise ValueError(
            f"remove_layers: no params are below {layer!r}; there are {some[:8]}."
        )
    rest = len(_compat.program(trace.jaxpr).invars) - len(flat)
    found = find_segment(
        trace.jaxpr, mine + [False] * rest, [True] * len(flat) + [False] * rest
    )
    if found is None:
        raise ValueError(
            f"remove_layers: the params below {layer!r} are not one part of the "
            "program with one value in and one of the same shape and dtype out, so "
            "it cannot hand on what enters it. Name a whole residual layer; of layers "
            "that are stacked and scanned remove units of their group "
            "(dependency_graph)."
        )
    return found


def _without(params: Any, layers: Sequence[str], at: str = "") -> Any:
    if not isinstance(params, dict):
        return params
    paths = {key: f"{at}/{key}" if at else str(key) for key in params}
    return {
        key: _without(value, layers, paths[key])
        for key, value in params.items()
        if paths[key] not in layers
    }
