"""How a weight lies in storage: which axes a matmul contracts, and in what order.

Every packed leaf stores its elements as ``[*stack, *out, K]``: the leading axes that
stack independent weights, the output axes, and all contracting axes flattened into
one, minor, so that a packed word and a group hold consecutive inputs of one output.
Axes are stated (by a rule, or read off the traced function), never guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxcompress.leaf import LayoutOp, Reshape, Transpose, static_type


@static_type
class Axes:
    """The role of each axis of a weight.

    Attributes:
      contract: Contracting axes in flattening order, negative.
      stack: Leading axes that only stack independent weights (scanned layers).
    """

    contract: tuple[int, ...]
    stack: int = 0


def resolve_axes(
    shape: Sequence[int],
    stated: Axes | int | tuple[int, ...] | None,
    *,
    who: str,
    path: str,
) -> Axes:
    """Check and complete the axes stated for a weight.

    Args:
      shape: Logical shape of the weight.
      stated: `Axes`; or the contracting axes alone, all axes before the first of
        which then stack (of a matrix: none); or None for a plain matrix, which
        contracts axis -2, and for a vector, which contracts axis -1.
      who: Function named in errors.
      path: Key path of the weight, for errors.

    Raises:
      ValueError: If the rank is above 2 and nothing is stated, or an axis is out
        of range or named twice.
    """
    ndim = len(shape)
    if stated is None:
        if ndim > 2:
            raise ValueError(
                f"{who}: the contracting axes of {path!r}, of shape {tuple(shape)}, "
                "cannot be told from its rank. State them: axes=-2 for stacked "
                f"matrices, axes={tuple(range(-ndim, -1))} for a convolution or a "
                "matmul that contracts all but the last axis, or pass the function "
                "(fn=, example=) and they are read off its trace."
            )
        return Axes(contract=(-2 if ndim == 2 else -1,))
    if not isinstance(stated, Axes):
        contract = (stated,) if isinstance(stated, int) else tuple(stated)
        if not contract or any(not -ndim <= a < 0 for a in contract):
            raise ValueError(_bad_axes(who, path, shape, contract))
        stack = 0 if ndim <= 2 else ndim + min(contract)
        stated = Axes(contract=contract, stack=stack)
    core = ndim - stated.stack
    if (
        not stated.contract
        or len(set(stated.contract)) < len(stated.contract)
        or any(not -core <= a < 0 for a in stated.contract)
    ):
        raise ValueError(_bad_axes(who, path, shape, stated.contract))
    return stated


def _bad_axes(
    who: str, path: str, shape: Sequence[int], contract: tuple[int, ...]
) -> str:
    return (
        f"{who}: axes must be distinct and negative, within the rank of {path!r}; got "
        f"{contract} for shape {tuple(shape)}. A Dense kernel is axes=-2."
    )


@static_type
class Layout:
    """The permutation between a weight's logical and storage axes.

    Attributes:
      order: Logical axes of one weight (negative), in storage order: the output
        axes, then the contracting axes in flattening order.
      contracting: How many of them contract.
      minor: Sizes of the contracting axes but the first, whose size is derived:
        it alone may be cut by sharding.
    """

    order: tuple[int, ...]
    contracting: int
    minor: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], axes: Axes) -> Layout:
        """Layout of a weight of logical `shape` whose axes have these roles."""
        core = len(shape) - axes.stack
        out = tuple(a for a in range(-core, 0) if a not in axes.contract)
        return cls(
            order=out + axes.contract,
            contracting=len(axes.contract),
            minor=tuple(shape[a] for a in axes.contract[1:]),
        )

    @property
    def contract(self) -> tuple[int, ...]:
        """Contracting axes, negative, in flattening order."""
        return self.order[len(self.order) - self.contracting :]

    @property
    def out(self) -> tuple[int, ...]:
        """Output axes, negative, in storage order."""
        return self.order[: len(self.order) - self.contracting]

    def stack_ndim(self, storage_ndim: int) -> int:
        """Number of stack axes of a component with `storage_ndim` axes."""
        return storage_ndim - len(self.out) - 1

    def logical_shape(self, storage_shape: Sequence[int]) -> tuple[int, ...]:
        """Logical shape of a weight whose elements lie in `storage_shape`."""
        stack = self.stack_ndim(len(storage_shape))
        major = storage_shape[-1] // math.prod(self.minor)
        core = (*storage_shape[stack:-1], major, *self.minor)
        sizes = dict(zip(self.order, core, strict=True))
        return (*storage_shape[:stack], *(sizes[a] for a in range(-len(core), 0)))

    def to_storage(self, w: jax.Array) -> jax.Array:
        """``[*stack, *logical] -> [*stack, *out, K]``."""
        stack = w.ndim - len(self.order)
        permutation = (*range(stack), *(w.ndim + a for a in self.order))
        w = jnp.transpose(w, permutation)
        return w.reshape(*w.shape[: stack + len(self.out)], -1)

    def from_storage(self, a: jax.Array) -> jax.Array:
        """``[*stack, *out, K] -> [*stack, *logical]``: undoes `to_storage`."""
        stack = self.stack_ndim(a.ndim)
        a = a.reshape(*a.shape[:-1], a.shape[-1] // math.prod(self.minor), *self.minor)
        inverse = {axis: stack + i for i, axis in enumerate(self.order)}
        core = len(self.order)
        return jnp.transpose(a, (*range(stack), *(inverse[x] for x in range(-core, 0))))

    def absorb_stack(self, stack: int) -> Layout:
        """The same storage with `stack` stack axes counted as output axes."""
        core = len(self.order)
        lead = tuple(range(-core - stack, -core))
        return dataclasses.replace(self, order=lead + self.order)

    def stacked(self, ndim: int, rank: int) -> Layout:
        """The same storage with the first `ndim` of `rank` logical axes as stacks.

        Returns:
          The new layout; this one if so many are; or ``NotImplemented`` where those
          axes do not lead in storage.
        """
        stack = rank - len(self.order)
        if stack >= ndim:
            return self
        full = self.absorb_stack(stack)
        leading = full.order[:ndim] == tuple(range(-rank, ndim - rank))
        if not leading or rank - ndim < full.contracting:
            return NotImplemented
        return dataclasses.replace(full, order=full.order[ndim:])

    def relayout(self, op: LayoutOp, shape: Sequence[int]) -> Layout:
        """Layout after a transpose or reshape of the logical array, storage unmoved.

        Args:
          op: `Transpose`, or a `Reshape` that only splits the first contracting
            axis, or merges contracting axes that are adjacent and in order.
          shape: Logical shape before the operation (stack axes included).

        Returns:
          The new layout, whose stack axes have become output axes, or
          ``NotImplemented`` where the storage would have to move.
        """
        full = self.absorb_stack(len(shape) - len(self.order))
        ndim = len(shape)
        if isinstance(op, Transpose):
            place = {p - ndim: i - ndim for i, p in enumerate(op.permutation)}
            return dataclasses.replace(full, order=tuple(place[a] for a in full.order))
        if isinstance(op, Reshape):
            return full._reshaped(tuple(shape), op.shape)
        return NotImplemented

    def _reshaped(self, shape: tuple[int, ...], new: tuple[int, ...]) -> Layout:
        """Reshape whose every output axis survives whole; contracting axes regroup."""
        pieces = _factor(shape, new)
        if pieces is None:
            return NotImplemented
        place: dict[int, tuple[int, ...]] = {}
        ndim, new_ndim = len(shape), len(new)
        order: list[int] = []
        for old_axes, new_axes in pieces:
            old = tuple(a - ndim for a in old_axes)
            target = tuple(a - new_ndim for a in new_axes)
            if len(old) == len(target) == 1:
                place[old[0]] = target
            elif old and all(a in self.contract for a in old):
                start = self.contract.index(old[0])
                if self.contract[start : start + len(old)] != old:
                    return NotImplemented
                place[old[0]] = target
                place.update(dict.fromkeys(old[1:], ()))
            else:
                return NotImplemented
        for a in self.order:
            order.extend(place[a])
        contracting = sum(len(place[a]) for a in self.contract)
        contract = order[len(order) - contracting :]
        if not contract:
            return NotImplemented
        return Layout(
            order=tuple(order),
            contracting=contracting,
            minor=tuple(new[a] for a in contract[1:]),
        )


def _factor(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Split a reshape into the smallest blocks of axes with equal products."""
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i], [j]
        if i >= len(old) or j >= len(new):
            return None  # Trailing axes of size one: nothing here inserts them.
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b and i < len(old):
                a *= old[i]
                olds.append(i)
                i += 1
            elif b < a and j < len(new):
                b *= new[j]
                news.append(j)
                j += 1
            else:
                return None
        blocks.append((tuple(olds), tuple(news)))
    return blocks


def reshape_pieces(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Which axes a reshape merges and splits into which; axes of size 1 are in none.

    Examples:
      >>> reshape_pieces((8, 6, 64), (8, 2, 3, 64))
      [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    olds = [i for i, n in enumerate(old) if n != 1]
    news = [j for j, n in enumerate(new) if n != 1]
    found = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(olds.pop(0))
                a *= old[left[-1]]
            else:
                right.append(news.pop(0))
                b *= new[right[-1]]
        found.append((left, right))
    return found
