"""Which weights share one scale."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import static_type


@static_type
class PerTensor:
    """One scale for a weight (for each layer or expert of a stack)."""

    @property
    def label(self) -> str:
        """For reports."""
        return " per tensor"


@static_type
class PerChannel:
    """One scale for each index along some axes; by default the output axes.

    Attributes:
      axes: Logical axes kept, negative; None for the output axes.
    """

    axes: tuple[int, ...] | None = None

    @property
    def label(self) -> str:
        """For reports; nothing for the default."""
        return "" if self.axes is None else f" per axes {self.axes}"


@static_type
class PerGroup:
    """One scale for `size` consecutive inputs of one output.

    Attributes:
      size: Divides the flattened contracting axes.
    """

    size: int

    @property
    def label(self) -> str:
        """``g128``."""
        return f" g{self.size}"


@static_type
class Block2D:
    """One scale for a rectangle of the last output axis and the contracting axes.

    Attributes:
      out: Outputs a block; divides the last output axis.
      contract: Inputs a block; divides the flattened contracting axes.
    """

    out: int
    contract: int

    @property
    def label(self) -> str:
        """``32x32``."""
        return f" {self.out}x{self.contract}"


Granularity = PerTensor | PerChannel | PerGroup | Block2D


def block_sizes(
    out: tuple[int, ...], k: int, granularity: Granularity, *, who: str, path: str
) -> tuple[int, ...]:
    """Weights that share a scale along each storage axis ``(*out, K)``.

    Raises:
      ValueError: If a block does not divide its axis.
    """
    match granularity:
        case PerTensor():
            return (*out, k)
        case PerChannel():
            return (*(1 for _ in out), k)
        case PerGroup(size=size):
            _divides(size, k, "group_size", "flattened contracting axes", who, path)
            return (*(1 for _ in out), size)
        case Block2D(out=o, contract=c):
            _divides(c, k, "block of inputs", "flattened contracting axes", who, path)
            _divides(
                o,
                out[-1] if out else 1,
                "block of outputs",
                "last output axis",
                who,
                path,
            )
            return (*(1 for _ in out[:-1]), *((o,) if out else ()), c)


def _divides(size: int, n: int, what: str, axis: str, who: str, path: str) -> None:
    if size < 1 or n % size:
        near = [d for d in range(1, n + 1) if n % d == 0]
        raise ValueError(
            f"{who}: {what} must divide the {axis} of {path!r}, {n}; got {size}. "
            f"Divisors of {n}: {near}."
        )


class Flat:
    """A weight with its contracting axes flattened in place, and back.

    Quantization runs in this form and not in storage order, because XLA would copy
    a transposed weight in every training step. Where the contracting axes are not
    neighbours in order, it is storage order after all.
    """

    def __init__(self, shape: tuple[int, ...], layout: Layout) -> None:
        """Plan for a weight of logical `shape`."""
        self.shape = shape
        self.layout = layout
        contract, core = layout.contract, len(layout.order)
        self.stack = len(shape) - core
        first = contract[0]
        self.in_place = layout.out == tuple(
            a for a in range(-core, 0) if a not in contract
        ) and contract == tuple(range(first, first + len(contract)))
        self.position = (
            len(shape) + first if self.in_place else len(shape) - len(contract)
        )
        self.k = math.prod(shape[a] for a in contract)

    def flatten(self, w: jax.Array) -> jax.Array:
        """``[*stack, *logical]`` with one axis for all contracting ones."""
        if not self.in_place:
            return self.layout.to_storage(w)
        p, n = self.position, self.layout.contracting
        return w.reshape(*w.shape[:p], self.k, *w.shape[p + n :])

    def unflatten(self, a: jax.Array) -> jax.Array:
        """Undo `flatten`."""
        return a.reshape(self.shape) if self.in_place else self.layout.from_storage(a)

    def from_storage(self, a: jax.Array) -> jax.Array:
        """A component in storage order ``[*stack, *out, G]``, in flat order."""
        return jnp.moveaxis(a, -1, self.position)

    def to_storage(self, a: jax.Array) -> jax.Array:
        """Undo `from_storage`."""
        return jnp.moveaxis(a, self.position, -1)


def split_blocks(
    a: jax.Array, counts: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Split every axis into blocks, as few axes as possible.

    Args:
      a: ``[*dims]``.
      counts: Number of blocks along each axis.

    Returns:
      The array with axes ``(count, size)`` where a block is part of an axis, and the
      axes that lie within a block, to reduce or broadcast over.
    """
    shape: list[int] = []
    within: list[int] = []
    for n, count in zip(a.shape, counts, strict=True):
        if count == n:
            shape.append(n)
        elif count == 1:
            within.append(len(shape))
            shape.append(n)
        else:
            within.append(len(shape) + 1)
            shape += [count, n // count]
    return a.reshape(shape), tuple(within)


def spread(scale: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """A value a block, shaped to broadcast against `split_blocks` of ``[*dims]``."""
    shape: list[int] = []
    for n, count in zip(dims, scale.shape, strict=True):
        shape += [count] if count in (n, 1) else [count, 1]
    return scale.reshape(shape)


class Blocks:
    """The blocks of one weight that share a scale."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        granularity: Granularity,
        *,
        who: str,
        path: str,
    ) -> None:
        """Divide a weight of logical `shape`.

        Raises:
          ValueError: If a block does not divide its axis, or an axis is out of range.
        """
        self._key = (tuple(shape), axes, granularity)
        self.layout = Layout.of(shape, axes)
        self.flat = Flat(shape, self.layout)
        sizes = {a: shape[a] for a in range(-len(shape), 0)}
        kept = granularity.axes if isinstance(granularity, PerChannel) else None
        self._merged: tuple[int, ...] = ()
        if kept is not None:
            _check_kept(kept, shape, who, path)
            out = [
                n if a in kept else 1 for a, n in sizes.items() if a in self.layout.out
            ]
            inner = [a for a in self.layout.contract if a in kept]
            if inner:
                # One scale an input is stored; those that must agree are merged.
                self._merged = tuple(
                    i for i, a in enumerate(self.layout.contract) if a not in kept
                )
            counts = (*out, self.flat.k if inner else 1)
        else:
            full = (*(shape[a] for a in self.layout.out), self.flat.k)
            block = block_sizes(full[:-1], full[-1], granularity, who=who, path=path)
            counts = tuple(n // b for n, b in zip(full, block, strict=True))
        storage = [*shape[: axes.stack], *counts]
        storage.insert(self.flat.position, storage.pop())
        self.counts = tuple(storage)
        self.contract_sizes = tuple(shape[a] for a in self.layout.contract)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blocks) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def reduce(self, op: Callable[..., jax.Array], a: jax.Array) -> jax.Array:
        """`op` (max, min or sum) of each block of a flat weight, in flat order."""
        parts, within = split_blocks(a, self.counts)
        result = op(parts, axis=within).reshape(self.counts)
        if not self._merged:
            return result
        p = self.flat.position
        split = result.reshape(
            *self.counts[:p], *self.contract_sizes, *self.counts[p + 1 :]
        )
        merged = op(split, axis=tuple(p + i for i in self._merged), keepdims=True)
        return jnp.broadcast_to(merged, split.shape).reshape(self.counts)

    def sizes(self) -> jax.Array | float:
        """Weights in each block."""
        return self.reduce(jnp.sum, jnp.ones(self._flat_shape(), jnp.float32))

    def _flat_shape(self) -> tuple[int, ...]:
        storage = [self.flat.shape[i] for i in range(self.flat.stack)]
        storage += [self.flat.shape[a] for a in self.layout.out]
        storage.insert(self.flat.position, self.flat.k)
        return tuple(storage)


def _check_kept(
    kept: tuple[int, ...], shape: tuple[int, ...], who: str, path: str
) -> None:
    if any(not -len(shape) <= a < 0 for a in kept):
        raise ValueError(
            f"{who}: PerChannel axes must be negative and within the rank of {path!r}; "
            f"got {kept} for shape {shape}."
        )
