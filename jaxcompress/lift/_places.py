"""Named values of a program: where a weight is used, a scope is left, a name given."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxcompress.lift import _compat
from jaxcompress.lift._control import CONTROL
from jaxcompress.lift._tracked import dense
from jaxcompress.lift._walk import Taps, Use, Walker

Kind = Literal["weight", "scope", "name"]
Key = tuple[int, ...]
"""An equation with those that enclose it, outermost first, by identity."""

_REFUSED = {
    "while": "inside a while loop, out of which no values can come; use lax.scan, or "
    "fori_loop with static bounds",
    "shard_map": "inside shard_map, where values are local; tap the scope around it",
}


class Around(NamedTuple):
    """An equation that encloses others, and in which of its programs they stand."""

    eqn: Any
    branch: int


@dataclasses.dataclass(frozen=True)
class Place:
    """One result of one equation, with a name.

    Attributes:
      kind: What gave it the name.
      base: The name; not unique.
      around: What encloses the equation, outermost first.
      eqn: The equation.
      output: Which of its results.
    """

    kind: Kind
    base: str
    around: tuple[Around, ...]
    eqn: Any
    output: int

    @property
    def key(self) -> Key:
        """The equation, by identity."""
        return (*(id(a.eqn) for a in self.around), id(self.eqn))

    @property
    def shape(self) -> tuple[int, ...]:
        """With an axis for each enclosing scan in front."""
        scans = [a.eqn for a in self.around if a.eqn.primitive.name == "scan"]
        lengths = [eqn.params["length"] for eqn in scans]
        return (*lengths, *self.eqn.outvars[self.output].aval.shape)

    @property
    def dtype(self) -> Any:
        """Of the value."""
        return self.eqn.outvars[self.output].aval.dtype

    @property
    def problem(self) -> str | None:
        """Why the value cannot be brought out, or None if it can."""
        names = (a.eqn.primitive.name for a in self.around)
        return next((_REFUSED[n] for n in names if n in _REFUSED), None)


def find_places(jaxpr: Any, operands: Sequence[Any]) -> list[Place]:
    """Every named value of a program, in program order.

    Args:
      jaxpr: The program.
      operands: Its arguments, abstract or not; the weights are tracked.
    """
    finder = _Finder(_uses(jaxpr, operands))
    finder.enter(jaxpr, (), "")
    return finder.found


class _Uses(Walker):
    """A walker for which an operation without a rule is no error."""

    def step(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Taps]:
        if eqn.primitive.name not in CONTROL and _compat.is_opaque(eqn):
            return _compat.bind(eqn, self.densify(eqn, values)), {}
        return super().step(eqn, values)


def _uses(jaxpr: Any, operands: Sequence[Any]) -> dict[Key, list[str]]:
    """Paths of the weight that each operation uses."""
    found: dict[Key, list[str]] = {}

    def note(use: Use, how: str) -> None:
        del how
        found[(*map(id, use.scope), id(use.eqn))] = use.weight.paths

    walker = _Uses(on_ran=note, inline=True, custom_vjp="inline")
    jax.eval_shape(
        lambda v: [dense(o) for o in walker.run(jaxpr, v)[0]], list(operands)
    )
    return found


class _Finder:
    """Goes through a program and the programs inside it."""

    def __init__(self, uses: dict[Key, list[str]]) -> None:
        """Nothing found yet."""
        self.uses = uses
        self.found: list[Place] = []

    def enter(self, jaxpr: Any, around: tuple[Around, ...], prefix: str) -> None:
        program = _compat.program(jaxpr)
        scopes = [_join(prefix, _scope(eqn)) for eqn in program.eqns]
        left = _left(program, scopes, prefix)
        for i, (eqn, scope) in enumerate(zip(program.eqns, scopes, strict=True)):
            if eqn.primitive.name in CONTROL:
                for branch, body in enumerate(_compat.sub_jaxprs(eqn)):
                    self.enter(body, (*around, Around(eqn, branch)), scope)
            for path in self.uses.get((*(id(a.eqn) for a in around), id(eqn)), ()):
                self.found.append(Place("weight", path, around, eqn, 0))
            if eqn.primitive.name == "name":
                self.found.append(Place("name", eqn.params["name"], around, eqn, 0))
            for name, output in left.get(i, ()):
                self.found.append(Place("scope", name, around, eqn, output))


def _scope(eqn: Any) -> str:
    """The scopes of an equation: ``"a/b"`` of ``"vmap(a)/b"``; not if backward."""
    stack = re.sub(r"transpose\(.*", "", _compat.name_stack(eqn))
    return re.sub(r"\w+\(|\)", "", stack).strip("/")


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _left(
    program: _compat.Program, scopes: list[str], prefix: str
) -> dict[int, list[tuple[str, int]]]:
    """By equation: the scopes whose value it gives, and as which result."""
    last = _last_uses(program)
    left: dict[int, list[tuple[str, int]]] = {}
    for name, begin, end in _runs(scopes, prefix):
        for i in reversed(range(begin, end)):
            outputs = [
                n
                for n, v in enumerate(program.eqns[i].outvars)
                if last.get(v, -1) >= end and jnp.issubdtype(v.aval.dtype, jnp.inexact)
            ]
            if outputs:
                left.setdefault(i, []).append((name, outputs[0]))
                break
    return left


def _last_uses(program: _compat.Program) -> dict[Any, int]:
    """The number of the last equation that reads each variable."""
    reads = [eqn.invars for eqn in program.eqns] + [program.outvars]
    return {
        v: i for i, atoms in enumerate(reads) for v in atoms if isinstance(v, jex.Var)
    }


def _runs(scopes: list[str], prefix: str) -> list[tuple[str, int, int]]:
    """Each stretch of equations in one scope: its name, begin and end; inner first."""
    skip = len(prefix.split("/")) if prefix else 0
    open_: list[tuple[str, int]] = []
    runs = []
    for i, scope in enumerate([*scopes, prefix]):
        parts = scope.split("/") if scope else []
        names = ["/".join(parts[: n + 1]) for n in range(skip, len(parts))]
        while open_ and open_[-1][0] not in names:
            runs.append((*open_.pop(), i))
        open_ += [(name, i) for name in names[len(open_) :]]
    return runs
