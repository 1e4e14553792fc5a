"""Which parts of which parameters can only be removed together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcompress import tree
from jaxcompress.leaf import Leaf
from jaxcompress.lift._explain import table
from jaxcompress.lift._trace import Tracer
from jaxcompress.prune.structure._analysis import Analysis, Axes, Axis, Product
from jaxcompress.prune.structure._control_rules import CONTROL_RULES
from jaxcompress.prune.structure._indexing_rules import INDEXING_RULES
from jaxcompress.prune.structure._layout_rules import LAYOUT_RULES
from jaxcompress.prune.structure._product_rules import PRODUCT_RULES
from jaxcompress.prune.structure._units import Unit, Units

RULES = {**LAYOUT_RULES, **INDEXING_RULES, **PRODUCT_RULES, **CONTROL_RULES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """An axis of a parameter, and its positions that go with each unit of a group.

    Attributes:
      path: Of the parameter.
      axis: Which axis.
      positions: ``int[units, n]``, sorted.
    """

    path: str
    axis: int
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Units of one kind, each of which can be removed alone: channels, heads.

    Attributes:
      number: Its place in the graph.
      nodes: The unit's node, for each.
      members: The axes of parameters that shrink with it.
      fixed: Why none of it can be removed, or None.
      inexact: Why zeros in place of a unit's parameters are not the same as its
        removal (sums over the axis of what is not zero), or None.
      layers: Layers of the stack in which it occurs, each of which may lose other
        units, if as many; 1 if they must be the same.
    """

    number: int
    nodes: tuple[int, ...]
    members: tuple[Member, ...]
    fixed: str | None
    inexact: str | None
    layers: int

    @property
    def size(self) -> int:
        """How many units it has."""
        return len(self.nodes)

    @property
    def paths(self) -> tuple[str, ...]:
        """Its parameters."""
        return tuple(dict.fromkeys(m.path for m in self.members))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """The result of `dependency_graph`; prints as a table of groups.

    Attributes:
      shapes: Of every parameter, by path.
      groups: All groups, those that cannot be removed included.
      products: Matmuls and convolutions, for costs.
      axes: By path, the units of every axis of a parameter, resolved.
    """

    shapes: dict[str, tuple[int, ...]]
    groups: tuple[Group, ...]
    products: tuple[Product, ...]
    axes: dict[str, tuple[tuple[Unit, ...], ...]]

    @property
    def removable(self) -> tuple[Group, ...]:
        """The groups of which units can be removed."""
        return tuple(g for g in self.groups if g.fixed is None and g.size > 1)

    def __str__(self) -> str:
        """One line for each axis of each group; what cannot be removed, by reason."""
        rows = [row for group in self.removable for row in self._rows(group)]
        header = ("group", "units", "weight", "shape", "axis", "each", "removable")
        kept: dict[str, list[str]] = collections.defaultdict(list)
        for group in self.groups:
            if group.fixed is not None:
                kept[group.fixed] += [f"{m.path}[{m.axis}]" for m in group.members]
        lines = [f"kept, for {why}: {_some(axes)}" for why, axes in kept.items()]
        return "\n".join([table(header, rows), *lines])

    def _rows(self, group: Group) -> list[tuple[str, ...]]:
        rows = []
        for i, m in enumerate(group.members):
            number, size, note = (
                (str(group.number), str(group.size), _note(group))
                if i == 0
                else [""] * 3
            )
            shape = "x".join(map(str, self.shapes[m.path]))
            each = str(m.positions.shape[-1])
            rows.append((number, size, m.path, shape, str(m.axis), each, note))
        return rows


