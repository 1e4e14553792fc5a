"""The base of leaves that are products of factors, and how factors are multiplied."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes
from jaxcompress.leaf import Cast, Leaf, OrderError, Ran, map_value, relayout


class FactorLeaf(Leaf):
    """A weight that is a product of factors, each an array or a leaf.

    Later transforms in a chain act on the factors, so the structure stays. A matmul
    runs through the factors' own rules and forms no dense weight.
    """

    has_own_matmul = True

    @abc.abstractmethod
    def factors(self) -> tuple[Any, ...]:
        """The factors, in a fixed order."""

    @abc.abstractmethod
    def with_factors(self, factors: Sequence[Any]) -> Self:
        """The leaf with others of the same shapes."""

    @abc.abstractmethod
    def factor_axes(self) -> tuple[Axes, ...]:
        """Roles of the axes of each factor in the matmul that it is for."""

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.factors()[0].dtype

    @property
    def kind(self) -> str:
        """The method of factors that are leaves, with a space before it."""
        kinds = [f.method for f in self.factors() if isinstance(f, Leaf)]
        return f" {kinds[0]}" if kinds else ""

    def values(self) -> tuple[Any, ...]:
        """Those of the factors."""
        return tuple(v for f in self.factors() for v in values_of(f))

    def value_axes(self) -> tuple[Axes | None, ...]:
        """Those of the factors."""
        pairs = zip(self.factors(), self.factor_axes(), strict=True)
        return tuple(
            axes if jnp.shape(v) == jnp.shape(factor) else None
            for factor, axes in pairs
            for v in values_of(factor)
        )

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the factors.

        Raises:
          OrderError: If a factor would be factored again.
        """

        def once(value: jax.Array) -> jax.Array | Leaf:
            result = f(value)
            if isinstance(result, FactorLeaf):
                raise OrderError(
                    f"{self.method} is a product of factors already; factor a weight "
                    "once, with the rank that is wanted."
                )
            return result

        return self.with_factors([map_value(once, x) for x in self.factors()])

    def cast(self, op: Cast) -> Leaf:
        """The leaf in another dtype, or ``NotImplemented``."""
        factors = [relayout(f, op) for f in self.factors()]
        if any(f is NotImplemented for f in factors):
            return NotImplemented
        return self.with_factors(factors)


def values_of(factor: Any) -> tuple[Any, ...]:
    """The float arrays that a later transform acts on."""
    return factor.values() if isinstance(factor, Leaf) else (factor,)


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
