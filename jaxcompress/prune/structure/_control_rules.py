"""Axes through calls, loops and conditionals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxcompress.lift import _compat
from jaxcompress.prune.structure._analysis import Analysis, Axes, Axis, Rule


def call(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """A program that runs once."""
    body = next(_compat.sub_jaxprs(eqn))
    return analysis.run(body, ins, [analysis.name(v) for v in eqn.invars])


def scan(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """What is carried keeps its axes; slices may lose other positions in each step."""
    n_consts, n_carry = _compat.scan_counts(eqn.params)
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    names = [analysis.name(v) for v in eqn.invars]
    consts, carry = ins[:n_consts], ins[n_consts : n_consts + n_carry]
    stacks = ins[n_consts + n_carry :]
    lead = Axis(analysis.fresh(length), False)
    if stacks:
        units = analysis.unify([axes[0] for axes in stacks], "a scan")
        lead = Axis(units, False)
        analysis.note_inexact(lead, "a scan leaves the whole layer out")
    outer = analysis.level, analysis.loops
    analysis.scans += 1
    analysis.level = analysis.scans if outer[0] is None else outer[0]
    analysis.loops = (*analysis.loops, lead.units)
    if outer[0] is None:
        slices = [_sliced(analysis, axes[1:], length) for axes in stacks]
    else:
        slices = [axes[1:] for axes in stacks]
    run = lambda carry: analysis.run(body, [*consts, *carry, *slices], names)
    carry, outs = _looped(analysis, carry, run, n_carry)
    analysis.level, analysis.loops = outer
    return [*carry, *((lead, *_left(analysis, axes)) for axes in outs[n_carry:])]


def _sliced(analysis: Analysis, axes: Axes, length: int) -> Axes:
    """The axes of a slice: units of their own, which may differ from step to step."""

    def axis(a: Axis) -> Axis:
        own = analysis.fresh(len(a.units))
        assert analysis.level is not None
        level = analysis.level
        pairs = zip(a.units, own, strict=True)
        analysis.layers.extend((u, v, level, length) for u, v in pairs if v)
        return Axis(own, a.zero)

    return tuple(map(axis, axes))


def _looped(
    analysis: Analysis,
    carry: list[Axes],
    run: Callable[[list[Axes]], list[Axes]],
    n_carry: int,
) -> tuple[list[Axes], list[Axes]]:
    """A body until nothing that it carries stops being zero: carry and results."""
    while True:
        met = len(analysis.products)
        outs = run(carry)
        after = _steady(analysis, carry, outs[:n_carry])
        if after == carry:
            return carry, outs
        carry = after
        del analysis.products[met:]


def _steady(analysis: Analysis, before: list[Axes], after: list[Axes]) -> list[Axes]:
    """Carried values have the same axes before and after a step."""
    return [
        tuple(
            Axis(analysis.unify([a, b], "what a loop carries"), a.zero and b.zero)
            for a, b in zip(old, new, strict=True)
        )
        for old, new in zip(before, after, strict=True)
    ]


def _left(analysis: Analysis, axes: Axes) -> Axes:
    """The axes of what a scan stacks, which every step must share."""

    def axis(a: Axis) -> Axis:
        outside = analysis.fresh(len(a.units))
        return Axis(analysis.unify([Axis(outside, False), a], "a scan"), a.zero)

    return tuple(map(axis, axes))


def while_(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """As a scan without slices."""
    p = eqn.params
    n_test, n_body = p["cond_nconsts"], p["body_nconsts"]
    test, body, carry = (
        ins[:n_test],
        ins[n_test : n_test + n_body],
        ins[n_test + n_body :],
    )
    run = lambda carry: analysis.run(p["body_jaxpr"], [*body, *carry])
    carry, _ = _looped(analysis, carry, run, len(carry))
    analysis.run(p["cond_jaxpr"], [*test, *carry])
    return carry


def cond(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """All branches give the same axes."""
    names = [analysis.name(v) for v in eqn.invars[1:]]
    outs = [analysis.run(branch, ins[1:], names) for branch in eqn.params["branches"]]
    result = outs[0]
    for other in outs[1:]:
        result = _steady(analysis, result, other)
    return result


CONTROL_RULES: dict[str, Rule] = {
    **dict.fromkeys(_compat.CALLS, call),
    "scan": scan,
    "while": while_,
    "cond": cond,
}
"""By primitive."""