def _some(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _note(group: Group) -> str:
    by_layer = f", in each of {group.layers} layers" if group.layers > 1 else ""
    if group.inexact is None:
        return f"yes{by_layer}"
    return f"yes{by_layer}; not the same as zeros: {group.inexact}"


def dependency_graph(
    fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any
) -> Graph:
    """Which channels, heads and features of a model can only be removed together.

    Traces `fn` and follows every position of every axis: through matmuls, convolutions
    (depthwise and grouped too), reshapes, transposes, concatenations, splits,
    additions, normalizations, look-ups, scans over layers, calls and conditionals.
    Nothing runs.

    Args:
      fn: ``fn(params, *args, **kwargs)``, any traceable function.
      params: Pytree of dense arrays (or `jax.ShapeDtypeStruct`).
      *args: Example arguments; only their shapes matter.
      **kwargs: More of them.

    Returns:
      The groups. An axis of an argument or of a result cannot be removed, nor one that
      enters an operation without a rule; the group says so.

    Raises:
      ValueError: If a parameter is a compressed leaf.

    References:
      Fang et al., `DepGraph <https://arxiv.org/abs/2301.12900>`_, 2023, section 3.
      Differs: dependencies between positions, not layers, read off the traced program.
    """
    flat, _ = tree.flatten(params)
    for path, leaf in flat.items():
        if isinstance(leaf, Leaf):
            raise ValueError(
                f"dependency_graph: parameters must be dense; {path!r} is "
                f"{leaf.method}. Remove structure first, then compress the result."
            )
    signature, _ = Tracer(fn, who="dependency_graph").signature((params, *args), kwargs)
    jaxpr = Tracer(fn, who="dependency_graph")(signature, lambda trace: trace.jaxpr)
    arrays = {path: w for path, w in flat.items() if hasattr(w, "shape")}
    analysis = Analysis(Units(), RULES)
    weights = {
        path: tuple(Axis(analysis.fresh(n), True) for n in w.shape)
        for path, w in arrays.items()
    }
    rest = [x for x, d in zip(signature.flat, signature.dynamic, strict=True) if d]
    operands = [*weights.values()]
    for x in rest[len(operands) :]:
        operands.append(_fixed(analysis, np.shape(x), "an argument has this axis"))
    names = [*weights, *[None] * (len(operands) - len(weights))]
    for axes in analysis.run(jaxpr, operands, names):
        for axis in axes:
            analysis.fix(axis, "a result has this axis")
    return _collect(analysis, {p: tuple(w.shape) for p, w in arrays.items()}, weights)


def _fixed(analysis: Analysis, shape: tuple[int, ...], why: str) -> Axes:
    """Axes whose positions are all one unit, which is kept."""
    axes = []
    for n in shape:
        unit = analysis.fresh(2)[0]
        analysis.units.fix(unit, why)
        axes.append(Axis((unit,) * n, True))
    return tuple(axes)


def _collect(
    analysis: Analysis, shapes: dict[str, tuple[int, ...]], weights: dict[str, Axes]
) -> Graph:
    """Group the nodes that occur in the same axes in the same way."""
    units = analysis.units
    layers = _tie_layers(analysis)
    axes = {
        path: tuple(tuple(map(units.resolve, a.units)) for a in w)
        for path, w in weights.items()
    }
    where: dict[int, dict[tuple[str, int], list[int]]] = collections.defaultdict(dict)
    slots: dict[int, set[Any]] = collections.defaultdict(set)
    for path, of in axes.items():
        for i, positions in enumerate(of):
            for k, unit in enumerate(positions):
                for slot, node in enumerate(unit):
                    where[node].setdefault((path, i), []).append(k)
                    slots[node].add((path, i, slot, len(unit)))
    kinds: dict[Any, list[int]] = collections.defaultdict(list)
    for node, places in where.items():
        counts = frozenset((place, len(at)) for place, at in places.items())
        facts = units.facts(node)
        kinds[counts, frozenset(slots[node]), facts.fixed is None].append(node)

    def group(i: int, nodes: list[int]) -> Group:
        facts = [units.facts(n) for n in nodes]
        return Group(
            number=i,
            nodes=tuple(nodes),
            members=tuple(
                Member(
                    path=path,
                    axis=axis,
                    positions=np.array([where[n][path, axis] for n in nodes]),
                )
                for path, axis in where[nodes[0]]
            ),
            fixed=facts[0].fixed,
            inexact=next((f.inexact for f in facts if f.inexact), None),
            layers=min(layers.get(n, 1) for n in nodes),
        )

    def resolved(p: Product) -> Product:
        return p._replace(
            axes=tuple(tuple(map(units.resolve, axis)) for axis in p.axes)
        )

    return Graph(
        shapes=shapes,
        groups=tuple(group(i, nodes) for i, nodes in enumerate(kinds.values())),
        products=tuple(map(resolved, analysis.products)),
        axes=axes,
    )


def _tie_layers(analysis: Analysis) -> dict[int, int]:
    """Join the axes of stacks to those of their slices.

    Returns:
      Nodes that every layer may choose by itself: they occur only within the body of
      one scan, on parameters that it slices; and the number of layers.
    """
    units = analysis.units
    own: dict[int, int] = {}
    for stacked, within, scan, length in analysis.layers:
        outside = units.resolve(stacked)
        alone = len(outside) == 1 and units.facts(outside[0]).is_untouched
        for node in units.resolve(within):
            facts = units.facts(node)
            ok = alone and facts.levels == {scan} and not facts.positional
            own[node] = min(own.get(node, length), length if ok else 1)
    for stacked, within, *_ in analysis.layers:
        units.unify(stacked, within, "a scan")
    return {root: n for node, n in own.items() for root in units.resolve((node,))}
