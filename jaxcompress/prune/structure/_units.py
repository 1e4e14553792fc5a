"""Which positions of which axes can only be removed together.

Every position of every axis in a program is a *unit*: a tuple of nodes, kept as long as
all of its nodes are. Two axes that an operation lays on one another have equal units,
position by position. A node that turns out to be a pair of others (a column of a query
kernel is a head and a channel of a head) is bound to that pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

Unit = tuple[int, ...]
"""Nodes that must all be kept; the empty unit is always kept."""


@dataclasses.dataclass
class Facts:
    """What is known of a node and all that are equal to it.

    Attributes:
      fixed: Why it cannot be removed, or None.
      inexact: Why removing it is not the same as zeros in its place, or None.
      levels: Identities of the scans in whose bodies it occurs; None: outside of all.
      positional: Whether an array that is no parameter has its own value there.
      merged: How many nodes were found equal.
    """

    fixed: str | None = None
    inexact: str | None = None
    levels: set[int | None] = dataclasses.field(default_factory=set)
    positional: bool = False
    merged: int = 1

    @property
    def is_untouched(self) -> bool:
        """Whether it is one position outside of all scans that nothing was laid on."""
        return self.merged == 1 and self.levels == {None} and self.fixed is None

    def absorb(self, other: Facts) -> None:
        """Know what the other knows too."""
        self.fixed = self.fixed or other.fixed
        self.inexact = self.inexact or other.inexact
        self.levels |= other.levels
        self.positional |= other.positional
        self.merged += other.merged


class Units:
    """A union-find over nodes, some of which are bound to several others."""

    def __init__(self) -> None:
        """No nodes yet."""
        self._parent: list[int] = []
        self._bound: dict[int, Unit] = {}
        self._facts: dict[int, Facts] = {}

    def fresh(
        self, n: int, level: int | None, *, positional: bool = False
    ) -> tuple[Unit, ...]:
        """`n` positions that nothing is known of."""
        first = len(self._parent)
        nodes = range(first, first + n)
        self._parent.extend(nodes)
        for node in nodes:
            self._facts[node] = Facts(levels={level}, positional=positional)
        return tuple((node,) for node in nodes)

    def resolve(self, unit: Unit) -> Unit:
        """The unit in terms of nodes that are neither bound nor merged into others."""
        nodes: dict[int, None] = {}
        for node in unit:
            root = self._find(node)
            nodes.update(
                dict.fromkeys(
                    self.resolve(self._bound[root]) if root in self._bound else (root,)
                )
            )
        return tuple(nodes)

    def facts(self, node: int) -> Facts:
        """What is known of a resolved node."""
        return self._facts[node]

    def fix(self, unit: Unit, reason: str) -> None:
        """Keep the unit for good."""
        for node in self.resolve(unit):
            self._facts[node].fixed = self._facts[node].fixed or reason

    def note_inexact(self, unit: Unit, reason: str) -> None:
        """Note that the unit's values count even where its parameters are zero."""
        for node in self.resolve(unit):
            self._facts[node].inexact = self._facts[node].inexact or reason

    def unify(self, a: Unit, b: Unit, reason: str) -> None:
        """Let two units be kept or removed together.

        Args:
          a: A unit.
          b: Another.
          reason: The operation that lays one on the other: what is said of units of
            which no part corresponds, and which then are kept.
        """
        a, b = self.resolve(a), self.resolve(b)
        while a and b and a[0] == b[0]:
            a, b = a[1:], b[1:]
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        if not a or not b:
            self.fix(a + b, reason)
        elif len(a) == len(b):
            for left, right in zip(a, b, strict=True):
                self._merge(self._find(left), self._find(right))
        elif len(a) == 1 and a[0] not in b:
            self._bind(a[0], b)
        elif len(b) == 1 and b[0] not in a:
            self._bind(b[0], a)
        else:
            self.fix(a + b, f"{reason} lays unlike divisions of an axis on one another")

    def split(
        self, units: Sequence[Unit], outer: int, inner: int, level: int | None, why: str
    ) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
        """The units of two axes into which one axis is reshaped."""
        if units.count(units[0]) == len(units):
            return (units[0],) * outer, (units[0],) * inner
        rows = [
            [self.resolve(u) for u in units[i * inner : (i + 1) * inner]]
            for i in range(outer)
        ]
        if (found := _as_product(rows)) is not None:
            return found
        heads, parts = self.fresh(outer, level), self.fresh(inner, level)
        for head, row in zip(heads, rows, strict=True):
            for part, unit in zip(parts, row, strict=True):
                self.unify(unit, head + part, why)
        return heads, parts

    def _find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _merge(self, a: int, b: int) -> None:
        if a == b:
            return
        # One of them may have been bound since the units were resolved.
        if a in self._bound or b in self._bound:
            self.unify((a,), (b,), "a reshape")
            return
        self._parent[b] = a
        self._facts[a].absorb(self._facts.pop(b))

    def _bind(self, node: int, unit: Unit) -> None:
        facts = self._facts.pop(node)
        self._bound[node] = unit
        for part in self.resolve(unit):
            self._facts[part].absorb(facts)


def _as_product(
    rows: list[list[Unit]],
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]] | None:
    """Units of rows and columns that concatenate to the given ones, if there are."""
    for cut in range(len(rows[0][0]) + 1):
        heads = tuple(row[0][:cut] for row in rows)
        parts = tuple(unit[cut:] for unit in rows[0])
        if all(
            unit == head + part
            for head, row in zip(heads, rows, strict=True)
            for part, unit in zip(parts, row, strict=True)
        ):
            return heads, parts
    return None
