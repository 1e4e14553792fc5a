"""Leaves that wrap a leaf, made by hand, and where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.layout import Layout
from jaxcompress.leaf import Leaf
from tests.jitted import run as run

RANK, SLOTS = 2, 2
quantize = jax.jit(q.quantize, static_argnames=("fmt", "axes"))
materialize = jax.jit(jc.materialize)


class Site(NamedTuple):
    """A contraction of activations and a weight, as `jnp.einsum` writes it."""

    subscripts: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: jc.Axes
    left: bool = False

    def run(self, w: Any, x: Any) -> jax.Array:
        return jnp.einsum(self.subscripts, *((w, x) if self.left else (x, w)))

    def exact(self, w: Any, x: Any) -> np.ndarray:
        operands = (w, x) if self.left else (x, w)
        return np.einsum(self.subscripts, *map(np.float64, operands))


MATRIX = jc.Axes(contract=(-2,))
SITES = {
    "transposed": Site("bi,oi->bo", (5, 24), (6, 24), jc.Axes(contract=(-1,))),
    "left": Site("io,bi->ob", (5, 24), (24, 6), MATRIX, left=True),
    "two_axes_apart": Site(
        "hbd,dho->bo", (4, 5, 6), (6, 4, 5), jc.Axes(contract=(-3, -2))
    ),
    "batched": Site(
        "bei,eio->beo", (5, 3, 24), (3, 24, 6), jc.Axes(contract=(-2,), stack=1)
    ),
    # Small arrays differ along an axis that is not a batch axis: the dense weight.
    "stack_not_batched": Site(
        "bi,eio->beo", (5, 24), (3, 24, 6), jc.Axes(contract=(-2,), stack=1)
    ),
    "batched_output": Site(
        "ebi,feio->ebfo", (3, 5, 24), (2, 3, 24, 6), jc.Axes(contract=(-2,))
    ),
}


def draw(seed: int, *shape: int) -> jax.Array:
    """Normal numbers, some channels of the last axis larger than others."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=shape) * 2.0 ** rng.integers(-2, 3, shape[-1])
    return jnp.asarray(a, jnp.float32)


class Parts(NamedTuple):
    """What every kind of leaf is made of."""

    inner: Leaf
    stack: tuple[int, ...]
    ones: tuple[int, ...]
    out: tuple[int, ...]
    k: int
    layout: Layout


def scaled(p: Parts) -> Leaf:
    s = jnp.exp2(jax.random.normal(jax.random.key(1), (*p.stack, *p.ones, p.k)))
    return q.ScaledArray(inner=p.inner, channel_scale=s, layout=p.layout)


def normalized(p: Parts) -> Leaf:
    shape = (*p.stack, *p.ones, p.k)
    s = jnp.exp2(jax.random.normal(jax.random.key(6), shape))
    mean = jax.random.normal(jax.random.key(7), shape)
    return q.NormalizedArray(inner=p.inner, mean=mean, deviation=s, layout=p.layout)


def rotated(p: Parts) -> Leaf:
    shape = (*p.stack, *p.ones, p.k)
    signs = jax.random.rademacher(jax.random.key(2), shape, jnp.int8)
    return q.RotatedArray(inner=p.inner, signs=signs, block=p.k & -p.k, layout=p.layout)


def split(p: Parts) -> Leaf:
    """Of two slots, one dense channel, another in each entry of the stack."""
    n = int(np.prod(p.stack))
    used = jnp.arange(n, dtype=jnp.int32) + 3
    index = jnp.stack([used, jnp.full_like(used, p.k)], -1)
    rows = jax.random.normal(jax.random.key(3), (*p.stack, *p.out, SLOTS))
    return q.SplitArray(
        inner=p.inner,
        index=index.reshape(*p.stack, *p.ones, SLOTS),
        rows=rows,
        layout=p.layout,
    )


def corrected(p: Parts) -> Leaf:
    down = jax.random.normal(jax.random.key(4), (*p.stack, *p.ones, RANK, p.k))
    up = jax.random.normal(jax.random.key(5), (*p.stack, *p.out, RANK))
    return q.CorrectedArray(
        inner=p.inner, down=down, up=up, scaling=0.5, layout=p.layout
    )


def quantized_factors(p: Parts) -> Leaf:
    leaf = corrected(p)
    axes = jc.Axes(contract=(-1,), stack=len(p.stack))
    down, up = (q.quantize(a, q.int8(), axes=axes) for a in (leaf.down, leaf.up))
    return leaf.replace(down=down, up=up)


def nested(p: Parts) -> Leaf:
    """A correction of a scaled weight whose inputs are split and rotated."""
    for wrap in (rotated, split, scaled, corrected):
        p = p._replace(inner=wrap(p))
    return p.inner


KINDS: dict[str, Callable[[Parts], Leaf]] = {
    f.__name__: f
    for f in (
        scaled,
        normalized,
        rotated,
        split,
        corrected,
        quantized_factors,
        nested,
    )
}


def make(kind: str, w: jax.Array, fmt: q.NumberFormat | None, axes: jc.Axes) -> Leaf:
    """A leaf of a kind around a rounded weight, or the weight as it is; pure."""
    layout = Layout.of(w.shape, axes)
    inner = (
        jc.prune.MaskedArray(inner=w, mask=jnp.ones(w.shape, bool))
        if fmt is None
        else q.quantize(w, fmt, axes=axes)
    )
    out = tuple(w.shape[a] for a in layout.out)
    parts = Parts(
        inner=inner,
        stack=w.shape[: axes.stack],
        ones=(1,) * len(out),
        out=out,
        k=int(np.prod([w.shape[a] for a in layout.contract])),
        layout=layout,
    )
    return KINDS[kind](parts)
