"""Operations on arrays that lost positions: what they need cut, and what is left.

An operation gets its operands cut to the positions that all of them have; sizes among
its parameters are replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxcompress.layout import reshape_pieces
from jaxcompress.lift import _compat
from jaxcompress.prune.structure._elementwise import ELEMENTWISE
from jaxcompress.prune.structure._layout_rules import REDUCTIONS
from jaxcompress.prune.structure._sized import Kept, Sized, as_kept, both, there

Rule = Callable[[Any, list[Sized]], list[Sized]]


def bind(eqn: Any, values: list[Sized], **changes: Any) -> list[Any]:
    """The operation on what is left, some of its parameters replaced."""
    if changes:
        eqn = eqn.replace(params={**eqn.params, **changes})
    return _compat.bind(eqn, [v.array for v in values])


def elementwise(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Operands cut to the positions that all of them have."""
    shape = eqn.outvars[0].aval.shape
    kept = tuple(
        both(*(v.kept[i] for v in ins if v.kept and v.kept[i] is not None))
        for i in range(len(shape))
    )
    cut = [
        _cut_where(v, a.aval.shape, shape, kept)
        for v, a in zip(ins, eqn.invars, strict=True)
    ]
    return [Sized(a, kept) for a in bind(eqn, cut)]


def _cut_where(
    v: Sized, own: tuple[int, ...], shape: tuple[int, ...], kept: tuple[Kept, ...]
) -> Sized:
    """A scalar has no axis to cut, and an axis of size 1 meets any."""
    if not own:
        return v
    return v.cut_all(
        [k if n == m else None for k, n, m in zip(kept, own, shape, strict=True)]
    )


def broadcast(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """New axes have their old size: they are cut where they meet smaller ones."""
    (x,), (aval,) = ins[:1], [v.aval for v in eqn.invars[:1]]
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = list(shape)
    kept: list[Kept] = [None] * len(shape)
    for i, place in enumerate(places):
        if aval.shape[i] == shape[place]:
            new[place], kept[place] = x.array.shape[i], x.kept[i]
    (out,) = bind(eqn, ins, shape=tuple(new))
    return [Sized(out, tuple(kept))]


def transpose(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """The axes in another order."""
    (out,) = bind(eqn, ins)
    return [Sized(out, tuple(ins[0].kept[p] for p in eqn.params["permutation"]))]


def without(name: str) -> Rule:
    """An operation whose parameter `name` lists the axes that go."""

    def rule(eqn: Any, ins: list[Sized]) -> list[Sized]:
        gone = eqn.params[name]
        kept = tuple(k for i, k in enumerate(ins[0].kept) if i not in gone)
        return [Sized(a, kept) for a in bind(eqn, ins)]

    return rule


def reshape(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Positions of merged axes are left where they are in both; of split axes, too."""
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    kept: list[Kept] = [None] * len(new)
    for olds, news in reshape_pieces(old, new):
        left = np.ones((), bool)
        for i in olds:
            left = np.logical_and.outer(left, there(ins[0].kept[i], old[i]))
        left = left.reshape([new[j] for j in news])
        rebuilt = np.ones((), bool)
        for axis, j in enumerate(news):
            own = np.asarray(left.any(tuple(a for a in range(left.ndim) if a != axis)))
            rebuilt = np.logical_and.outer(rebuilt, own)
            kept[j] = as_kept(own)
        if not np.array_equal(rebuilt, left):
            raise ValueError(
                f"remove: what is left of axes {tuple(old[i] for i in olds)} does not "
                f"divide into {left.shape}; remove whole rows or columns of that."
            )
    sizes = tuple(int(there(k, n).sum()) for k, n in zip(kept, new, strict=True))
    (out,) = bind(eqn, ins, new_sizes=sizes)
    return [Sized(out, tuple(kept))]


def concatenate(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """What is left of the one, then what is left of the next."""
    along = eqn.params["dimension"]
    shapes = [v.aval.shape for v in eqn.invars]
    kept = [
        both(*(v.kept[i] for v in ins)) if i != along else None
        for i in range(len(shapes[0]))
    ]
    cut = [v.cut_all(kept) for v in ins]
    left = [there(v.kept[along], s[along]) for v, s in zip(ins, shapes, strict=True)]
    kept[along] = as_kept(np.concatenate(left))
    (out,) = bind(eqn, cut)
    return [Sized(out, tuple(kept))]


def stack(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Operands cut to the positions that all of them have."""
    kept = [both(*ks) for ks in zip(*(v.kept for v in ins), strict=True)]
    (out,) = bind(eqn, [v.cut_all(kept) for v in ins])
    kept.insert(eqn.params["axis"], None)
    return [Sized(out, tuple(kept))]


def unstack(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Undoes a stack."""
    along = eqn.params["axis"]
    kept = tuple(k for i, k in enumerate(ins[0].kept) if i != along)
    return [Sized(a, kept) for a in bind(eqn, ins)]


def tile(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """What is left, again and again."""
    (out,) = bind(eqn, ins)
    reps = eqn.params["reps"]
    return [
        Sized(
            out,
            tuple(k and k * r for k, r in zip(ins[0].kept, reps, strict=True)),
        )
    ]


def split(eqn: Any, ins: list[Sized]) -> list[Sized]:
    """Each part keeps what is left of it."""
    along, sizes = eqn.params["axis"], eqn.params["sizes"]
    left = there(ins[0].kept[along], sum(sizes))
    parts = np.split(left, np.cumsum(sizes)[:-1])
    outs = bind(eqn, ins, sizes=tuple(int(p.sum()) for p in parts))
    kept = ins[0].kept
    return [
        Sized(a, (*kept[:along], as_kept(p), *kept[along + 1 :]))
        for a, p in zip(outs, parts, strict=True)
    ]


LAYOUT: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "broadcast_in_dim": broadcast,
    "transpose": transpose,
    "squeeze": without("dimensions"),
    **{f"reduce_{name}": without("axes") for name in REDUCTIONS},
    **dict.fromkeys(("argmax", "argmin"), without("axes")),
    "reshape": reshape,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "split": split,
}
"""By primitive."""
