"""A walker that hands out named values of a program, and changes nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxcompress.lift import _compat
from jaxcompress.lift._control import CONTROL
from jaxcompress.lift._places import Key, Place
from jaxcompress.lift._walk import Taps, Walker

_PARTIAL = (
    "inside a conditional of which not every branch computes it once in the same "
    "shape; tap the scope around the conditional"
)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A value inside a program that can be brought out by name.

    Attributes:
      name: Of a weight its path, of a scope the names on the way to it, else the name
        given; numbered ``name#0``, ``name#1`` where the program has several.
      kind: ``"weight"``, ``"scope"`` or ``"name"``.
      shape: Of the value, with an axis for each enclosing scan in front.
      dtype: Of the value.
      problem: Why it cannot be brought out after all, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    problem: str | None
    places: tuple[Place, ...] = dataclasses.field(repr=False, compare=False)


def taps_of(places: Iterable[Place]) -> list[Tap]:
    """Unique names for the values of a program, in its order."""
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        groups.setdefault((place.kind, place.base), []).append(place)
    taps = []
    for (kind, base), group in groups.items():
        found = _occurrences(group, 0)
        for i, (same, problem) in enumerate(found):
            name = base if len(found) == 1 else f"{base}#{i}"
            shape, dtype = same[0].shape, same[0].dtype
            taps.append(Tap(name, kind, shape, dtype, problem, same))
    return taps


_Occurrence = tuple[tuple[Place, ...], str | None]


def _occurrences(places: list[Place], depth: int) -> list[_Occurrence]:
    """The places that are one value: those in the branches of a conditional."""
    found: list[_Occurrence] = []
    conditionals: dict[int, list[Place]] = {}
    for place in places:
        at = _conditional(place, depth)
        if at is None:
            found.append(((place,), place.problem))
        else:
            conditionals.setdefault(id(place.around[at].eqn), []).append(place)
    for group in conditionals.values():
        found += _joined(group, _conditional(group[0], depth) or 0)
    order = {id(place): i for i, place in enumerate(places)}
    return sorted(found, key=lambda occurrence: order[id(occurrence[0][0])])


def _conditional(place: Place, depth: int) -> int | None:
    """Where in `around` the first conditional from `depth` on stands."""
    names = [a.eqn.primitive.name for a in place.around]
    return names.index("cond", depth) if "cond" in names[depth:] else None


def _joined(places: list[Place], at: int) -> list[_Occurrence]:
    """One value for what every branch computes, in the order of each."""
    branches = [
        _occurrences([p for p in places if p.around[at].branch == b], at + 1)
        for b in range(len(places[0].around[at].eqn.params["branches"]))
    ]
    apart = [occurrence for branch in branches for occurrence in branch]
    if len({len(branch) for branch in branches}) > 1:
        return [(same, problem or _PARTIAL) for same, problem in apart]
    joined: list[_Occurrence] = []
    for parts in zip(*branches, strict=True):
        same = tuple(place for part, _ in parts for place in part)
        problem = next((problem for _, problem in parts if problem), None)
        if len({(place.shape, place.dtype) for place in same}) > 1:
            problem = problem or _PARTIAL
        joined.append((same, problem))
    return joined


@dataclasses.dataclass(kw_only=True)
class Observer(Walker):
    """Evaluates a program on arrays; the taps are its named values.

    Attributes:
      wanted: What to bring out.
    """

    wanted: Iterable[Tap]

    def __post_init__(self) -> None:
        """Where the values are, and on the way to them."""
        self.fold = lambda stacked: stacked
        self.merge = lambda first, second: second
        self._outputs = _outputs(self.wanted)
        self._way = {key[:n] for key in self._outputs for n in range(1, len(key))}

    def plain(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Taps]:
        """Evaluate an equation and pick out of its results."""
        key = self.key(eqn)
        results, taps = self._evaluate(eqn, values, entered=key in self._way)
        own = {name: results[i] for name, i in self._outputs.get(key, {}).items()}
        return results, {**taps, **own}

    def _evaluate(
        self, eqn: Any, values: list[Any], *, entered: bool
    ) -> tuple[list[Any], Taps]:
        name = eqn.primitive.name
        if not entered:
            return _compat.bind(eqn, values), {}
        if name not in ("custom_jvp_call", "custom_vjp_call"):
            return CONTROL[name](self, eqn, values)
        # The results keep their own derivative; what is inside has the body's.
        with self.inside(eqn):
            taps = self.run(eqn.params["call_jaxpr"], values)[1]
        return _compat.bind(eqn, values), taps


def _outputs(taps: Iterable[Tap]) -> Mapping[Key, dict[str, int]]:
    outputs: dict[Key, dict[str, int]] = {}
    for tap in taps:
        for place in tap.places:
            outputs.setdefault(place.key, {})[tap.name] = place.output
    return outputs
