"""N:M-sparse matmul by plain XLA: what runs on a CPU, and where no kernel fits.

The weight is expanded by planes, input ``j`` of all groups at once, and each plane is
multiplied with its own inputs: nothing is put side by side. On a CPU some rows are
dense at a time, as for `quantized_matmul`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.chunks import map_rows, sum_rows
from kernels_pallas.formats import Format
from kernels_pallas.nm_sparse_matmul.layout import NMSparse, groups_of, index_format
from kernels_pallas.values import (
    dense_values,
    floats,
    with_floats,
)


def slots(j: int, n: int, m: int) -> range:
    """Which of a group's `n` kept weights input `j` can be: their places ascend."""
    return range(max(0, j - (m - n)), min(j, n - 1) + 1)


def nm_sparse_matmul(
    x: jax.Array,
    weight: NMSparse,
    fmt: Format | None,
    *,
    n: int,
    m: int,
    at_once: int,
) -> jax.Array:
    """``x @ unpack(weight).T``.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many. Static.
      at_once: Outputs whose weights are dense at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    parts = by_input(x.astype(jnp.float32), m)

    def rows(weight: NMSparse) -> jax.Array:
        dense = _expanded(weight, fmt, n, m, parts.shape[-1])
        return _total(_dot(w, x, 1) for w, x in zip(dense, parts, strict=True))

    return map_rows(rows, weight, at_once).T


def input_gradient(
    dy: jax.Array,
    weight: NMSparse,
    fmt: Format | None,
    *,
    n: int,
    m: int,
    k: int,
    at_once: int,
) -> jax.Array:
    """``dy @ unpack(weight)``, ``float32[M, K]`` of ``float[M, N]``."""

    def rows(part: tuple[NMSparse, jax.Array]) -> list[jax.Array]:
        weight, dy = part
        dense = _expanded(weight, fmt, n, m, groups_of(k, m))
        return [_dot(dy, w, 0) for w in dense]

    found = sum_rows(rows, (weight, dy.astype(jnp.float32).T), at_once)
    return jnp.stack(found, axis=-1).reshape(len(dy), -1)[:, :k]


def value_gradients(
    dy: jax.Array,
    x: jax.Array,
    weight: NMSparse,
    fmt: Format | None,
    *,
    n: int,
    m: int,
    at_once: int,
) -> Any:
    """Cotangents of what `floats` finds in the values, in their shapes and dtypes.

    Args:
      dy: ``float[M, N]``.
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: As for `nm_sparse_matmul`.
      n: Weights kept. Static.
      m: Of so many. Static.
      at_once: As for `nm_sparse_matmul`.
    """
    parts = by_input(x.astype(jnp.float32), m)

    def rows(part: tuple[NMSparse, jax.Array]) -> jax.Array:
        weight, dy = part

        def dense(given: Any) -> list[jax.Array]:
            values = with_floats(weight.values, given)
            new = weight._replace(values=values)
            return _expanded(new, fmt, n, m, parts.shape[-1])

        _, back = jax.vjp(dense, floats(weight.values))
        found = jax.tree.leaves(back([_dot(dy, x.T, 1) for x in parts]))
        return jnp.concatenate([a.astype(jnp.float32) for a in found], axis=1)

    found = map_rows(rows, (weight, dy.astype(jnp.float32).T), at_once)
    leaves, tree = jax.tree.flatten(floats(weight.values))
    ends = [sum(a.shape[1] for a in leaves[: i + 1]) for i in range(len(leaves) - 1)]
    pieces = jnp.split(found, ends, axis=1)
    pairs = zip(pieces, leaves, strict=True)
    return jax.tree.unflatten(tree, [p.astype(a.dtype) for p, a in pairs])


def by_input(x: jax.Array, m: int) -> jax.Array:
    """``[m, M, G]`` of ``[M, K]``: input ``j`` of each group."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % m)))
    return jnp.moveaxis(x.reshape(len(x), -1, m), -1, 0)


def expand(
    values: Sequence[jax.Array],
    places: Sequence[jax.Array],
    n: int,
    m: int,
    *,
    first: int = 0,
) -> list[jax.Array]:
    """Dense planes of the kept weights' planes.

    Args:
      values: `n` planes ``float[...]``.
      places: Their places in the group, of any integer dtype.
      n: Weights kept.
      m: Of so many.
      first: Code of a group's first place.

    Returns:
      `m` planes: input ``j`` of every group.
    """
    zero = jnp.zeros_like(values[0])
    dense = [zero] * m
    for j in range(m):
        for i in slots(j, n, m):
            at = jnp.asarray(first + j, places[i].dtype)
            dense[j] = jnp.where(places[i] == at, values[i], dense[j])
    return dense


def _expanded(
    weight: NMSparse, fmt: Format | None, n: int, m: int, groups: int
) -> list[jax.Array]:
    """``float32[rows, G]`` of each input of a group."""
    values = dense_values(weight.values, fmt, groups * n).astype(jnp.float32)
    bits = index_format(m).bits
    places = packing.unpack(weight.indices, bits=bits, count=groups * n)
    planes = lambda a: jnp.moveaxis(a.reshape(len(a), -1, n), -1, 0)
    # Else every dense plane takes the codes apart again.
    kept = jax.lax.optimization_barrier((planes(values), planes(places)))
    return expand(list(kept[0]), list(kept[1]), n, m)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the same axis of two matrices."""
    dims = (((axis,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision="highest")
