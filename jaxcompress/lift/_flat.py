"""A traced program as one flat list of equations, to find out what feeds what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.extend.core as jex

from jaxcompress.lift import _compat
from jaxcompress.lift._trace import Tracer
from jaxcompress.lift._tracked import Tracked, track

MOVES = frozenset(
    {"broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"}
)


class Step(NamedTuple):
    """An equation whose variables are numbers.

    Attributes:
      op: Name of the operation.
      ins: Number of each operand's variable; None of a constant.
      outs: Numbers of the results.
      eqn: The equation.
    """

    op: str
    ins: tuple[int | None, ...]
    outs: tuple[int, ...]
    eqn: Any


@dataclasses.dataclass(frozen=True)
class FlatProgram:
    """Steps in program order, with nested calls entered; loops stay whole.

    If asked for, scans are entered too: a parameter that is scanned over keeps its
    path, and a step named ``scan`` reads what the body hands on.

    Attributes:
      steps: The equations.
      params: Key path of each variable that is a parameter, or a parameter after
        broadcasts, reshapes and casts.
      fixed: Variables that depend on parameters and constants only.
      users: Steps that read each variable.
      aligned: Those of `params` whose last axis is the parameter's own.
    """

    steps: tuple[Step, ...]
    params: dict[int, str]
    fixed: frozenset[int]
    users: dict[int, tuple[Step, ...]]
    aligned: frozenset[int]

    def only_user(self, variable: int) -> Step | None:
        """The step that reads a variable, if there is just one."""
        users = self.users.get(variable, ())
        return users[0] if len(users) == 1 else None

    def operand(self, step: Step, side: int) -> str | None:
        """Path of the parameter that is one of a step's operands, if it is one."""
        variable = step.ins[side]
        return None if variable is None else self.params.get(variable)

    def param(self, step: Step) -> str | None:
        """Path of the parameter among a step's operands, if there is one."""
        paths = [self.params[i] for i in step.ins if i in self.params]
        return paths[0] if paths else None

    def offset(self, step: Step) -> str | None:
        """Path of a parameter that a step adds or subtracts along the last axis."""
        operands = step.ins if step.op in ("add", "sub") else ()
        return next((self.params[i] for i in operands if i in self.aligned), None)


def _keeps_last_axis(eqn: Any) -> bool:
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if before.shape[-1:] != after.shape[-1:]:
        return False
    placed = eqn.params.get("broadcast_dimensions") or (after.ndim - 1,)
    return placed[-1] == after.ndim - 1


def flatten_program(
    fn: Callable[..., Any], params: Any, *args: Any, who: str, scans: bool = False
) -> FlatProgram:
    """Trace ``fn(params, *args)`` and flatten it.

    Args:
      fn: As for `lift`.
      params: Parameter pytree, concrete or abstract.
      *args: Example arguments.
      who: Function named in errors.
      scans: Whether to enter scans.
    """
    tracer = Tracer(fn, who=who)
    tracked = track(params, arrays=True)
    signature, operands = tracer.signature((tracked, *args), {})
    trace = tracer(signature, lambda trace: trace)
    steps: list[Step] = []
    named: dict[int, str] = {}
    fixed: set[int] = set()
    aligned: set[int] = set()
    count = iter(range(10**9))

    def enter(jaxpr: Any, ins: list[int | None]) -> list[int | None]:
        program = _compat.program(jaxpr)
        env: dict[Any, int | None] = dict.fromkeys(program.constvars)
        env.update(zip(program.invars, ins, strict=True))

        def read(atom: Any) -> int | None:
            return None if isinstance(atom, jex.Literal) else env[atom]

        for eqn in program.eqns:
            values = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _compat.CALLS:
                body = next(_compat.sub_jaxprs(eqn))
                env.update(zip(eqn.outvars, enter(body, values), strict=True))
                continue
            if scans and eqn.primitive.name == "scan":
                values = scan(eqn, values)
            outs = [next(count) for _ in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            if eqn.primitive.name in MOVES and values[0] in named:
                named[outs[0]] = named[values[0]]
                if values[0] in aligned and _keeps_last_axis(eqn):
                    aligned.add(outs[0])
            if all(i is None or i in fixed for i in values):
                fixed.update(outs)
            steps.append(Step(eqn.primitive.name, tuple(values), tuple(outs), eqn))
        return [read(v) for v in program.outvars]

    def scan(eqn: Any, ins: list[int | None]) -> list[int | None]:
        """Enter a body; what goes through the loop, from outside and inside."""
        n_consts, n_carry = _compat.scan_counts(eqn.params)
        split = n_consts + n_carry
        inside = [next(count) for _ in ins[n_consts:]]
        for v, x, part in zip(
            eqn.invars[split:], ins[split:], inside[n_carry:], strict=True
        ):
            if x in named:
                named[part] = named[x]
                if x in aligned and v.aval.ndim > 1:
                    aligned.add(part)
            if x is None or x in fixed:
                fixed.add(part)
        results = enter(eqn.params["jaxpr"], [*ins[:n_consts], *inside])
        return [
            *ins[n_consts:split],
            *(x for x in ins[split:] if x not in named),
            *results,
        ]

    first = [next(count) for _ in operands]
    for number, operand in zip(first, operands, strict=True):
        if isinstance(operand, Tracked):
            named[number] = operand.path
            fixed.add(number)
            aligned.add(number)
    results = enter(trace.jaxpr, list(first))
    users: dict[int, list[Step]] = {}
    for step in steps:
        for i in {i for i in step.ins if i is not None}:
            users.setdefault(i, []).append(step)
    end = Step("return", tuple(results), (), None)
    for i in {i for i in results if i is not None}:
        users.setdefault(i, []).append(end)
    return FlatProgram(
        tuple(steps),
        named,
        frozenset(fixed),
        {k: tuple(v) for k, v in users.items()},
        frozenset(aligned),
    )
