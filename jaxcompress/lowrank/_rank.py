"""How many singular values are kept: a number, or a rule that finds one."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer


class Size(NamedTuple):
    """The size of a weight seen as a matrix, or a stack of them.

    Attributes:
      rows: Of the matrix.
      columns: Of the matrix.
      copies: Matrices of the stack.
      itemsize: Bytes of an element.
    """

    rows: int
    columns: int
    copies: int
    itemsize: int

    @property
    def most(self) -> int:
        """The largest rank there is."""
        return min(self.rows, self.columns)

    @property
    def bytes_per_rank(self) -> int:
        """Of all copies."""
        return self.copies * (self.rows + self.columns) * self.itemsize

    @property
    def dense_bytes(self) -> int:
        """Of all copies."""
        return self.copies * self.rows * self.columns * self.itemsize

    @property
    def even(self) -> int:
        """The largest rank whose factors are smaller than the weight; may be 0."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)


Values = Callable[[], jax.Array]
"""Gives the singular values ``[*stack, k]``, descending."""


class RankRule(abc.ABC):
    """Finds the rank of a weight."""

    looks = False
    """Whether it looks at the singular values: not under jit."""

    @abc.abstractmethod
    def __call__(self, size: Size, values: Values) -> int:
        """The rank, before it is limited to what there is."""


Rank = int | RankRule | Mapping[str, Any]
"""A number, a rule, or one of them for each path."""


def resolve_rank(rank: Rank, size: Size, values: Values, *, path: str, who: str) -> int:
    """The rank of one weight.

    Raises:
      ValueError: If it is out of range, or no rank is given for `path`.
      jax.errors.ConcretizationTypeError: If a rule must look at a traced weight.
    """
    if isinstance(rank, Mapping):
        if path not in rank:
            raise ValueError(
                f"{who}: no rank is given for {path!r}, only for {sorted(rank)}; leave "
                "it out of the rule, or give it one."
            )
        rank = rank[path]
    if not isinstance(rank, RankRule):
        assert isinstance(rank, int)
        if not 1 <= rank <= size.most:
            raise ValueError(
                f"{who}: rank must be from 1 to {size.most}, the smaller side of "
                f"{path!r} ({size.rows} x {size.columns}); got {rank}."
            )
        return rank
    return min(max(rank(size, values), 1), size.most)


def check_rank(rank: Rank, who: str) -> None:
    """Refuse what is no rank, before any work."""
    for r in rank.values() if isinstance(rank, Mapping) else (rank,):
        if isinstance(r, RankRule):
            continue
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(
                f"{who}: rank must be a positive integer or a rule such as "
                f"lowrank.by_ratio(0.5); got {r!r}."
            )


@dataclass(frozen=True)
class _ByRatio(RankRule):
    ratio: float

    def __call__(self, size: Size, values: Values) -> int:
        del values
        rows, columns = size.rows, size.columns
        return math.floor(self.ratio * rows * columns / (rows + columns) + 1e-9)


@dataclass(frozen=True)
class _ByBytes(RankRule):
    size_bytes: int

    def __call__(self, size: Size, values: Values) -> int:
        del values
        return self.size_bytes // size.bytes_per_rank


@dataclass(frozen=True)
class _ByError(RankRule):
    error: float

    looks = True

    def __call__(self, size: Size, values: Values) -> int:
        del size
        return smallest_rank(values(), self.error)


def by_ratio(ratio: float) -> RankRule:
    r"""The largest rank whose factors have at most `ratio` of the weight's elements.

    .. math:: r = \lfloor \rho\, m n / (m + n) \rfloor

    Args:
      ratio: :math:`\rho`, above 0 and at most 1; the rank is at least 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> jc.lowrank.rank_of(by_ratio(0.5), jnp.ones((64, 64)))
      16
    """
    _check_fraction("by_ratio", "ratio", ratio)
    return _ByRatio(ratio)


def by_bytes(size_bytes: int) -> RankRule:
    """The largest rank whose factors take at most so many bytes.

    Args:
      size_bytes: Of a weight, all of its stack together; the rank is at least 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> jc.lowrank.rank_of(by_bytes(1024), jnp.ones((2, 16, 16)), axes=-2)
      4
    """
    if size_bytes < 1:
        raise ValueError(
            f"lowrank.by_bytes: size_bytes must be positive; got {size_bytes}."
        )
    return _ByBytes(size_bytes)


def by_energy(energy: float) -> RankRule:
    r"""The smallest rank that keeps a fraction of the squared singular values.

    .. math:: \sum_{i \le r} \sigma_i^2 \ge E \sum_i \sigma_i^2

    Args:
      energy: :math:`E`, from 0 to 1; of a stack, in each of its matrices. Of singular
        values of the outputs (`whitened_weight`), the outputs' energy.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> w = jnp.diag(jnp.array([3.0, 1.0, 1.0]))
      >>> [jc.lowrank.rank_of(by_energy(e), w) for e in (0.8, 0.9, 1.0)]
      [1, 2, 3]
    """
    if not 0.0 <= energy <= 1.0:
        raise ValueError(
            f"lowrank.by_energy: energy must be from 0 to 1; got {energy}."
        )
    return _ByError(math.sqrt(1.0 - energy))


def by_error(error: float) -> RankRule:
    r"""The smallest rank of at most a relative error.

    .. math:: \|W - W_r\|_F \le \epsilon \|W\|_F

    Args:
      error: :math:`\epsilon`, at least 0; of a stack, in each of its matrices. With
        statistics, of the outputs: :math:`\|X(W - W_r)\|_F \le \epsilon \|XW\|_F`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> jc.lowrank.rank_of(by_error(0.5), jnp.diag(jnp.array([3.0, 1.0, 1.0])))
      1
    """
    if not error >= 0.0:
        raise ValueError(f"lowrank.by_error: error must not be negative; got {error}.")
    return _ByError(error)


def smallest_rank(values: jax.Array, error: float) -> int:
    """The smallest rank at which no matrix of the stack has more than the error.

    Args:
      values: ``float32[*stack, k]`` singular values, descending.
      error: Relative, in the Frobenius norm.
    """
    if isinstance(values, Tracer):
        raise jax.errors.ConcretizationTypeError(
            values,
            "lowrank: by_energy and by_error look at the singular values, which are "
            "traced; call init outside jit, or give a rank.",
        )
    squares = np.square(np.asarray(values, np.float64))
    squares = squares.reshape(-1, squares.shape[-1])
    left_out = np.cumsum(squares[:, ::-1], -1)[:, ::-1]
    total = left_out[:, :1]
    # A rounding of the total is no error: what is left out of the full rank is zero.
    fits = left_out <= (error**2 + 1e-12) * total
    ranks = np.where(fits.any(-1), fits.argmax(-1), squares.shape[-1])
    return int(ranks.max(initial=0))


def _check_fraction(who: str, name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"lowrank.{who}: {name} must be above 0 and at most 1; got {value}."
        )
