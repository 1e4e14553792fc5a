"""Axes through slices, look-ups, padding, windows and running sums."""

from __future__ import annotations

from typing import Any

from jaxcompress.prune.structure._analysis import Analysis, Axes, Axis, Rule, is_zero


def slice_(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Some positions of every axis."""
    del analysis
    p = eqn.params
    strides = p["strides"] or (1,) * len(ins[0])
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    return [
        tuple(
            Axis(a.units[start:limit:stride], a.zero)
            for a, (start, limit, stride) in zip(ins[0], cuts, strict=True)
        )
    ]


def reverse(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """The same positions, backwards."""
    del analysis
    turned = eqn.params["dimensions"]
    return [
        tuple(
            Axis(a.units[::-1], a.zero) if i in turned else a
            for i, a in enumerate(ins[0])
        )
    ]


def pad(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """New positions before and after."""
    zero = is_zero(eqn.invars[1])

    def axis(a: Axis, low: int, high: int, interior: int) -> Axis:
        if low == high == interior == 0:
            return a
        n = len(a.units)
        if interior or low < 0 or high < 0:
            analysis.fix(a, "is padded between its positions or cut")
            total = max(0, n + low + high + interior * (n - 1))
            return Axis(analysis.fresh(total, positional=True), False)
        fresh = analysis.units.fresh
        before, after = fresh(low, analysis.level), fresh(high, analysis.level)
        return Axis((*before, *a.units, *after), a.zero and zero)

    config = eqn.params["padding_config"]
    return [tuple(axis(a, *c) for a, c in zip(ins[0], config, strict=True))]


def iota(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Numbers along one axis."""
    return [analysis.constant(eqn.params["shape"])]


def along_one(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Cumulative sums and sorts: one axis is kept whole, the others are equal."""
    name = eqn.primitive.name
    along = eqn.params["axis" if "axis" in eqn.params else "dimension"]

    def axis(i: int) -> Axis:
        axes = [a[i] for a in ins]
        if i == along:
            for a in axes:
                analysis.fix(a, f"its order matters to {name!r}")
        units = analysis.unify(axes, f"the operation {name!r}")
        return Axis(units, name == "cumsum" and axes[0].zero)

    out = tuple(axis(i) for i in range(len(ins[0])))
    return [out for _ in eqn.outvars]


def window(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Pooling: axes that the window does not span pass."""
    p = eqn.params
    sizes, strides = p["window_dimensions"], p["window_strides"]
    name = eqn.primitive.name

    def axis(i: int, n: int) -> Axis:
        a = ins[0][i]
        if sizes[i] == strides[i] == 1 and n == len(a.units):
            return Axis(a.units, a.zero)
        analysis.fix(a, f"a window of {name!r} slides over it")
        return Axis(analysis.fresh(n, positional=True), False)

    return [tuple(axis(i, n) for i, n in enumerate(eqn.outvars[0].aval.shape))]


def dynamic_slice(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes that are taken whole pass."""
    sizes = eqn.params["slice_sizes"]

    def axis(a: Axis, n: int) -> Axis:
        if n == len(a.units):
            return a
        analysis.fix(a, "a part of it is chosen at run time")
        return Axis(analysis.fresh(n, positional=True), False)

    return [tuple(map(axis, ins[0], sizes))]


def dynamic_update_slice(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes that are written whole are equal."""

    def axis(a: Axis, b: Axis) -> Axis:
        if len(a.units) == len(b.units):
            units = analysis.unify([a, b], "an update in place")
            return Axis(units, a.zero and b.zero)
        for part in (a, b):
            analysis.fix(part, "a part of it is written at run time")
        return Axis(a.units, False)

    return [tuple(map(axis, ins[0], ins[1]))]


def gather(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Axes of the table that are taken whole pass; a look-up is made in the others."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table, indices = ins
    looked_up = (*numbers.start_index_map, *numbers.operand_batching_dims)
    for a in indices:
        analysis.fix(a, "holds indices")
    whole = [
        i
        for i in range(len(table))
        if i not in numbers.collapsed_slice_dims
        and i not in numbers.operand_batching_dims
    ]
    source = dict(zip(numbers.offset_dims, whole, strict=True))

    def axis(place: int, n: int) -> Axis:
        if place not in source:
            return Axis(analysis.fresh(n, positional=True), False)
        a = table[source[place]]
        if source[place] in looked_up or sizes[source[place]] != len(a.units):
            return Axis(analysis.fresh(n, positional=True), False)
        return a

    for i, a in enumerate(table):
        if i not in source.values() or i in looked_up or sizes[i] != len(a.units):
            analysis.fix(a, "rows of it are looked up by index")
    return [tuple(axis(i, n) for i, n in enumerate(eqn.outvars[0].aval.shape))]


INDEXING_RULES: dict[str, Rule] = {
    "slice": slice_,
    "rev": reverse,
    "pad": pad,
    "iota": iota,
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"), along_one
    ),
    **{f"reduce_window_{name}": window for name in ("sum", "max", "min")},
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
}
"""By primitive."""
