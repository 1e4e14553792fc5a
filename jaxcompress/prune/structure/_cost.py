"""Parameters and operations that are left when units go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxcompress.prune.structure._graph import Graph
from jaxcompress.prune.structure._units import Unit


class Costs(NamedTuple):
    """What a model costs.

    Attributes:
      parameters: Entries of all parameters.
      flops: Multiplications and additions of all matmuls and convolutions in one call.
      by_product: The same of each.
    """

    parameters: int
    flops: int
    by_product: tuple[int, ...]


class Cost:
    """Counts what is left of a model for many removals."""

    def __init__(self, graph: Graph) -> None:
        """Number the distinct axes; their units become rows of an index array."""
        self._axes: dict[tuple[Unit, ...], int] = {}
        self._rows: list[np.ndarray] = []
        nodes = [n for g in graph.groups for n in g.nodes]
        self._place = {node: i for i, node in enumerate(nodes)}
        self._products = [(p, [self._axis(a) for a in p.axes]) for p in graph.products]
        self._params = [[self._axis(a) for a in axes] for axes in graph.axes.values()]
        self._graph = graph

    def __call__(self, units: Mapping[int, np.ndarray]) -> Costs:
        """Count, given the units of groups that go (of layered ones, any layer's)."""
        kept = np.ones(len(self._place) + 1, bool)
        for number, gone in units.items():
            first = gone if gone.ndim == 1 else gone[0]
            nodes = self._graph.groups[number].nodes
            kept[[self._place[n] for n, g in zip(nodes, first, strict=True) if g]] = (
                False
            )
        sizes = [int(kept[rows].all(1).sum()) for rows in self._rows]
        each = tuple(
            p.factor * math.prod(sizes[a] for a in axes) for p, axes in self._products
        )
        parameters = sum(math.prod(sizes[a] for a in axes) for axes in self._params)
        return Costs(parameters, sum(each), each)

    def _axis(self, units: tuple[Unit, ...]) -> int:
        if units not in self._axes:
            width = max(1, max(map(len, units)))
            rows = np.full((len(units), width), len(self._place))
            for row, unit in zip(rows, units, strict=True):
                known = [self._place[n] for n in unit if n in self._place]
                row[: len(known)] = known
            self._axes[units] = len(self._rows)
            self._rows.append(rows)
        return self._axes[units]
