"""Axes through matmuls and convolutions, and what these cost."""

from __future__ import annotations

import math
from typing import Any

from jaxcompress.prune.structure._analysis import (
    Analysis,
    Axes,
    Axis,
    Product,
    Rule,
    unknown,
)


def dot_general(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Contracted axes are equal, and so are batch axes; the others pass."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    a, b = ins
    batch = [
        _both(analysis, a[i], b[j])
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    inner = [_contract(analysis, a[i], b[j]) for i, j in zip(left, right, strict=True)]
    free_a = [x for i, x in enumerate(a) if i not in (*left, *left_batch)]
    free_b = [x for i, x in enumerate(b) if i not in (*right, *right_batch)]
    out = (*batch, *free_a, *free_b)
    _record(analysis, eqn, [x.units for x in out] + inner, 2)
    return [out]


def _both(analysis: Analysis, a: Axis, b: Axis) -> Axis:
    return Axis(analysis.unify([a, b], "a matmul's batch"), a.zero or b.zero)


def _contract(analysis: Analysis, a: Axis, b: Axis) -> Any:
    if not (a.zero or b.zero):
        analysis.note_inexact(
            a, "a matmul sums over it where neither side need be zero"
        )
        analysis.note_inexact(
            b, "a matmul sums over it where neither side need be zero"
        )
    return analysis.unify([a, b], "a matmul")


def _record(analysis: Analysis, eqn: Any, axes: list[Any], factor: int) -> None:
    names = dict.fromkeys(analysis.name(v) for v in eqn.invars)
    analysis.products.append(
        Product(
            axes=(*axes, *analysis.loops),
            factor=factor,
            paths=tuple(n for n in names if n is not None),
        )
    )


def convolution(analysis: Analysis, eqn: Any, ins: list[Axes]) -> list[Axes]:
    """Input channels meet the kernel's; pixels stay.

    With groups, the same channels go from every group, and of a depthwise convolution
    channels and filters together.
    """
    p = eqn.params
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    if p["batch_group_count"] != 1:
        return unknown(analysis, eqn, ins)
    x, kernel = ins
    (batch, channel, *pixels), (out, into, *taps) = numbers.lhs_spec, numbers.rhs_spec
    for a in [x[i] for i in pixels] + [kernel[i] for i in taps]:
        analysis.fix(a, "a convolution's window slides over it")
    if groups == 1:
        inner = _contract(analysis, x[channel], kernel[into])
    else:
        _grouped(analysis, x[channel], kernel[into], kernel[out], groups)
        inner = kernel[into].units
    shape = eqn.outvars[0].aval.shape
    result = [Axis(analysis.fresh(n, positional=True), False) for n in shape]
    for i in numbers.out_spec[2:]:
        analysis.fix(result[i], "a convolution's window slides over it")
    result[numbers.out_spec[0]] = x[batch]
    result[numbers.out_spec[1]] = kernel[out]
    size = math.prod(len(kernel[i].units) for i in taps)
    size *= math.prod(shape[i] for i in numbers.out_spec[2:])
    _record(analysis, eqn, [x[batch].units, inner, kernel[out].units], 2 * size)
    return [tuple(result)]


def _grouped(
    analysis: Analysis, channels: Axis, into: Axis, out: Axis, groups: int
) -> None:
    """Channel ``g * n + j`` of the input is input j of group g's filters."""
    n, m = len(into.units), len(out.units) // groups
    if n == 1:  # Depthwise: a channel goes with all of its filters.
        for o, unit in enumerate(out.units):
            analysis.units.unify(
                channels.units[o // m], unit, "a depthwise convolution"
            )
        return
    for c, unit in enumerate(channels.units):
        analysis.units.unify(into.units[c % n], unit, "a grouped convolution")
    for o, unit in enumerate(out.units):
        analysis.units.unify(out.units[o % m], unit, "a grouped convolution")


PRODUCT_RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
}
"""By primitive."""
