"""Hashed matmul by plain XLA: what runs on a CPU, and where no kernel fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.chunks import map_rows
from kernels_pallas.hashed_matmul.reference import Hashing, Origin, places
from kernels_pallas.hashed_matmul.sums import exact_sums

CHUNK = 2**20
"""Weights that are dense at a time: 4 MB of float32."""


def hashed_matmul(
    x: jax.Array,
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    origin: Origin = (0, 0),
    chunk: int = CHUNK,
) -> jax.Array:
    """Look some rows of the weight up, multiply, go on.

    Args:
      x: ``float[M, K]``.
      buckets: ``float[B]``.
      hashing: Which bucket a weight is. Static.
      n: Outputs. Static.
      origin: Where in the whole weight this part of it begins, in whole blocks.
      chunk: Weights to look up at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    k = x.shape[-1]
    x = x.astype(jnp.float32)
    runs = _Runs.of(hashing, len(buckets), k, origin[1])
    table = runs.table(buckets.astype(jnp.float32))

    def multiplied(rows: jax.Array) -> jax.Array:
        w = runs.look_up(table, rows)
        return jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision="highest")

    return map_rows(multiplied, _rows(origin, n), max(1, chunk // k)).T


def gradients(
    x: jax.Array,
    buckets: jax.Array,
    dy: jax.Array,
    hashing: Hashing,
    *,
    origin: Origin = (0, 0),
    chunk: int = CHUNK,
    exact: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Those of `hashed_matmul`; the rows of the weight are looked up again.

    Args:
      x: As for `hashed_matmul`.
      buckets: As there.
      dy: ``float[M, N]`` gradient of its result.
      hashing: As there. Static.
      origin: As there.
      chunk: As there. Static.
      exact: Sum the gradients of a chunk's weights exactly, so that their order cannot
        matter: where scatters are not in order. Static.

    Returns:
      ``float32[M, K]`` and ``float32[B]``.
    """
    k = x.shape[-1]
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    runs = _Runs.of(hashing, len(buckets), k, origin[1])
    table = runs.table(buckets.astype(jnp.float32))

    def step(sums: Any, part: Any) -> Any:
        rows, dy = part
        dx, dtable = sums
        w = runs.look_up(table, rows)
        contract = (((0,), (0,)), ((), ()))
        dx = dx + jax.lax.dot_general(dy, w, contract, precision="highest")
        dw = jnp.matmul(dy, x, precision="highest")
        return dx, runs.add(dtable, rows, dw, exact=exact)

    sums = jnp.zeros_like(x), jnp.zeros_like(table)
    each = _rows(origin, dy.shape[-1]), dy.T
    dx, dtable = _fold(step, sums, each, max(1, chunk // k))
    return dx, dtable.reshape(-1)


class _Runs(NamedTuple):
    """The runs of buckets that make rows of a weight ``[N, K]``.

    Attributes:
      hashing: Which bucket a weight is.
      buckets: How many.
      inputs: K.
      columns: ``int32`` inputs of the whole weight; one a block, of aligned runs.
    """

    hashing: Hashing
    buckets: int
    inputs: int
    columns: jax.Array

    @classmethod
    def of(cls, hashing: Hashing, buckets: int, inputs: int, left: Any) -> _Runs:
        """Those of a part of a weight that begins at the input `left`."""
        width = hashing.block[1] if hashing.aligned else 1
        columns = jnp.arange(0, inputs, width, dtype=jnp.int32)
        return cls(hashing, buckets, inputs, columns + jnp.asarray(left, jnp.int32))

    @property
    def width(self) -> int:
        """Buckets that are read together."""
        return self.hashing.block[1] if self.hashing.aligned else 1

    def table(self, buckets: jax.Array) -> jax.Array:
        """``[lines, width]``."""
        return buckets.reshape(-1, self.width)

    def _lines(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Line of each run of the rows, and its sign: ``[rows, runs]``."""
        at, negative = places(
            rows[:, None], self.columns[None], self.hashing, buckets=self.buckets
        )
        return at if self.width == 1 else at // self.width, negative

    def look_up(self, table: jax.Array, rows: jax.Array) -> jax.Array:
        """``float32[rows, K]``."""
        line, negative = self._lines(rows)
        values = table.at[line].get(mode="promise_in_bounds")
        values = jnp.where(negative[..., None], -values, values)
        return values.reshape(len(rows), -1)[:, : self.inputs]

    def add(
        self, sums: jax.Array, rows: jax.Array, dw: jax.Array, *, exact: bool
    ) -> jax.Array:
        """`sums` of every line, and the gradient of each of these rows in its place."""
        line, negative = self._lines(rows)
        dw = jnp.pad(dw, ((0, 0), (0, -self.inputs % self.width)))
        dw = dw.reshape(*line.shape, self.width)
        dw = jnp.where(negative[..., None], -dw, dw)
        if exact:
            return sums + exact_sums(dw, line, len(sums))
        return sums.at[line].add(dw, mode="promise_in_bounds")


def _rows(origin: Origin, n: int) -> jax.Array:
    return jnp.asarray(origin[0], jnp.int32) + jnp.arange(n, dtype=jnp.int32)


def _fold(step: Callable[[Any, Any], Any], total: Any, rows: Any, at_once: int) -> Any:
    """``step(total, rows)``, some rows at a time, each from the total so far."""
    count, rest = divmod(len(rows[0]), at_once)
    cut = lambda start, size: jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), rows
    )
    if count == 1:
        total = step(total, cut(0, at_once))
    elif count:
        body = lambda i, total: step(total, cut(i * at_once, at_once))
        total = jax.lax.fori_loop(0, count, body, total)
    return step(total, cut(count * at_once, rest)) if rest else total
