"""Codebook matmul by plain XLA: what runs on a CPU, and where no kernel fits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import packing
from kernels_pallas.chunks import map_rows
from kernels_pallas.codebook_matmul.decode import decode
from kernels_pallas.codebook_matmul.layout import CodebookWeight, vectors

CHUNK = 2**20
"""Weights that are dense at a time: 4 MB of float32."""


def adds_up(m: int, d: int) -> bool:
    """Whether `by_partial_products` is the faster, by trial on a CPU."""
    return 8 * m <= d


def by_decoding(
    x: jax.Array, weight: CodebookWeight, *, bits: int, chunk: int = CHUNK
) -> jax.Array:
    """Decode some rows of the weight, multiply, go on.

    Differentiable: the rows are decoded again for the gradients.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      bits: Of a code. Static.
      chunk: Weights to decode at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    k, count = x.shape[-1], vectors(weight, x.shape[-1])
    codebooks = weight.codebooks.astype(jnp.float32)
    x = x.astype(jnp.float32)

    def rows(words: jax.Array) -> jax.Array:
        w = decode(packing.unpack(words, bits=bits, count=count), codebooks)
        w = w.reshape(w.shape[0], -1)[:, :k]
        return jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())), precision="highest")

    rows = jax.checkpoint(rows, prevent_cse=False)
    return _scaled(map_rows(rows, weight.words, max(1, chunk // k)), weight)


def by_partial_products(
    x: jax.Array, weight: CodebookWeight, *, bits: int, chunk: int = CHUNK
) -> jax.Array:
    """Multiply the entries by x first, then add up the products that codes name.

    ``M`` numbers are read for a code instead of ``d``.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      bits: Of a code. Static.
      chunk: Weights, ``d`` for a code, to add up at a time. Static.

    Returns:
      ``float32[M, N]``.
    """
    k, count = x.shape[-1], vectors(weight, x.shape[-1])
    products = partial_products(x, weight.codebooks, count)
    *shape, m = products.shape
    table = products.reshape(-1, m)

    def rows(words: jax.Array) -> jax.Array:
        return _read(table, words, (*shape,), bits, count).sum(axis=(1, 2))

    return _scaled(map_rows(rows, weight.words, max(1, chunk // k)), weight)


def partial_products(x: jax.Array, codebooks: jax.Array, count: int) -> jax.Array:
    """``p[s, a, e, m] = sum_j x[m, d s + j] codebooks[s B // S, a, e, j]``.

    Args:
      x: ``float[M, K]``.
      codebooks: ``float[B, A, E, d]``.
      count: Sub-vectors, S. Static.

    Returns:
      ``float32[S, A, E, M]``.
    """
    x, books = x.astype(jnp.float32), codebooks.astype(jnp.float32)
    blocks, a, e, d = books.shape
    parts = subvectors(x, count, d).reshape(x.shape[0], blocks, -1, d)
    products = jnp.einsum("mbsd,baed->bsaem", parts, books, precision="highest")
    return products.reshape(count, a, e, x.shape[0])


def subvectors(x: jax.Array, count: int, d: int) -> jax.Array:
    """``[M, count, d]`` of ``[M, K]``, zeros past K."""
    m, k = x.shape
    return jnp.pad(x, ((0, 0), (0, count * d - k))).reshape(m, count, d)


def _read(
    table: jax.Array, words: jax.Array, shape: tuple[int, ...], bits: int, count: int
) -> jax.Array:
    """What the codes of `words` name, ``[rows, A, count, ...]``.

    `table` is ``[B A E, ...]`` and `shape` ``(B, A, E)``.
    """
    blocks, books, entries = shape
    codes = packing.unpack(words, bits=bits, count=count).astype(jnp.int32)
    if 2**bits > entries:
        codes = jnp.minimum(codes, entries - 1)
    block = np.arange(count, dtype=np.int32) * blocks // count
    first = (block * books + np.arange(books, dtype=np.int32)[:, None]) * entries
    return table.at[codes + first[None]].get(mode="promise_in_bounds")


def _scaled(rows: jax.Array, weight: CodebookWeight) -> jax.Array:
    """``[M, N]`` of ``[N, M]``, times the scale."""
    if weight.scale is not None:
        rows *= weight.scale.astype(jnp.float32)[:, None]
    return rows.T
