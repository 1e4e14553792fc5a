"""An interpreter that runs a program on several batches at once, weight by weight.

Between the weights it runs segments of the program, each jitted once: a scanned layer
is compiled once, however often it runs. At each use of a weight it stops and asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxcompress.lift import _compat
from jaxcompress.lift._layout_ops import LAYOUT_OPS
from jaxcompress.lift._tracked import LiftError, Tracked
from jaxcompress.lift._walk import TARGETS, Use, Walker


class Streams(tuple):
    """A value of the program in every stream: one for each batch."""


class Interpreter:
    """Runs programs on weights, which all streams share, and on streams."""

    def __init__(
        self,
        *,
        streams: int,
        references: int,
        visit: Callable[[Tracked, Callable[..., Use], list[Streams]], Any],
        who: str,
    ) -> None:
        """An interpreter with no program yet.

        Args:
          streams: How many batches.
          references: The first so many of them keep the weights as they are.
          visit: ``(weight, site, others) -> value``: what the other streams go on with.
            ``site(weight, operands)`` is the `Use`, ``others`` the other operands.
          who: Function named in errors.
        """
        self.streams = streams
        self.references = references
        self.visit = visit
        self.who = who
        self._walker = Walker(inline=True, custom_vjp="inline")
        self._jitted: dict[Any, Any] = {}
        self._programs: dict[int, _Liveness] = {}

    def run(self, jaxpr: Any, operands: list[Any]) -> list[Any]:
        """Evaluate a program on weights and streams."""
        program = self._program(jaxpr)
        env: dict[Any, Any] = {
            v: self._constant(c)
            for v, c in zip(program.body.constvars, program.body.consts, strict=True)
        }
        env.update(zip(program.body.invars, operands, strict=True))

        def read(atom: Any) -> Any:
            return (
                self._constant(atom.val) if isinstance(atom, jex.Literal) else env[atom]
            )

        waiting: list[int] = []
        for i, eqn in enumerate(program.body.eqns):
            names = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
            if not any(isinstance(env.get(v), Tracked) for v in names):
                waiting.append(i)
                continue
            if any(v not in env for v in names):
                self._flush(program, waiting, i, env)
            with eqn.ctx.manager:
                results = self.step(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        self._flush(program, waiting, len(program.body.eqns), env)
        return [read(v) for v in program.body.outvars]

    def step(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Evaluate one equation, at least one of whose operands is a weight."""
        name = eqn.primitive.name
        if name in LAYOUT_OPS and isinstance(values[0], Tracked):
            rest = [self._same_in_all(v) for v in values[1:]]
            if all(r is not None for r in rest):
                moved = LAYOUT_OPS[name](eqn, values[0], *rest)
                if moved is not NotImplemented:
                    return [moved]
        if name in TARGETS:
            found = TARGETS[name].find(eqn, values)
            if found is not None:
                return [self.use(eqn, values, *found)]
        if name == "scan":
            return self._scan(eqn, values)
        if name == "cond":
            return self._cond(eqn, values)
        if name in _UNREACHABLE:
            self._refuse(values, f"inside {name!r}")
        if name in _compat.CALLS:
            return self.run(next(_compat.sub_jaxprs(eqn)), values)
        return self._each(
            eqn, lambda *v: _compat.bind(eqn, list(v)), self._dense(values)
        )

    def use(
        self,
        eqn: Any,
        values: list[Any],
        index: int,
        contracted: tuple[int, ...],
        batch: tuple[int, ...],
    ) -> Streams:
        """Ask what to go on with, and run the operation on it."""
        weight = values[index]
        others = self._dense([v for i, v in enumerate(values) if i != index])

        def site(w: Tracked, others: Any) -> Use:
            operands = (*others[:index], w, *others[index:])
            return Use(eqn, w, index, operands, contracted, batch, (), 1)

        value = self.visit(weight, site, others)
        # Without the path, which like uses of other weights do not share.
        before = dataclasses.replace(weight, path="")
        after = dataclasses.replace(before, value=value)

        def run(w: Tracked, *others: Any) -> Any:
            return self._walker.use(eqn, [*others[:index], w, *others[index:]])[0][0]

        call = self.jit(("use", _compat.likeness(eqn), index), run)
        return Streams(
            call(before if i < self.references else after, *(o[i] for o in others))
            for i in range(self.streams)
        )

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        params = eqn.params
        n_consts, n_carry = _compat.scan_counts(params)
        consts = values[:n_consts]
        carry = self._dense(values[n_consts : n_consts + n_carry])
        xs = values[n_consts + n_carry :]
        order = range(params["length"])
        collected: list[list[Any]] = [[] for _ in order]
        for i in reversed(order) if params["reverse"] else order:
            step = [self._slice(x, i) for x in xs]
            outs = self.run(params["jaxpr"], [*consts, *carry, *step])
            carry, collected[i] = (
                self._dense(outs[:n_carry]),
                self._dense(outs[n_carry:]),
            )
        ys = [
            Streams(
                jnp.stack([c[y][s] for c in collected]) for s in range(self.streams)
            )
            for y in range(len(eqn.outvars) - n_carry)
        ]
        return [*carry, *ys]

    def _slice(self, x: Any, i: int) -> Any:
        if isinstance(x, Streams):
            return Streams(a[i] for a in x)
        moved = x.leading(lambda a: a[i], axes=1, dims=x.dims[1:])
        if moved is NotImplemented:
            return Streams((x.dense()[i],) * self.streams)
        return moved

    def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
        index = self._same_in_all(values[0])
        if index is None:
            self._refuse(values, "in a conditional whose branch depends on the batch")
        branches = eqn.params["branches"]
        branch = int(np.clip(int(index), 0, len(branches) - 1))
        return self.run(branches[branch], values[1:])

    def _refuse(self, values: list[Any], where: str) -> NoReturn:
        path = next(v.path for v in values if isinstance(v, Tracked))
        raise LiftError(
            f"{self.who}: {path!r} is used {where}, which a sweep cannot enter; leave "
            "it out of the rules, or use lax.scan over static lengths, on sharded "
            "inputs."
        )

    # -- values

    def _constant(self, c: Any) -> Streams:
        return Streams((c,) * self.streams)

    def _dense(self, values: list[Any]) -> list[Streams]:
        return [
            self._constant(v.dense()) if isinstance(v, Tracked) else v for v in values
        ]

    def _same_in_all(self, value: Any) -> Any:
        """A value that is the same in every stream, or None."""
        if isinstance(value, Tracked):
            return None
        first = value[0]
        if all(v is first for v in value):
            return first
        same = all(np.array_equal(np.asarray(v), np.asarray(first)) for v in value[1:])
        return first if same else None

    # -- segments

    def _program(self, jaxpr: Any) -> _Liveness:
        if id(jaxpr) not in self._programs:
            self._programs[id(jaxpr)] = _Liveness.of(jaxpr)
        return self._programs[id(jaxpr)]

    def _flush(
        self, program: _Liveness, waiting: list[int], now: int, env: dict[Any, Any]
    ) -> None:
        """Run the equations that wait, jitted as one."""
        if not waiting:
            return
        eqns = [program.body.eqns[i] for i in waiting]
        made = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
        ins = list(
            dict.fromkeys(
                v
                for eqn in eqns
                for v in eqn.invars
                if not isinstance(v, jex.Literal) and v not in made
            )
        )
        outs = [v for v in made if program.last.get(v, -1) >= now]

        def segment(*values: Any) -> list[Any]:
            inner = dict(zip(ins, values, strict=True))
            for eqn in eqns:
                args = [
                    v.val if isinstance(v, jex.Literal) else inner[v]
                    for v in eqn.invars
                ]
                with eqn.ctx.manager:
                    inner.update(zip(eqn.outvars, _compat.bind(eqn, args), strict=True))
            return [inner[v] for v in outs]

        call = self.jit(("segment", id(program), tuple(waiting)), segment)
        # Kept with the first call's variables, which are the program's own.
        results = [call(*(env[v][i] for v in ins)) for i in range(self.streams)]
        env.update({v: Streams(r[k] for r in results) for k, v in enumerate(outs)})
        waiting.clear()
        for v in [v for v in env if program.last.get(v, -1) < now]:
            del env[v]

    def _each(
        self, eqn: Any, f: Callable[..., list[Any]], values: list[Streams]
    ) -> list[Any]:
        call = self.jit(("bind", id(eqn)), f)
        results = [call(*(v[i] for v in values)) for i in range(self.streams)]
        return [Streams(r) for r in zip(*results, strict=True)]

    def jit(self, key: Any, f: Callable[..., Any]) -> Any:
        """`f` jitted, as it was given for this key the first time."""
        if key not in self._jitted:
            self._jitted[key] = jax.jit(f)
        return self._jitted[key]


class _Liveness(NamedTuple):
    """A program, and where each of its variables is read last."""

    body: _compat.Program
    last: dict[Any, int]

    @classmethod
    def of(cls, jaxpr: Any) -> _Liveness:
        body = _compat.program(jaxpr)
        last = {
            v: i
            for i, eqn in enumerate(body.eqns)
            for v in eqn.invars
            if not isinstance(v, jex.Literal)
        }
        end = len(body.eqns)
        last.update({v: end for v in body.outvars if not isinstance(v, jex.Literal)})
        return cls(body, last)


_UNREACHABLE = frozenset({"while", "shard_map"})
