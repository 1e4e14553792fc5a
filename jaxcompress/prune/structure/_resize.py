"""A traced program, run on smaller arrays than it was traced with.

Every value carries which positions of its axes are left. Nothing has to be known of
what was removed but the axes of the arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxcompress.lift import _compat
from jaxcompress.prune.structure._resize_layout import LAYOUT, Rule, bind
from jaxcompress.prune.structure._resize_operations import OPERATIONS
from jaxcompress.prune.structure._sized import Sized, both


def run(jaxpr: Any, operands: Sequence[Sized]) -> list[Sized]:
    """Evaluate a program.

    Raises:
      ValueError: If an operation without a rule meets an array that lost positions.
    """
    program = _compat.program(jaxpr)
    env: dict[Any, Sized] = {}
    for var, const in zip(program.constvars, program.consts, strict=True):
        env[var] = Sized.whole(const)
    env.update(zip(program.invars, operands, strict=True))

    def read(atom: Any) -> Sized:
        return Sized.whole(atom.val) if isinstance(atom, jex.Literal) else env[atom]

    for eqn in program.eqns:
        scope = _compat.name_stack(eqn)
        naming = jax.named_scope(scope) if scope else contextlib.nullcontext()
        ins = [read(v) for v in eqn.invars]
        with naming, eqn.ctx.manager:
            if all(k is None for v in ins for k in v.kept):
                outs = [Sized.whole(a) for a in bind(eqn, ins)]
            else:
                outs = RULES.get(eqn.primitive.name, unknown)(eqn, ins)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in program.outvars]


def unknown(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """An operation without a rule."""
    shapes = [v.aval.shape for v in eqn.invars]
    raise ValueError(
        f"remove: the operation {eqn.primitive.name!r} of operands {shapes} has no "
        "rule for arrays that lost positions; keep what enters it (dependency_graph of "
        "this call says what that is)."
    )


def call(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """A program that runs once: enter it."""
    return run(next(_compat.sub_jaxprs(eqn)), ins)


def custom_jvp(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Its body; `jax.nn.relu` with its own derivative, which is 0 at 0."""
    eqns = _compat.program(eqn.params["call_jaxpr"]).eqns
    if (len(ins) == 1 and str(eqn.params.get("name", "")) == "relu") or _is_relu(eqns):
        return [Sized(jax.nn.relu(ins[0].array), ins[0].kept)]
    return run(eqn.params["call_jaxpr"], ins)


def _is_relu(eqns: Sequence[Any]) -> bool:
    while len(eqns) == 1 and eqns[0].primitive.name in _compat.CALLS:
        eqns = _compat.program(next(_compat.sub_jaxprs(eqns[0]))).eqns
    if len(eqns) != 1 or eqns[0].primitive.name != "max":
        return False
    other = eqns[0].invars[1]
    return isinstance(other, jex.Literal) and bool(other.val == 0)


def remat(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Still a checkpoint."""
    body = eqn.params["jaxpr"]
    return jax.checkpoint(
        lambda *values: run(body, values),
        prevent_cse=eqn.params["prevent_cse"],
        policy=eqn.params["policy"],
    )(*ins)


def scan(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Over smaller slices and fewer; what is carried has the axes it comes to have."""
    n_consts, n_carry = _compat.scan_counts(eqn.params)
    body = eqn.params["jaxpr"]
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    stacks = ins[n_consts + n_carry :]
    steps = both(*(v.kept[0] for v in stacks))
    stacks = [v.cut(0, steps) for v in stacks]

    def step(carry: list[Sized], arrays: list[Any]) -> tuple[list[Sized], list[Sized]]:
        slices = [Sized(a, v.kept[1:]) for a, v in zip(arrays, stacks, strict=True)]
        outs = run(body, [*consts, *carry, *slices])
        return outs[:n_carry], outs[n_carry:]

    arrays = [v.array for v in stacks]
    first = [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in arrays]
    carry = _steady(lambda c, a: step(c, a)[0], carry, first)

    def steady_step(carry: Any, arrays: Any) -> Any:
        after, ys = step(carry, arrays)
        after = [a.cut_all(c.kept) for a, c in zip(after, carry, strict=True)]
        return after, ys

    options = _compat.scan_options(eqn.params)
    options["length"] = sum(steps) if steps else options["length"]
    carry, ys = jax.lax.scan(steady_step, carry, arrays, **options)
    return [*carry, *(Sized(y.array, (steps, *y.kept)) for y in ys)]


def _steady(
    step: Callable[..., list[Sized]], carry: list[Sized], *operands: Any
) -> list[Sized]:
    """Carried values cut to the positions that they have after any number of steps."""
    while True:
        after = jax.eval_shape(step, carry, *operands)
        kept = [
            tuple(map(both, c.kept, a.kept)) for c, a in zip(carry, after, strict=True)
        ]
        if kept == [c.kept for c in carry]:
            return carry
        carry = [c.cut_all(k) for c, k in zip(carry, kept, strict=True)]


def while_(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """As a scan without slices."""
    p = eqn.params
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    test, body = ins[:n_test], ins[n_test : n_test + n_body]
    step = lambda c: run(p["body_jaxpr"], [*body, *c])
    carry = _steady(step, ins[n_test + n_body :])

    def steady_step(carry: list[Sized]) -> list[Sized]:
        return [a.cut_all(c.kept) for a, c in zip(step(carry), carry, strict=True)]

    return jax.lax.while_loop(
        lambda c: run(p["cond_jaxpr"], [*test, *c])[0].array, steady_step, carry
    )


def cond(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Results cut to the positions that those of all branches have."""
    index, *values = ins
    branches = [lambda *v, b=b: run(b, v) for b in eqn.params["branches"]]
    shapes = [jax.eval_shape(b, *values) for b in branches]
    kept = [
        tuple(both(*ks) for ks in zip(*(o.kept for o in outs), strict=True))
        for outs in zip(*shapes, strict=True)
    ]

    def cut(branch: Callable[..., list[Sized]]) -> Callable[..., list[Sized]]:
        return lambda *v: [o.cut_all(k) for o, k in zip(branch(*v), kept, strict=True)]

    return jax.lax.switch(index.array, [cut(b) for b in branches], *values)


RULES: dict[str, Rule] = {
    **LAYOUT,
    **OPERATIONS,
    **dict.fromkeys(_compat.CALLS, call),
    "custom_jvp_call": custom_jvp,
    **dict.fromkeys(("remat2", "checkpoint"), remat),
    "scan": scan,
    "while": while_,
    "cond": cond,
}
"""By primitive."""
