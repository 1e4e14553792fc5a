"""Axes through operations that move values, or act on each by itself."""

from __future__ import annotations

import itertools
from typing import Any

from jaxcompress.layout import reshape_pieces
from jaxcompress.prune.structure._analysis import Analysis, Axes, Axis, Rule, is_zero
from jaxcompress.prune.structure._elementwise import ELEMENTWISE, keeps_zero

ALONE = "is taken out of its axis alone"


def elementwise(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Equal axes; scalars have none, and an axis of size 1 meets any."""
    name = eqn.primitive.name
    full = [axes for axes in ins if axes]
    if not full:
        return [() for _ in eqn.outvars]
    power = eqn.params.get("y", 1) if name == "integer_pow" else 1
    zero_scalar = [is_zero(v) for v in eqn.invars]

    def merged(i: int, n: int) -> Axis:
        for axes in full:
            if len(axes[i].units) < n:
                analysis.fix(axes[i], ALONE)
        wide = [axes[i] for axes in full if len(axes[i].units) == n]
        zeros = [
            axes[i].zero and len(axes[i].units) == n if axes else zero
            for axes, zero in zip(ins, zero_scalar, strict=True)
        ]
        units = analysis.unify(wide, f"the operation {name!r}")
        return Axis(units, keeps_zero(name, zeros, power))

    out = tuple(merged(i, n) for i, n in enumerate(eqn.outvars[0].aval.shape))
    return [out for _ in eqn.outvars]


def barrier(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """The operands as they are."""
    del analysis, eqn
    return ins


def broadcast(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes of size 1 and new ones may have any size."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    source = dict(zip(places, ins[0], strict=True))
    zero = not ins[0] and is_zero(eqn.invars[0])

    def axis(i: int, n: int) -> Axis:
        if i in source and len(source[i].units) == n:
            return source[i]
        if i in source:
            analysis.fix(source[i], ALONE)
        return Axis(analysis.fresh(n), zero)

    return [tuple(axis(i, n) for i, n in enumerate(shape))]


def transpose(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """The axes in another order."""
    del analysis
    return [tuple(ins[0][p] for p in eqn.params["permutation"])]


def squeeze(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes of size 1 go."""
    gone = eqn.params["dimensions"]
    for i in gone:
        analysis.fix(ins[0][i], ALONE)
    return [tuple(a for i, a in enumerate(ins[0]) if i not in gone)]


def reshape(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes are multiplied together and divided."""
    old, new = [len(a.units) for a in ins[0]], eqn.params["new_sizes"]
    result: list[Axis] = [Axis(((),), False) for _ in new]
    for a in ins[0]:
        if len(a.units) == 1:
            analysis.fix(a, ALONE)
    for olds, news in reshape_pieces(old, new):
        axis = merge([ins[0][i] for i in olds])
        for place, part in zip(
            news, divide(analysis, axis, [new[j] for j in news]), strict=True
        ):
            result[place] = part
    return [tuple(result)]


def merge(axes: list[Axis]) -> Axis:
    """One axis of several, the last one fastest."""
    units = [
        tuple(node for unit in combination for node in unit)
        for combination in itertools.product(*(a.units for a in axes))
    ]
    return Axis(tuple(units), all(a.zero for a in axes))


def divide(analysis: Analysis, axis: Axis, sizes: list[int]) -> list[Axis]:
    """An axis as several, the last one fastest."""
    parts = []
    units = axis.units
    for size in sizes[:-1]:
        first, units = analysis.units.split(
            units, size, len(units) // size, analysis.level, "a reshape"
        )
        parts.append(Axis(first, axis.zero))
    return [*parts, Axis(units, axis.zero)]


def concatenate(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Positions one after another along one axis; the others are equal."""
    along = eqn.params["dimension"]

    def axis(i: int) -> Axis:
        parts = [axes[i] for axes in ins]
        zero = all(p.zero for p in parts)
        if i == along:
            return Axis(tuple(u for p in parts for u in p.units), zero)
        return Axis(analysis.unify(parts, "a concatenation"), zero)

    return [tuple(axis(i) for i in range(len(ins[0])))]


def stack(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Equal axes, and a new one that numbers the operands, all of which stay."""

    def axis(i: int) -> Axis:
        parts = [axes[i] for axes in ins]
        units = analysis.unify(parts, "a stack")
        return Axis(units, all(p.zero for p in parts))

    axes = [axis(i) for i in range(len(ins[0]))]
    new = Axis(analysis.fresh(len(ins)), True)
    analysis.fix(new, "numbers the operands of a stack")
    axes.insert(eqn.params["axis"], new)
    return [tuple(axes)]


def unstack(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Undoes a stack."""
    along = eqn.params["axis"]
    analysis.fix(ins[0][along], ALONE)
    out = tuple(a for i, a in enumerate(ins[0]) if i != along)
    return [out for _ in eqn.outvars]


def tile(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """The positions of an axis, again and again."""
    del analysis
    reps = eqn.params["reps"]
    return [tuple(Axis(a.units * r, a.zero) for a, r in zip(ins[0], reps, strict=True))]


def split(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Undoes a concatenation."""
    del analysis
    along, sizes = eqn.params["axis"], eqn.params["sizes"]
    starts = itertools.accumulate(sizes, initial=0)
    return [
        tuple(
            Axis(a.units[start : start + n], a.zero) if i == along else a
            for i, a in enumerate(ins[0])
        )
        for start, n in zip(starts, sizes, strict=False)
    ]


def reduce(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes go; a sum over one is that over its part if the rest is zero."""
    gone, name = eqn.params["axes"], eqn.primitive.name
    for i in gone:
        if not (ins[0][i].zero and name == "reduce_sum"):
            analysis.note_inexact(
                ins[0][i], f"{name} runs over it where it need not be zero"
            )
    out = tuple(a for i, a in enumerate(ins[0]) if i not in gone)
    kept = name == "reduce_sum" or name.startswith(("reduce_max", "reduce_min"))
    return [tuple(Axis(a.units, a.zero and kept) for a in out) for _ in eqn.outvars]


def arg_reduce(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """The positions along an axis are numbered, so it stays."""
    gone = eqn.params["axes"]
    for i in gone:
        analysis.fix(ins[0][i], f"its positions are numbered by {eqn.primitive.name!r}")
    return [tuple(Axis(a.units, False) for i, a in enumerate(ins[0]) if i not in gone)]


REDUCTIONS = ("sum", "max", "min", "prod", "and", "or", "xor")
LAYOUT_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "optimization_barrier": barrier,
    "broadcast_in_dim": broadcast,
    "transpose": transpose,
    "squeeze": squeeze,
    "reshape": reshape,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "split": split,
    **{f"reduce_{name}": reduce for name in REDUCTIONS},
    **dict.fromkeys(("argmax", "argmin"), arg_reduce),
}
"""By primitive."""
