"""Where a layer of a program begins and ends, and the program without it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from jaxcompress.lift import _compat


class Missing:
    """In place of a value that a removed layer would have computed."""


MISSING = Missing()


class Segment(NamedTuple):
    """A part of a program with one value in and one of the same type out.

    Attributes:
      inside: The calls that enclose it, outermost first, by their place.
      entering: The value that the layer is applied to.
      leaving: What the layer makes of it.
    """

    inside: tuple[int, ...]
    entering: Any
    leaving: Any


def find_segment(
    jaxpr: Any, layer: Sequence[bool], weights: Sequence[bool]
) -> Segment | None:
    """The shortest part that holds all uses of a layer's weights.

    Args:
      jaxpr: The program.
      layer: For each argument, whether it is a weight of the layer.
      weights: For each argument, whether it is a parameter at all.
    """
    program = _compat.program(jaxpr)
    flow = _Flow(program, layer, weights)
    found = flow.segment()
    if found is not None:
        return Segment((), *found)
    if len(flow.touches) != 1:
        return None
    (place,) = flow.touches
    eqn = program.eqns[place]
    if eqn.primitive.name not in _compat.CALLS:
        return None
    body = next(_compat.sub_jaxprs(eqn))
    inner = find_segment(
        body,
        [flow.is_in(v, flow.mine) for v in eqn.invars],
        [flow.is_in(v, flow.fixed) for v in eqn.invars],
    )
    return inner and inner._replace(inside=(place, *inner.inside))


class _Flow:
    """What depends on a layer's weights, and when values are used."""

    def __init__(
        self, program: _compat.Program, layer: Sequence[bool], weights: Sequence[bool]
    ) -> None:
        """Follow the program once."""
        self.program = program
        args = list(zip(program.invars, layer, weights, strict=True))
        self.mine = {v for v, mine, _ in args if mine}
        self.fixed = {v for v, _, fixed in args if fixed} | set(program.constvars)
        self.others = {v for v, mine, fixed in args if fixed and not mine}
        self.after: set[Any] = set()  # Computed from activations and the layer.
        self.touches: list[int] = []
        self.defined = dict.fromkeys(program.invars, -1)
        self.last_use: dict[Any, int] = {}
        for i, eqn in enumerate(program.eqns):
            self._step(i, eqn)
        for v in program.outvars:
            if not isinstance(v, jex.Literal):
                self.last_use[v] = len(program.eqns)

    def is_in(self, atom: Any, values: set[Any]) -> bool:
        """Whether an operand is one of some values; a literal is fixed, no weight."""
        return values is self.fixed if isinstance(atom, jex.Literal) else atom in values

    def _step(self, i: int, eqn: Any) -> None:
        variables = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        self.last_use.update(dict.fromkeys(variables, i))
        self.defined.update(dict.fromkeys(eqn.outvars, i))
        mine = any(v in self.mine for v in variables)
        if all(v in self.fixed for v in variables):
            self.fixed.update(eqn.outvars)
            if mine:
                self.mine.update(eqn.outvars)
            if any(v in self.others for v in variables):
                self.others.update(eqn.outvars)
            return
        if mine:
            self.touches.append(i)
        if mine or any(v in self.after for v in variables):
            self.after.update(eqn.outvars)

    def segment(self) -> tuple[Any, Any] | None:
        """The values that enter and leave, if there is one of each."""
        if not self.touches:
            return None
        first = self.touches[0]
        for end in range(first, len(self.program.eqns)):
            if self._uses_others(end):
                return None
            if end < self.touches[-1]:
                continue
            left = [v for v in self.after if self._lives(v, end)]
            if len(left) != 1:
                continue
            entered = [
                v
                for v, at in self.defined.items()
                if at < first <= self.last_use.get(v, -1)
                and v not in self.fixed
                and str(v.aval) == str(left[0].aval)
            ]
            # What is still to be added to a branch shows that the layer goes on.
            if entered and not any(self._lives(v, end) for v in entered):
                return max(entered, key=lambda v: self.last_use[v]), left[0]
        return None

    def _lives(self, v: Any, end: int) -> bool:
        """Whether a value is there and still needed after an equation."""
        return self.defined[v] <= end < self.last_use.get(v, -1)

    def _uses_others(self, end: int) -> bool:
        """Whether what depends on the layer uses other weights up to an equation."""
        eqn = self.program.eqns[end]
        inside = any(v in self.after for v in eqn.outvars)
        return inside and any(self.is_in(v, self.others) for v in eqn.invars)


def run_without(
    jaxpr: Any, operands: Sequence[Any], segments: Sequence[Segment]
) -> list[Any]:
    """Evaluate a program in which layers hand on what enters them.

    Args:
      jaxpr: The program.
      operands: Its arguments, `MISSING` for the weights of those layers.
      segments: The layers.
    """
    return _evaluate(jaxpr, operands, dict(enumerate(segments)), None)


def record(
    jaxpr: Any, operands: Sequence[Any], segments: Sequence[Segment]
) -> list[tuple[Any, Any]]:
    """What enters and leaves each layer when the whole program runs."""
    noted: dict[int, tuple[Any, Any]] = {}
    _evaluate(jaxpr, operands, dict(enumerate(segments)), noted)
    return [noted[i] for i in range(len(segments))]


def _evaluate(
    jaxpr: Any,
    operands: Sequence[Any],
    segments: Mapping[int, Segment],
    noted: dict[int, tuple[Any, Any]] | None,
) -> list[Any]:
    """Run, noting what passes through layers; or without them if `noted` is None."""
    program = _compat.program(jaxpr)
    env = dict(zip(program.constvars, program.consts, strict=True))
    env.update(zip(program.invars, operands, strict=True))
    here = {s.leaving: (i, s.entering) for i, s in segments.items() if not s.inside}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for place, eqn in enumerate(program.eqns):
        scope = _compat.name_stack(eqn)
        naming = jax.named_scope(scope) if scope else contextlib.nullcontext()
        values = [read(v) for v in eqn.invars]
        inner = {
            i: s._replace(inside=s.inside[1:])
            for i, s in segments.items()
            if s.inside[:1] == (place,)
        }
        with naming, eqn.ctx.manager:
            if inner:
                body = next(_compat.sub_jaxprs(eqn))
                outs = _evaluate(body, values, inner, noted)
            elif any(v is MISSING for v in values):
                outs = [MISSING] * len(eqn.outvars)
            else:
                outs = _compat.bind(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in here.keys() & set(eqn.outvars):
            i, entering = here[v]
            if noted is None:
                env[v] = env[entering]
            else:
                noted[i] = env[entering], env[v]
    return [read(v) for v in program.outvars]
