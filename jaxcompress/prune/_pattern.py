"""Which weights may be pruned alone, and which only together."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import Leaf
from jaxcompress.prune._allocation import Allocation, check_sparsity
from jaxcompress.prune._bitmask import store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._threshold import lowest, rank
from jaxcompress.schedules import Schedule

ByPath = Mapping[str, tuple[Any, ...]]
"""By path of a leaf, something for each of its values."""

Scope = Literal["layer", "global"] | Allocation
"""What a sparsity is a fraction of: each layer, or all weights (shared out or not)."""


class Pattern(abc.ABC):
    """Turns scores into masks, and masked weights into a stored leaf.

    Attributes:
      scheduled: Whether the masks of equal scores change with the step.
    """

    scheduled: bool = False

    @abc.abstractmethod
    def keep(
        self, scores: ByPath, roles: ByPath, step: jax.Array
    ) -> dict[str, tuple[jax.Array, ...]]:
        """Masks, true where a weight is kept.

        Args:
          scores: ``float32`` arrays of the weights' shapes; the lowest are pruned, ties
            in order of position. Minus infinity: pruned already.
          roles: `Axes` of each weight.
          step: ``int32`` updates so far.
        """

    @abc.abstractmethod
    def store(self, leaf: MaskedArray, axes: Axes) -> Leaf:
        """The stored form of a weight under a mask of this pattern."""

    def keep_one(self, score: jax.Array, axes: Axes) -> jax.Array:
        """The mask of one weight alone, at step 0."""
        masks = self.keep({"": (score,)}, {"": (axes,)}, jnp.int32(0))
        return masks[""][0]


class Unstructured(Pattern):
    """Each weight alone."""

    def __init__(self, sparsity: float | Schedule, scope: Scope, who: str) -> None:
        """Check the options; `who` is named in errors."""
        check_sparsity(sparsity, who)
        if scope not in ("layer", "global") and not isinstance(scope, Allocation):
            raise ValueError(
                f"{who}: scope must be 'layer', 'global' or an allocation such as "
                f"prune.erk(); got {scope!r}."
            )
        self.sparsity = sparsity
        self.scope = scope
        self.scheduled = callable(sparsity)

    def keep(
        self, scores: ByPath, roles: ByPath, step: jax.Array
    ) -> dict[str, tuple[jax.Array, ...]]:
        """The fraction of highest score, of each layer or of all."""
        s = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        ranks = {path: tuple(map(rank, values)) for path, values in scores.items()}
        if self.scope == "global":
            return _keep_globally(ranks, s)
        fractions = self._fractions(ranks, roles, s)

        def by_layer(r: jax.Array, axes: Axes, fraction: Any) -> jax.Array:
            n = math.prod(r.shape[axes.stack :])
            return ~lowest([r], pruned_count(fraction, n), stack=axes.stack)[0]

        return {
            path: tuple(map(by_layer, values, roles[path], fractions[path]))
            for path, values in ranks.items()
        }

    def _fractions(self, ranks: ByPath, roles: ByPath, s: Any) -> ByPath:
        """The sparsity of each value: that of all, or what it is allotted."""
        if not isinstance(self.scope, Allocation):
            return {path: (s,) * len(values) for path, values in ranks.items()}
        shapes, copies = {}, {}
        for path, values in ranks.items():
            for i, (r, axes) in enumerate(zip(values, roles[path], strict=True)):
                shapes[_name(path, i)] = r.shape[axes.stack :]
                copies[_name(path, i)] = math.prod(r.shape[: axes.stack])
        if not shapes:
            return dict(ranks)
        allotted = self.scope(shapes, s, copies=copies)
        return {
            path: tuple(allotted[_name(path, i)] for i in range(len(values)))
            for path, values in ranks.items()
        }

    def store(self, leaf: MaskedArray, axes: Axes) -> Leaf:
        """A bit a weight and the kept values."""
        capacity = None
        if not callable(self.sparsity) and self.scope == "layer":
            n = math.prod(leaf.shape[axes.stack :])
            capacity = n - pruned_count(self.sparsity, n)
        return store(leaf, Layout.of(leaf.shape, axes), capacity=capacity)


def _name(path: str, number: int) -> str:
    """What an allocation calls a leaf's value."""
    return f"{path}#{number}" if number else path


def _keep_globally(ranks: ByPath, sparsity: Any) -> dict[str, tuple[jax.Array, ...]]:
    flat, structure = jax.tree.flatten(dict(ranks))
    if not flat:
        return dict(ranks)  # Leaves without values, which the view refuses by name.
    total = sum(r.size for r in flat)
    if total >= 2**31:
        raise ValueError(
            f"prune: scope='global' counts up to 2^31 weights; got {total}. Use "
            "scope='layer', or a transform for each part of the model."
        )
    low = lowest(flat, pruned_count(sparsity, total))
    return jax.tree.unflatten(structure, [~m for m in low])


def pruned_count(sparsity: Any, n: int) -> Any:
    """Weights to prune: an integer if the sparsity is a number, else traced."""
    if isinstance(sparsity, jax.Array):
        return jnp.floor(sparsity * n + 0.5).astype(jnp.int32)
    return math.floor(sparsity * n + 0.5)


def as_pattern(sparsity: float | Schedule | Pattern, scope: Scope, who: str) -> Pattern:
    """The pattern of a ``sparsity=`` option: a fraction means weights alone.

    Raises:
      ValueError: If an option is out of range, or `scope` is given to a pattern that
        fixes how many weights of each group are kept.
    """
    if not isinstance(sparsity, Pattern):
        return Unstructured(sparsity, scope, who)
    if scope != "layer":
        raise ValueError(
            f"{who}: scope is an option of a fraction; a pattern has its own. Got "
            f"scope={scope!r} and {sparsity}."
        )
    return sparsity
