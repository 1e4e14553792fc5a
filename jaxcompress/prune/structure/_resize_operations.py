"""Slices, look-ups, matmuls and convolutions on arrays that lost positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.prune.structure._resize_layout import Rule, bind
from jaxcompress.prune.structure._sized import Kept, Sized, as_kept, both, there


def slice_(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """The positions asked for, if they are left."""
    p = eqn.params
    strides = p["strides"] or (1,) * len(ins[0].kept)
    cuts = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    array, kept = ins[0].array, []
    for axis, (start, limit, stride) in enumerate(cuts):
        n = eqn.invars[0].aval.shape[axis]
        chosen = np.zeros(n, bool)
        chosen[start:limit:stride] = True
        left = there(ins[0].kept[axis], n)
        kept.append(as_kept(left[start:limit:stride]))
        if not chosen.all():
            places = np.flatnonzero(chosen[left])
            array = _strided(array, places, axis)
    return [Sized(array, tuple(kept))]


def _strided(a: jax.Array, places: np.ndarray, axis: int) -> jax.Array:
    steps = np.unique(np.diff(places))
    if len(places) and len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        return jax.lax.slice_in_dim(a, places[0], places[-1] + 1, step, axis=axis)
    return jnp.take(a, jnp.asarray(places, jnp.int32), axis=axis, mode="clip")


def reverse(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Backwards."""
    (out,) = bind(eqn, ins)
    turned = eqn.params["dimensions"]
    kept = (k and k[::-1] if i in turned else k for i, k in enumerate(ins[0].kept))
    return [Sized(out, tuple(kept))]


def pad(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """New positions are all there, until they meet an axis that lost them."""
    (out,) = bind(eqn, ins)
    kept = (
        k and (True,) * low + k + (True,) * high
        for k, (low, high, _) in zip(
            ins[0].kept, eqn.params["padding_config"], strict=True
        )
    )
    return [Sized(out, tuple(kept))]


def same_axes(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Cumulative sums, pooling: axes that lost positions are not those acted on."""
    return [Sized(a, ins[0].kept) for a in bind(eqn, ins)]


def dynamic_slice(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Axes that are taken whole have another size now."""
    kept, sizes = ins[0].kept, eqn.params["slice_sizes"]
    new = (
        n if k is None else a
        for n, a, k in zip(sizes, ins[0].array.shape, kept, strict=True)
    )
    (out,) = bind(eqn, ins, slice_sizes=tuple(new))
    return [Sized(out, kept)]


def dynamic_update_slice(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Both cut to the positions that both have, in axes that are written whole."""
    shapes = [v.aval.shape for v in eqn.invars[:2]]
    kept = [
        both(a, b) if n == m else None
        for a, b, n, m in zip(ins[0].kept, ins[1].kept, *shapes, strict=True)
    ]
    cut = [v.cut_all(kept) for v in ins[:2]]
    (out,) = bind(eqn, [*cut, *ins[2:]])
    return [Sized(out, tuple(kept))]


def gather(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Axes of the table that are taken whole have another size now."""
    numbers, table = eqn.params["dimension_numbers"], ins[0]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = [i for i in range(len(table.kept)) if i not in gone]
    sizes = tuple(
        n if k is None else a
        for n, a, k in zip(
            eqn.params["slice_sizes"], table.array.shape, table.kept, strict=True
        )
    )
    (out,) = bind(eqn, ins, slice_sizes=sizes)
    source = dict(zip(numbers.offset_dims, whole, strict=True))
    kept = (table.kept[source[i]] if i in source else None for i in range(out.ndim))
    return [Sized(out, tuple(kept))]


def dot_general(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Both cut to the positions that both have, in contracted and batch axes."""
    contract, batch = eqn.params["dimension_numbers"]
    a, b = ins
    for i, j in zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True):
        k = both(a.kept[i], b.kept[j])
        a, b = a.cut(i, k), b.cut(j, k)
    (out,) = bind(eqn, [a, b])
    free = [
        [k for i, k in enumerate(v.kept) if i not in (*c, *t)]
        for v, c, t in zip((a, b), contract, batch, strict=True)
    ]
    return [Sized(out, (*(a.kept[i] for i in batch[0]), *free[0], *free[1]))]


def convolution(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Input channels of both; of a grouped one, the same of every group."""
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    x, kernel = ins
    channel, (out, into) = numbers.lhs_spec[1], numbers.rhs_spec[:2]
    n, size = (eqn.invars[1].aval.shape[i] for i in (into, out))
    if groups == 1:
        k = both(x.kept[channel], kernel.kept[into])
        x, kernel = x.cut(channel, k), kernel.cut(into, k)
    elif n == 1:
        x, kernel = _depthwise(x, channel, kernel, out, groups, size)
        groups = x.array.shape[channel]
    else:
        left = there(x.kept[channel], groups * n).reshape(groups, n)
        left = left & there(kernel.kept[into], n)
        x = x.cut(channel, as_kept(left.reshape(-1)))
        kernel = kernel.cut(into, as_kept(left[0]))
    (result,) = bind(eqn, [x, kernel], feature_group_count=groups)
    kept: list[Kept] = [None] * result.ndim
    kept[numbers.out_spec[0]] = x.kept[numbers.lhs_spec[0]]
    kept[numbers.out_spec[1]] = kernel.kept[out]
    return [Sized(result, tuple(kept))]


def _depthwise(
    x: Sized, channel: int, kernel: Sized, out: int, groups: int, size: int
) -> tuple[Sized, Sized]:
    """Channels cut to those whose filters are left, and filters to those channels."""
    filters = there(kernel.kept[out], size).reshape(groups, -1)
    left = there(x.kept[channel], groups) & filters.any(1)
    filters = filters & left[:, None]
    return (
        x.cut(channel, as_kept(left)),
        kernel.cut(out, as_kept(filters.reshape(-1))),
    )


OPERATIONS: dict[str, Rule] = {
    "slice": slice_,
    "rev": reverse,
    "pad": pad,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), same_axes),
    **{f"reduce_window_{name}": same_axes for name in ("sum", "max", "min")},
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
}
"""By primitive."""
