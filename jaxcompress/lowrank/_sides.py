"""The two sides of a factored weight, under transposes and reshapes."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxcompress.layout import reshape_pieces
from jaxcompress.leaf import Reshape, Transpose, relayout


class Sides(NamedTuple):
    """Two factors and the logical axes they have.

    Attributes:
      left: ``[*stack, *left_axes, r]``, an array or leaf.
      right: ``[*stack, r, *right_axes]``.
      left_axes: Negative, ascending, the first axis that does not stack among them.
      right_axes: Negative, ascending.
      stack: Leading axes of both.
      swapped: Whether left and right have changed places.
    """

    left: Any
    right: Any
    left_axes: tuple[int, ...]
    right_axes: tuple[int, ...]
    stack: int
    swapped: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        sizes = dict(zip(self.left_axes + self.right_axes, self.sizes, strict=True))
        return (*self.left.shape[: self.stack], *(sizes[a] for a in sorted(sizes)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the left axes, then of the right ones."""
        return self.left.shape[self.stack : -1] + self.right.shape[self.stack + 1 :]


def transposed(sides: Sides, op: Transpose) -> Sides | None:
    """After a transpose that leaves the stacks in front; else None."""
    if op.permutation[: sides.stack] != tuple(range(sides.stack)):
        return None
    ndim = len(op.permutation)
    new = {old - ndim: i - ndim for i, old in enumerate(op.permutation)}
    left = _sorted(sides.left, [new[a] for a in sides.left_axes], sides.stack)
    right = _sorted(sides.right, [new[a] for a in sides.right_axes], sides.stack + 1)
    axes = [
        tuple(sorted(new[a] for a in s)) for s in (sides.left_axes, sides.right_axes)
    ]
    return _ordered(sides._replace(left=left, right=right), *axes)


def reshaped(sides: Sides, op: Reshape) -> Sides | None:
    """After a reshape that keeps the stacks, and the sides apart; else None.

    Axes of size one belong to neither side: the right gets one only if it has no other.
    """
    stack = sides.stack
    old, new = sides.shape[stack:], op.shape[stack:]
    if sides.shape[:stack] != op.shape[:stack]:
        return None
    axes: tuple[list[int], list[int]] = ([], [])
    for before, after in reshape_pieces(old, new):
        number = {int(i - len(old) in sides.right_axes) for i in before}
        if len(number) > 1:
            return None
        axes[number.pop()].extend(j - len(new) for j in after)
    ones = [j - len(new) for j, n in enumerate(new) if n == 1]
    for side in axes:
        if not side and ones:
            side.append(ones.pop())
    axes[0].extend(ones)
    if not axes[0] or not axes[1]:
        return None
    left, right = (tuple(sorted(side)) for side in axes)
    at = lambda side: tuple(new[a] for a in side)
    lead, rank = op.shape[:stack], sides.left.shape[-1]
    moved = sides._replace(
        left=relayout(sides.left, Reshape(shape=(*lead, *at(left), rank))),
        right=relayout(sides.right, Reshape(shape=(*lead, rank, *at(right)))),
    )
    return _ordered(moved, left, right)


def _sorted(factor: Any, axes: list[int], start: int) -> Any:
    """A factor whose axes from `start` on, now at `axes`, are brought in order."""
    order = sorted(range(len(axes)), key=axes.__getitem__)
    permutation = list(range(factor.ndim))
    permutation[start : start + len(axes)] = [start + i for i in order]
    return _moved(factor, permutation)


def _moved(factor: Any, permutation: list[int]) -> Any:
    """A transposed factor; the same object if nothing moves."""
    if factor is NotImplemented or permutation == sorted(permutation):
        return factor
    return relayout(factor, Transpose(permutation=tuple(permutation)))


def _ordered(
    sides: Sides, left_axes: tuple[int, ...], right_axes: tuple[int, ...]
) -> Sides | None:
    """Factors that have these axes now; None if one could not follow."""
    left, right, n = sides.left, sides.right, sides.stack
    swapped = right_axes < left_axes
    if swapped and left is not NotImplemented and right is not NotImplemented:
        lead = list(range(n))
        left, right = (
            _moved(right, [*lead, *range(n + 1, right.ndim), n]),
            _moved(left, [*lead, left.ndim - 1, *range(n, left.ndim - 1)]),
        )
        left_axes, right_axes = right_axes, left_axes
    if left is NotImplemented or right is NotImplemented:
        return None
    return Sides(left, right, left_axes, right_axes, n, swapped)
