"""`LowRankArray`: a weight as the product of two thin factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes
from jaxcompress.leaf import (
    GATE,
    WEIGHT,
    Cast,
    LayoutOp,
    Leaf,
    Ran,
    Reshape,
    Transpose,
    component,
    dequantize,
    leaf_type,
    static,
)
from jaxcompress.lowrank._factors import (
    CompositeLeaf,
    Way,
    contract,
    factor_specs,
    multiply,
    narrowed,
    product,
    wide,
)
from jaxcompress.lowrank._sides import Sides, reshaped, transposed


@leaf_type
class LowRankArray(CompositeLeaf):
    r"""A weight as the product of two thin factors, with gates between them or not.

    .. math:: W_{i,o} = \sum_r L_{i,r}\, c_r\, R_{r,o}

    where `i` are the axes of one side of the weight and `o` those of the other. A
    matmul that contracts a whole side, whichever it is, runs as two thin ones; a
    convolution that contracts a side as a thin one and a pointwise one; a look-up reads
    rows of `left` alone. Any other use runs on `materialize()`.

    Attributes:
      left: ``float[*stack, *i, r]``, or a leaf.
      right: ``float[*stack, r, *o]``, or a leaf.
      gate: ``float32[*stack, r]``, or None: all ones.
      left_axes: Logical axes of `left`, negative and ascending; the first axis that
        does not stack is among them.
      right_axes: Those of `right`, ascending.
      left_enters: Whether the matmul that the weight is for contracts the axes of
        `left`; of a look-up table it contracts those of `right`.
    """

    left: Any = component(role=WEIGHT)
    right: Any = component(role=WEIGHT)
    gate: jax.Array | None = component(role=GATE, default=None)
    left_axes: tuple[int, ...] = static()
    right_axes: tuple[int, ...] = static()
    left_enters: bool = static(default=True)

    @property
    def rank(self) -> int:
        """Columns of `left`."""
        return self.left.shape[-1]

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.left.ndim - len(self.left_axes) - 1

    @property
    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the axes of either side."""
        stack = self.stack
        return self.left.shape[stack:-1], self.right.shape[stack + 1 :]

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        left, right = self._sides
        sizes = dict(zip(self.left_axes + self.right_axes, left + right, strict=True))
        return (*self.left.shape[: self.stack], *(sizes[a] for a in sorted(sizes)))

    @property
    def method(self) -> str:
        """``"rank 16"``, and the method of the factors."""
        return f"rank {self.rank}{' gated' * (self.gate is not None)}{self.kind}"

    def parts(self) -> tuple[Any, ...]:
        """Left and right."""
        return self.left, self.right

    def with_parts(self, parts: Sequence[Any]) -> LowRankArray:
        """Others."""
        left, right = parts
        return self.replace(left=left, right=right)

    def part_axes(self) -> tuple[Axes, ...]:
        """The side that enters is contracted, and then the rank."""
        n, m = len(self.left_axes), len(self.right_axes)
        if self.left_enters:
            left, right = tuple(range(-n - 1, -1)), (-m - 1,)
        else:
            left, right = (-1,), tuple(range(-m, 0))
        stack = self.stack
        return Axes(contract=left, stack=stack), Axes(contract=right, stack=stack)

    def materialize(self) -> jax.Array:
        """The dense values."""
        stack = self.left.shape[: self.stack]
        left = wide(self.left).reshape(*stack, -1, self.rank)
        if self.gate is not None:
            left = left * self.gate.astype(jnp.float32)[..., None, :]
        w = product(left, wide(self.right).reshape(*stack, self.rank, -1))
        w = w.reshape(*stack, *sum(self._sides, ()))
        place = {a: self.stack + i for i, a in enumerate(self.left_axes)}
        place |= {a: len(place) + self.stack + i for i, a in enumerate(self.right_axes)}
        order = (*range(self.stack), *(place[a] for a in sorted(place)))
        return jnp.transpose(w, order).astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Where stacks stay in front and no axis of one side meets one of the other."""
        match op:
            case Cast():
                return super().relayout(op)
            case Transpose():
                found = transposed(self.sides, op)
            case Reshape():
                found = reshaped(self.sides, op)
        if found is None:
            return NotImplemented
        return self.replace(
            left=found.left,
            right=found.right,
            left_axes=found.left_axes,
            right_axes=found.right_axes,
            left_enters=self.left_enters != found.swapped,
        )

    @property
    def sides(self) -> Sides:
        """Factors and axes, for operations that move them."""
        return Sides(
            self.left, self.right, self.left_axes, self.right_axes, self.stack, False
        )

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self.stack >= ndim else NotImplemented

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """Two thin matmuls, where a whole side is contracted and stacks are batched."""
        ways = [
            Way(self._axes[side], ((first, axes), (second, (rank,))))
            for side in (0, 1)
            for (first, axes), (second, rank) in [self._ends(side)]
        ]
        return multiply(
            self,
            x,
            dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            stack=self.stack,
            ways=ways,
            between=self._gated,
            **params,
        )

    @property
    def _axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.left_axes, self.right_axes

    def _ends(self, side: int) -> tuple[tuple[Any, tuple[int, ...]], tuple[Any, int]]:
        """The factor of a side with its axes, and the other with the rank's."""
        stack = self.stack
        if side == 0:
            axes = tuple(range(stack, stack + len(self.left_axes)))
            return (self.left, axes), (self.right, stack)
        axes = tuple(range(stack + 1, stack + 1 + len(self.right_axes)))
        return (self.right, axes), (self.left, self.left.ndim - 1)

    def _gated(self, y: jax.Array, stacks: tuple[int, ...]) -> jax.Array:
        """``[*batch, ..., r]`` times the gates, whose stack axes are the batch's."""
        if self.gate is None:
            return y
        gate = jnp.transpose(self.gate.astype(y.dtype), (*stacks, self.stack))
        ones = (1,) * (y.ndim - gate.ndim)
        return y * gate.reshape(*gate.shape[:-1], *ones, self.rank)

    def conv_general_dilated(self, x: jax.Array, **params: Any) -> Ran:
        """A convolution to the rank, and a pointwise one, if one side is the output."""
        numbers = params["dimension_numbers"]
        out = (numbers.rhs_spec[0] - self.ndim,)
        groups = params["feature_group_count"], params["batch_group_count"]
        if self.stack or groups != (1, 1) or out not in self._axes:
            return NotImplemented
        side = 1 - self._axes.index(out)
        (first, axes), (second, rank) = self._ends(side)
        if isinstance(first, Leaf):
            x = first.prepare_activations(x, (numbers.lhs_spec[1],))
            first = dequantize(first)
        sources = dict(zip(self._axes[side], axes, strict=True))
        sources[out[0]] = first.ndim - 1 if side == 0 else 0
        kernel = jnp.transpose(first, [sources[a] for a in sorted(sources)])
        thin = params | {"preferred_element_type": jnp.float32}
        y = jax.lax.conv_general_dilated(x, kernel, **thin)
        feature = numbers.out_spec[1]
        hidden = self._gated(jnp.moveaxis(y, feature, -1), ())
        z = contract(
            narrowed(hidden, x.dtype),
            second,
            (((hidden.ndim - 1,), (rank,)), ((), ())),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        how = f"rank {self.rank}: convolution, {z.how}"
        return Ran(jnp.moveaxis(z.out, -1, feature), how)

    def map_leading(self, f: Callable[[jax.Array], jax.Array], ndim: int) -> Leaf:
        """Stacks as they are; of the rows of a matrix, those of `left` alone."""
        if self.stack or ndim != 1 or len(self.left_axes) != 1:
            return super().map_leading(f, ndim)
        left = self.left
        left = left.map_leading(f, 1) if isinstance(left, Leaf) else f(left)
        if left is NotImplemented:
            return NotImplemented
        n = len(self.right_axes)
        return self.replace(
            left=left,
            left_axes=tuple(range(1 - left.ndim - n, -n)),
            right_axes=tuple(range(-n, 0)),
        )

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> LowRankArray:
        """Each side as the weight's axes are; the rank is not cut."""
        stack = list(spec[: self.stack])
        left = [*stack, *(spec[a] for a in self.left_axes), None]
        right = [*stack, None, *(spec[a] for a in self.right_axes)]
        return self.replace(
            left=factor_specs(self.left, left, sizes),
            right=factor_specs(self.right, right, sizes),
            gate=None if self.gate is None else PartitionSpec(*stack, None),
        )
