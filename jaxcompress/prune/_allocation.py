"""How an overall sparsity is divided among the weights: uniform, Erdos-Renyi-Kernel."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.tree import Rule, choose

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Allocation(abc.ABC):
    """Gives each weight its own sparsity, from the shapes and the overall one.

    An allocation may be a ``scope=`` of the transforms that take one, or be called
    alone. Another one is a subclass with its own `affinity`.

    Attributes:
      dense: Rule for the weights that are not pruned; the others are pruned the more.
    """

    dense: Rule | None = None

    @abc.abstractmethod
    def affinity(self, shape: Sequence[int]) -> float:
        """Density of a weight of this shape up to a common factor; positive."""

    def __call__(
        self,
        shapes: Shapes,
        sparsity: Any,
        *,
        copies: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """The sparsity of each weight.

        The densities are the affinities times one factor, those above 1 clipped to 1,
        so that they come to the overall density; found exactly, without iteration.

        Args:
          shapes: Shape of each weight by path, without the axes that stack layers.
          sparsity: Fraction of all weights pruned, in [0, 1); may be traced.
          copies: How many layers of that shape a path stands for; 1 by default.

        Returns:
          Sparsities by path, in [0, 1]; Python floats if `sparsity` is a number, else
          ``float32``. Weighted by size they average to `sparsity`, to rounding.

        Raises:
          ValueError: If there are no weights, `sparsity` is out of range, the rule
            `dense` matches nothing, or the weights it leaves are too few.
        """
        check_sparsity(sparsity, "prune.Allocation")
        traced = isinstance(sparsity, jax.Array)
        count = copies or {}
        sizes = {p: math.prod(s) * count.get(p, 1) for p, s in shapes.items()}
        if not sizes:
            raise ValueError("prune.Allocation: shapes is empty; pass some weights.")
        kept = self._kept_dense(shapes)
        free = [path for path in shapes if path not in kept]
        n = np.array([sizes[path] for path in free], np.float64) / sum(sizes.values())
        pruned = sparsity
        if not traced and pruned > n.sum():
            raise ValueError(
                f"prune.Allocation: the weights that {self.dense!r} leaves are "
                f"{n.sum():.4f} of all, too few for a sparsity of {sparsity}. Lower "
                "the sparsity or narrow the rule."
            )
        r = np.array([self.affinity(shapes[path]) for path in free], np.float64)
        densities = _clipped(r, n, n.sum() - pruned)
        found = dict.fromkeys(shapes, jnp.float32(0) if traced else 0.0)
        for path, density in zip(free, densities, strict=True):
            found[path] = 1.0 - density
        return found

    def _kept_dense(self, shapes: Shapes) -> set[str]:
        if self.dense is None:
            return set()
        leaves = {path: np.empty(shape, bool) for path, shape in shapes.items()}
        return set(choose({self.dense: True}, leaves, who="prune.Allocation"))


def _clipped(r: np.ndarray, n: np.ndarray, total: Any) -> list[Any]:
    r"""Densities :math:`\min(1, e r_l)` of shares `n` that come to `total`.

    With `r` descending, :math:`\sum_l n_l \min(1, e r_l) = \min_k (C_k + e R_k)`, where
    the first `k` are clipped; its inverse is the largest of those of the lines.
    """
    if not len(r):
        return []
    order = np.argsort(-r, kind="stable")
    clipped = np.concatenate([[0.0], np.cumsum(n[order])[:-1]])
    slope = np.cumsum((n * r)[order][::-1])[::-1]
    if not isinstance(total, jax.Array):
        factor = max(0.0, ((total - clipped) / slope).max())
        return [float(min(1.0, d)) for d in factor * r]
    lines = [
        (total - jnp.float32(c)) / jnp.float32(s)
        for c, s in zip(clipped, slope, strict=True)
    ]
    factor = jnp.maximum(jnp.float32(0), jnp.stack(lines).max())
    return [jnp.minimum(jnp.float32(1), factor * jnp.float32(x)) for x in r]


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """The same sparsity for all weights that are pruned."""

    def affinity(self, shape: Sequence[int]) -> float:
        """That of all."""
        del shape
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ErdosRenyiKernel(Allocation):
    """Densities in proportion to the sum of a weight's sizes over their product."""

    def affinity(self, shape: Sequence[int]) -> float:
        """Sum of the sizes over their product."""
        return sum(shape) / math.prod(shape)


def uniform(*, dense: Rule | None = None) -> Uniform:
    """The same sparsity for every weight but those kept dense.

    Args:
      dense: Rule for weights not pruned at all, such as the first layer's; the others
        make up for them.

    Returns:
      A ``scope=``; or call it with shapes and an overall sparsity.

    Examples:
      >>> uniform(dense="first")({"first": (2, 5), "rest": (3, 10)}, 0.5)
      {'first': 0.0, 'rest': 0.66666...}

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
      section 3 ("Uniform"). Differs: the overall sparsity is met with the dense layer
      counted.
    """
    return Uniform(dense=dense)


def erk(*, dense: Rule | None = None) -> ErdosRenyiKernel:
    r"""Erdos-Renyi-Kernel: small weights stay denser than large ones.

    .. math::
        1 - s_l = \min\left(1, \epsilon
        \frac{n_{in} + n_{out} + k_w + k_h}{n_{in} n_{out} k_w k_h}\right)

    with the factor that meets the overall sparsity.

    Args:
      dense: Rule for weights not pruned at all.

    Returns:
      A ``scope=``; or call it with shapes and an overall sparsity.

    Examples:
      >>> erk()({"small": (10, 10), "large": (100, 100)}, 0.9)
      {'small': 0.08181..., 'large': 0.908181...}

    References:
      Mocanu et al., `Scalable Training of Artificial Neural Networks
      <https://arxiv.org/abs/1707.04780>`_, 2018, eq. 1; Evci et al., 2020, section 3
      ("ERK").
    """
    return ErdosRenyiKernel(dense=dense)


def check_sparsity(sparsity: Any, who: str) -> None:
    """Refuse a number that is no fraction below one; schedules and arrays pass."""
    if callable(sparsity) or isinstance(sparsity, jax.Array):
        return
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"{who}: sparsity is the fraction pruned and must be in [0, 1); got "
            f"{sparsity}."
        )
