"""The axes of every value of a program, from those of its arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import numpy as np

from jaxcompress.lift import _compat
from jaxcompress.prune.structure._units import Unit, Units


class Axis(NamedTuple):
    """An axis of a value.

    Attributes:
      units: Of every position.
      zero: Whether the value is zero where a unit is removed by zeroing parameters;
        true of an axis of which none can be.
    """

    units: tuple[Unit, ...]
    zero: bool


Axes = tuple[Axis, ...]


class Product(NamedTuple):
    """A matmul or convolution, for its cost.

    Attributes:
      axes: Every axis whose size multiplies the cost; also of layers that a scan runs.
      factor: What else does: 2, window and pixels of a convolution.
      paths: Parameters that are operands.
    """

    axes: tuple[tuple[Unit, ...], ...]
    factor: int
    paths: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions, of all positions."""
        return self.factor * math.prod(len(axis) for axis in self.axes)


MOVES = frozenset(
    {"transpose", "reshape", "squeeze", "convert_element_type", "broadcast_in_dim"}
)

Rule = Callable[["Analysis", Any, list[Axes]], list[Axes]]


@dataclasses.dataclass
class Analysis:
    """Runs a program on axes instead of arrays.

    Attributes:
      units: All that is known of units so far.
      rules: By primitive, from the axes of the operands to those of the results.
      products: Of all matmuls and convolutions met.
      level: The scan whose body is being entered.
      loops: The steps of the scans around it.
      names: Paths of the parameters that variables hold, moved or cast.
      layers: ``(unit, unit, scan, length)``: a unit of a stack of layers, and the same
        within the body that scans it, where every layer may have its own.
      scans: How many scans were met.
    """

    units: Units
    rules: dict[str, Rule]
    products: list[Product] = dataclasses.field(default_factory=list)
    level: int | None = None
    loops: tuple[tuple[Unit, ...], ...] = ()
    names: dict[Any, str] = dataclasses.field(default_factory=dict)
    layers: list[tuple[Unit, Unit, int, int]] = dataclasses.field(default_factory=list)
    scans: int = 0

    def run(
        self, jaxpr: Any, operands: Sequence[Axes], names: Sequence[str | None] = ()
    ) -> list[Axes]:
        """The axes of a program's results.

        Args:
          jaxpr: The program.
          operands: Axes of its arguments.
          names: Paths of those that are parameters.
        """
        program = _compat.program(jaxpr)
        for var, name in zip(
            program.invars, names or [None] * len(program.invars), strict=True
        ):
            self._name(var, name)
        env: dict[Any, Axes] = {}
        for var, const in zip(program.constvars, program.consts, strict=True):
            env[var] = self.constant(np.shape(const))
        for var in program.constvars[len(program.consts) :]:
            env[var] = self.constant(var.aval.shape)
        env.update(zip(program.invars, operands, strict=True))

        def read(atom: Any) -> Axes:
            if isinstance(atom, jex.Literal):
                return self.constant(np.shape(atom.val))
            return env[atom]

        for eqn in program.eqns:
            ins = [read(v) for v in eqn.invars]
            outs = self.rules.get(eqn.primitive.name, unknown)(self, eqn, ins)
            if eqn.primitive.name in MOVES:
                self._name(eqn.outvars[0], self.name(eqn.invars[0]))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in program.outvars]

    def name(self, atom: Any) -> str | None:
        """Path of the parameter that an operand is, or None."""
        return None if isinstance(atom, jex.Literal) else self.names.get(atom)

    def _name(self, var: Any, name: str | None) -> None:
        if name is None:
            self.names.pop(var, None)  # A body that is met again.
        else:
            self.names[var] = name

    def constant(self, shape: Sequence[int]) -> Axes:
        """Axes of an array that is no parameter: its positions may be left out."""
        return tuple(Axis(self.fresh(n, positional=True), False) for n in shape)

    def fresh(self, n: int, *, positional: bool = False) -> tuple[Unit, ...]:
        """Units of a new axis; one of size 1 cannot be removed."""
        if n == 1:
            return ((),)
        return self.units.fresh(n, self.level, positional=positional)

    def unify(self, axes: Sequence[Axis], why: str) -> tuple[Unit, ...]:
        """Lay axes of one size on one another; the units of the first."""
        first = axes[0].units
        for axis in axes[1:]:
            if axis.units is first:
                continue
            for a, b in zip(first, axis.units, strict=True):
                if a != b:
                    self.units.unify(a, b, why)
        return first

    def fix(self, axis: Axis, why: str) -> None:
        """Keep every position of an axis."""
        for unit in dict.fromkeys(axis.units):
            self.units.fix(unit, why)

    def note_inexact(self, axis: Axis, why: str) -> None:
        """Note that zeros on an axis are not the same as its removal."""
        for unit in dict.fromkeys(axis.units):
            self.units.note_inexact(unit, why)


def unknown(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """An operation without a rule: all of its operands stay whole."""
    for axes in ins:
        for axis in axes:
            analysis.fix(axis, f"enters the operation {eqn.primitive.name!r}")
    return [analysis.constant(v.aval.shape) for v in eqn.outvars]


def is_zero(atom: Any) -> bool:
    """Whether an operand is the literal 0."""
    value = getattr(atom, "val", None)
    return value is not None and bool(value == 0)
