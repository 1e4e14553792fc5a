"""The values of the leaves of a tree: walked, mapped and checked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcompress import tree
from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    WEIGHT,
    Leaf,
    OrderError,
    component,
    leaf_type,
    map_value,
    static,
)

Params = Any


class Site(NamedTuple):
    """Where a transform meets a value.

    Attributes:
      path: Key path of the leaf.
      number: Which of the leaf's values this is.
      axes: Roles of its axes where the trace told them, else None.
    """

    path: str
    number: int
    axes: Axes | None


@leaf_type
class Oriented(Leaf):
    """A value on its way through a transform, with the roles of its axes."""

    value: Any = component(role=WEIGHT)
    axes: Axes = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return jnp.shape(self.value)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.value.dtype

    @property
    def method(self) -> str:
        """That of the value."""
        return getattr(self.value, "method", "dense")

    def materialize(self) -> jax.Array:
        """The dense value."""
        value = self.value
        return value.materialize() if isinstance(value, Leaf) else value

    def values(self) -> tuple[Any, ...]:
        """Those of the value."""
        return values(self.value)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the value and keep the axes."""
        return self.replace(value=map_value(f, self.value))


def bare(x: Any) -> Any:
    """A leaf without the roles that a rule states for its axes."""
    return x.value if isinstance(x, Oriented) else x


def values(leaf: Any) -> tuple[Any, ...]:
    """The float arrays a transform may act on: an array itself, or a leaf's values."""
    return leaf.values() if isinstance(leaf, Leaf) else (leaf,)


def map_values(f: Callable[[Any, Site], Any], params: Params, *, by: str) -> Params:
    """`f(value, site)` of every value of every leaf, keeping each leaf's structure.

    Args:
      f: Takes a float array and where it stands; returns an array or a leaf of the
        same logical shape.
      params: Any pytree.
      by: Name of the transform, for errors.

    Raises:
      OrderError: If a leaf's constraint would be undone.
    """
    flat, structure = tree.flatten(params)
    return tree.unflatten(
        structure, {path: _map_leaf(f, path, leaf, by) for path, leaf in flat.items()}
    )


def replace_weights(
    f: Callable[[Any, Site], Any],
    params: Params,
    *,
    ready: Callable[[Any, str], bool],
    by: str,
) -> Params:
    """`f(value, site)` of every weight, but for leaves that are ``ready(leaf, path)``.

    For an ``init`` that puts a leaf in the place of a weight: an optimizer's `attach`
    calls it again, on params that it has returned.

    Raises:
      ValueError: As `check_weights` does.
      TypeError: As `check_weights` does.
      OrderError: As `map_values` does.
    """
    check_weights(params, who=by)
    flat, structure = tree.flatten(params)
    fresh = {path: x for path, x in flat.items() if not ready(bare(x), path)}
    return tree.unflatten(structure, flat | map_values(f, fresh, by=by))


def _map_leaf(f: Callable[[Any, Site], Any], path: str, leaf: Any, by: str) -> Any:
    index = itertools.count()

    def at_site(value: Any) -> Any:
        number = next(index)
        return f(value, Site(path, number, _axes_of_value(leaf, number, value)))

    try:
        return map_value(at_site, leaf)
    except OrderError as error:
        raise OrderError(f"{by} at {path!r}: {error}") from None


def _axes_of_value(leaf: Any, number: int, value: Any) -> Axes | None:
    """Roles of the axes of a leaf's value: the weight's, or those the leaf states."""
    if isinstance(leaf, Oriented):
        if jnp.shape(value) == leaf.shape:
            return leaf.axes
        leaf = leaf.value
    stated = leaf.value_axes() if isinstance(leaf, Leaf) else ()
    return stated[number] if stated else None


def for_values(f: Callable[[Any, Site], Any], params: Params) -> dict[str, tuple]:
    """`f(value, site)` of every value, collected by path: a transform's own state."""
    flat, _ = tree.flatten(params)
    collected = {}
    for path, leaf in flat.items():
        collected[path] = tuple(
            f(v, Site(path, i, _axes_of_value(leaf, i, v)))
            for i, v in enumerate(values(leaf))
        )
    return collected


def check_weights(params: Params, *, who: str) -> None:
    """Refuse what no method can compress, naming the leaf, before any work.

    Raises:
      ValueError: For a scalar, an empty array, or NaN or infinite entries (of
        concrete arrays; traced ones cannot be looked at).
      TypeError: For integer, boolean or complex arrays.
    """
    for path, leaf in tree.flatten(params)[0].items():
        for value in values(leaf):
            check_weight(value, path, who)


@jax.jit
def _count_bad(value: jax.Array) -> jax.Array:
    """How many entries are NaN or infinite."""
    return (~jnp.isfinite(value)).sum()


def check_weight(value: Any, path: str, who: str) -> None:
    """Refuse one array, as `check_weights` does a tree."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        kind = type(value).__name__ if dtype is None else dtype
        raise TypeError(
            f"{who}: weights must be real floating arrays; {path!r} is {kind}. Leave "
            "it out of the rule, with where(pattern, exclude=...)."
        )
    if value.ndim == 0 or value.size == 0:
        raise ValueError(
            f"{who}: weights must have at least one axis and one element; {path!r} has "
            f"shape {value.shape}. Leave it out of the rule."
        )
    if isinstance(value, Tracer | jax.ShapeDtypeStruct):
        return
    if isinstance(value, np.ndarray):
        bad = int((~np.isfinite(value)).sum())
    else:
        with jax.ensure_compile_time_eval():
            bad = int(_count_bad(value))
    if bad:
        raise ValueError(
            f"{who}: weights must be finite; {path!r} has {bad} NaN or infinite of "
            f"{jnp.size(value)} entries. Restore it from an earlier checkpoint."
        )


def leaf_key(key: jax.Array, site: Site) -> jax.Array:
    """A key for one value: the same for the same path, whatever else is in the tree."""
    return jax.random.fold_in(
        key, zlib.crc32(f"{site.path}#{site.number}".encode()) & 0x7FFFFFFF
    )
