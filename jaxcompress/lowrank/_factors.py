"""The base of leaves that are computed from parts, and how factors are multiplied."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    Cast,
    LayoutOp,
    Leaf,
    OrderError,
    Ran,
    Traits,
    dense_dot_general,
    map_value,
    relayout,
)


class CompositeLeaf(Leaf):
    """A weight that is computed from parts, each an array or a leaf.

    Later transforms in a chain act on the parts, so the structure stays. A matmul runs
    through the parts' own rules and forms no dense weight.
    """

    @property
    def traits(self) -> Traits:
        """A matmul of its own."""
        return Traits(own_matmul=True)

    @abc.abstractmethod
    def parts(self) -> tuple[Any, ...]:
        """The parts, in a fixed order."""

    @abc.abstractmethod
    def with_parts(self, parts: Sequence[Any]) -> Self:
        """The leaf with others in their place."""

    @abc.abstractmethod
    def part_axes(self) -> tuple[Axes | None, ...]:
        """Roles of the axes of each part in the matmul that it is for."""

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.parts()[0].dtype

    @property
    def kind(self) -> str:
        """The method of parts that are leaves, with a space before it."""
        kinds = [f.method for f in self.parts() if isinstance(f, Leaf)]
        return f" {kinds[0]}" if kinds else ""

    def values(self) -> tuple[Any, ...]:
        """Those of the parts."""
        return tuple(v for part in self.parts() for v in _values(part))

    def value_axes(self) -> tuple[Axes | None, ...]:
        """Those of the parts."""
        found: list[Axes | None] = []
        for part, axes in zip(self.parts(), self.part_axes(), strict=True):
            stated = part.value_axes() if isinstance(part, Leaf) else ()
            same = lambda v, part=part: jnp.shape(v) == jnp.shape(part)
            own = tuple(axes if same(v) else None for v in _values(part))
            found.extend(stated or own)
        return tuple(found)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the parts.

        Raises:
          OrderError: If a part would be taken apart again.
        """

        def once(value: jax.Array) -> jax.Array | Leaf:
            result = f(value)
            if isinstance(result, CompositeLeaf):
                raise OrderError(
                    f"{self.method} is made of factors already; factor a weight once, "
                    "with the rank that is wanted."
                )
            return result

        return self.with_parts([map_value(once, x) for x in self.parts()])

    def relayout(self, op: LayoutOp) -> Leaf:
        """Casts alone, of every part."""
        if not isinstance(op, Cast):
            return NotImplemented
        parts = [relayout(part, op) for part in self.parts()]
        if any(part is NotImplemented for part in parts):
            return NotImplemented
        return self.with_parts(parts)


def _values(part: Any) -> tuple[Any, ...]:
    return part.values() if isinstance(part, Leaf) else (part,)


def dense(factor: Any) -> jax.Array:
    """A factor as an array."""
    return factor.materialize() if isinstance(factor, Leaf) else factor


def wide(factor: Any) -> jax.Array:
    """A factor as a float32 array."""
    return dense(factor).astype(jnp.float32)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A float32 matmul in full precision."""
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def contract(x: jax.Array, factor: Any, dimension_numbers: Any, **params: Any) -> Ran:
    """`jax.lax.dot_general` of `x` and a factor, by its own rule if it has one."""
    if isinstance(factor, Leaf):
        return factor.dot_general(x, dimension_numbers, leaf_is_lhs=False, **params)
    return Ran(jax.lax.dot_general(x, factor, dimension_numbers, **params), "dot")


def narrowed(y: jax.Array, dtype: Any) -> jax.Array:
    """A float32 value between two products, in the dtype of the activations.

    Rounded in any case: XLA may leave the rounding out where the value is widened again
    at once, and does so in one program and not in another.
    """
    if jnp.dtype(dtype).itemsize < 4:
        info = jnp.finfo(dtype)
        y = jax.lax.reduce_precision(y, info.nexp, info.nmant)
    return y.astype(dtype)


def factor_specs(factor: Any, spec: Sequence[Any], sizes: dict[Any, int]) -> Any:
    """Specs of a factor's components, from one entry for each of its axes."""
    if isinstance(factor, Leaf):
        return factor.component_specs(tuple(spec), sizes)
    return PartitionSpec(*spec)


class Way(NamedTuple):
    """How a matmul goes through the factors of a weight.

    Attributes:
      enters: Logical axes of the weight that are contracted, negative.
      steps: Factors, each with its axes that are contracted: those of `enters` in the
        first, one with what the last step gave in the others. Stacks lead in all.
    """

    enters: tuple[int, ...]
    steps: tuple[tuple[Any, tuple[int, ...]], ...]


def multiply(
    leaf: Leaf,
    x: jax.Array,
    dimension_numbers: Any,
    *,
    leaf_is_lhs: bool,
    stack: int,
    ways: Sequence[Way],
    between: Callable[[jax.Array, tuple[int, ...]], jax.Array] = lambda y, batch: y,
    **params: Any,
) -> Ran:
    """`jax.lax.dot_general` through factors, where a way fits; else dense.

    Args:
      leaf: The weight.
      x: The other operand.
      dimension_numbers: As for `jax.lax.dot_general`.
      leaf_is_lhs: Whether the weight is the left operand.
      stack: Leading axes of the weight that stack; all must be batch axes.
      ways: Those there are; their last factors end in the other axes, in order.
      between: Changes what the first step gives, ``float32[*batch, *free, r]``; gets
        the weight's batch axes too.
      **params: Of the operation.
    """
    contracts, batches = dimension_numbers
    i, j = (0, 1) if leaf_is_lhs else (1, 0)
    pairs = dict(zip(contracts[i], contracts[j], strict=True))
    way = next(
        (w for w in ways if {a + leaf.ndim for a in w.enters} == set(pairs)), None
    )
    if way is None or set(batches[i]) != set(range(stack)):
        return dense_dot_general(
            leaf, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
        )
    batch = tuple(batches[i])
    numbers: Any = (
        (tuple(pairs[a + leaf.ndim] for a in way.enters), way.steps[0][1]),
        (tuple(batches[j]), batch),
    )
    lead = tuple(range(len(batch)))
    wide = {k: v for k, v in params.items() if k != "out_sharding"}
    wide["preferred_element_type"] = jnp.float32
    y, hows = x, []
    for n, (factor, axes) in enumerate(way.steps):
        if n:
            y = between(y, batch) if n == 1 else y
            y = narrowed(y, x.dtype)
            numbers = ((y.ndim - 1,), axes), (lead, batch)
        last = n + 1 == len(way.steps)
        ran = contract(y, factor, numbers, **(params if last else wide))
        y, hows = ran.out, [*hows, ran.how]
    if leaf_is_lhs:
        outputs = leaf.ndim - stack - len(way.enters)
        split = y.ndim - outputs
        order = (*lead, *range(split, y.ndim), *range(len(lead), split))
        y = jnp.transpose(y, order)
    return Ran(y, f"{leaf.method}: {', '.join(hows)}")
