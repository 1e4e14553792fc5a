"""A weight seen as a matrix: the axes that a matmul contracts against the others."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes, resolve_axes
from jaxcompress.leaf import OrderError
from jaxcompress.lowrank._array import LowRankArray
from jaxcompress.lowrank._rank import Rank, RankRule, Size, resolve_rank
from jaxcompress.values import check_weight

AxesOption = Axes | int | tuple[int, ...] | None


class Matrix(NamedTuple):
    """The two sides of a weight; the left has its first axis that does not stack.

    Attributes:
      roles: Roles of the weight's axes, those contracted in ascending order.
      left: Axes of the rows, negative and ascending.
      right: Axes of the columns, likewise.
      shape: Logical shape of the weight.
      dtype: Its dtype.
    """

    roles: Axes
    left: tuple[int, ...]
    right: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, w: Any, axes: AxesOption, *, path: str, who: str) -> Matrix:
        """Check a weight and find its sides.

        Raises:
          ValueError: If its axes are unknown, or all on one side.
          TypeError: If it is not real floating.
        """
        check_weight(w, path, who)
        roles = resolve_axes(w.shape, axes, who=who, path=path)
        contract = tuple(sorted(roles.contract))
        roles = Axes(contract=contract, stack=roles.stack)
        core = range(roles.stack - w.ndim, 0)
        out = tuple(a for a in core if a not in contract)
        if not out:
            raise ValueError(
                f"{who}: a weight must have an output axis beside those contracted; "
                f"{path!r} has shape {w.shape} and {roles}. Leave it out of the rule."
            )
        left, right = sorted((contract, out))
        return cls(roles, left, right, tuple(w.shape), np.dtype(w.dtype))

    @property
    def enters(self) -> bool:
        """Whether the rows are what is contracted."""
        return set(self.left) == set(self.roles.contract)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes."""
        return self.shape[: self.roles.stack]

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the axes of either side."""
        at = lambda axes: tuple(self.shape[a] for a in axes)
        return at(self.left), at(self.right)

    @property
    def size(self) -> Size:
        """As a matrix."""
        rows, columns = map(math.prod, self.sizes)
        return Size(rows, columns, math.prod(self.stack), self.dtype.itemsize)

    def of_weight(self, w: jax.Array) -> jax.Array:
        """``float32[*stack, rows, columns]``."""
        n = len(self.stack)
        order = (*range(n), *(w.ndim + a for a in self.left + self.right))
        a = jnp.transpose(jnp.asarray(w).astype(jnp.float32), order)
        return a.reshape(*self.stack, self.size.rows, self.size.columns)

    def weight(self, a: jax.Array) -> jax.Array:
        """Undo `of_weight`, in the weight's dtype."""
        n = len(self.stack)
        a = a.reshape(*self.stack, *self.sizes[0], *self.sizes[1])
        place = {axis: n + i for i, axis in enumerate(self.left + self.right)}
        order = (*range(n), *(place[axis] for axis in sorted(place)))
        return jnp.transpose(a, order).astype(self.dtype)

    def leaf(
        self, left: jax.Array, right: jax.Array, gate: jax.Array | None = None
    ) -> LowRankArray:
        """The leaf of factors ``[*stack, rows, r]`` and ``[*stack, r, columns]``."""
        rank = left.shape[-1]
        return LowRankArray(
            left=left.reshape(*self.stack, *self.sizes[0], rank).astype(self.dtype),
            right=right.reshape(*self.stack, rank, *self.sizes[1]).astype(self.dtype),
            gate=gate,
            left_axes=self.left,
            right_axes=self.right,
            left_enters=self.enters,
        )

    def rank(self, rank: Rank, values: Any, *, path: str, who: str) -> int:
        """The rank that an option or rule asks for."""
        return resolve_rank(rank, self.size, values, path=path, who=who)


def check_factored(leaf: LowRankArray, rank: Rank, *, path: str, who: str) -> None:
    """Refuse a rank below the one that a weight has been given already."""
    if isinstance(rank, RankRule) and rank.looks:
        return
    matrix = Matrix.of(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        _roles(leaf),
        path=path,
        who=who,
    )
    wanted = matrix.rank(rank, None, path=path, who=who)
    if leaf.rank > wanted:
        raise OrderError(
            f"{who} at {path!r}: it is of rank {leaf.rank} already, above {wanted}; "
            "factor a weight once, with the rank that is wanted."
        )


def _roles(leaf: LowRankArray) -> Axes:
    contract = leaf.left_axes if leaf.left_enters else leaf.right_axes
    return Axes(contract=contract, stack=leaf.stack)
