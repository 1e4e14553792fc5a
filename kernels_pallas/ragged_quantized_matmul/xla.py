"""Ragged low-bit matmul by plain XLA: a loop over blocks of rows and their experts.

Only the weights of experts that have rows are read, and one block is dense at a time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight
from kernels_pallas.quantized_matmul import xla
from kernels_pallas.ragged_quantized_matmul.visits import Visits, own_rows, visits

BLOCK = 128
"""Rows a visit."""


def ragged_quantized_matmul(
    x: jax.Array, weight: Weight, group_sizes: jax.Array, fmt: Format, *, chunk: int
) -> jax.Array:
    """As the reference.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[E, N, K]``.
      group_sizes: ``int32[E]``.
      fmt: What the codes stand for. Static.
      chunk: Weights to dequantize at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    m, n = x.shape[0], weight.words.shape[1]
    loop = _Loop(x.shape[0], group_sizes)

    def visit(y: jax.Array, at: jax.Array) -> jax.Array:
        part = xla.quantized_matmul(
            loop.rows(x, at), loop.own(weight, at), fmt, chunk=chunk
        )
        return loop.add(y, part, at)

    return loop.run(visit, jnp.zeros((loop.padded, n), jnp.float32))[:m]


def gradients(
    dy: jax.Array,
    x: jax.Array,
    weight: Weight,
    group_sizes: jax.Array,
    fmt: Format,
    *,
    chunk: int,
) -> tuple[jax.Array, Weight]:
    """float32 cotangents of `x` and, in the place of its sides, of the weight."""
    loop = _Loop(x.shape[0], group_sizes)
    k = x.shape[1]
    sides = (weight.scale, weight.zero)

    def visit(total: Any, at: jax.Array) -> Any:
        dx, dsides = total
        own = loop.own(weight, at)
        rows, drows = loop.rows(x, at), loop.rows(dy, at)
        part = xla.input_gradient(drows, own, fmt, k=k, chunk=chunk)
        found = xla.scale_gradients(drows, rows, own, fmt, chunk=chunk)
        expert = loop.found.expert[at]
        add = lambda a, b: a.at[expert].add(b.astype(jnp.float32))
        floats = lambda a: None if a is None else a.astype(jnp.float32)
        dsides = tuple(
            None if a is None else add(a, floats(b))
            for a, b in zip(dsides, found[1:], strict=True)
        )
        return loop.add(dx, part, at), dsides

    zeros = tuple(None if a is None else jnp.zeros(a.shape, jnp.float32) for a in sides)
    start = (jnp.zeros((loop.padded, k), jnp.float32), zeros)
    dx, (dscale, dzero) = loop.run(visit, start)
    return dx[: x.shape[0]], Weight(weight.words, dscale, dzero)


class _Loop:
    """The visits of ``m`` rows, and what each reads and writes."""

    def __init__(self, m: int, group_sizes: jax.Array) -> None:
        self.block = min(BLOCK, m)
        self.padded = -(-m // self.block) * self.block
        self.found: Visits = visits(group_sizes, rows=m, block=self.block)

    def rows(self, a: jax.Array, at: jax.Array) -> jax.Array:
        """The visit's rows in float32, those of other experts zero."""
        a = jnp.pad(a, ((0, self.padded - a.shape[0]), (0, 0)))
        start = self.found.block[at] * self.block
        part = jax.lax.dynamic_slice_in_dim(a, start, self.block).astype(jnp.float32)
        return jnp.where(own_rows(self.found, at, block=self.block), part, 0.0)

    def own(self, weight: Weight, at: jax.Array) -> Weight:
        """The visit's expert."""
        return jax.tree.map(lambda a: a[self.found.expert[at]], weight)

    def add(self, total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
        """Add the visit's rows to a sum."""
        start = self.found.block[at] * self.block
        part += jax.lax.dynamic_slice_in_dim(total, start, self.block)
        return jax.lax.dynamic_update_slice_in_dim(total, part, start, 0)

    def run(self, visit: Any, start: Any) -> Any:
        """Fold the visits that there are."""
        body = lambda at, total: visit(total, at)
        return jax.lax.fori_loop(0, self.found.there[0], body, start)
