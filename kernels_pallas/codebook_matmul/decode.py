"""From codes to codebook entries, with gradients that are sums in a fixed order."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

AT_ONCE = 2**22
"""Elements of a one-hot matrix: 16 MB of float32."""


def decode(codes: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Rows of sub-vectors, each a sum of entries.

    Args:
      codes: ``integer[N, A, S]``. A code past the last entry reads the last.
      codebooks: ``float32[B, A, E, d]``, B a divisor of S.

    Returns:
      ``float32[N, S, d]``, codebooks added in order; differentiable in them.
    """
    codes = jnp.minimum(codes.astype(jnp.int32), codebooks.shape[-2] - 1)
    parts = [lookup(codebooks[:, a], codes[:, a]) for a in range(codes.shape[1])]
    return functools.reduce(operator.add, parts)


@jax.custom_vjp
def lookup(codebooks: jax.Array, codes: jax.Array) -> jax.Array:
    """``codebooks[s B // S, codes[n, s]]``; in reverse mode, the same bits every time.

    A scatter on a GPU adds in the order in which its threads come; there the gradient
    is a product with one-hot rows instead.

    Args:
      codebooks: ``float32[B, E, d]``.
      codes: ``int32[N, S]`` below E, B a divisor of S.

    Returns:
      ``float32[N, S, d]``.
    """
    table = codebooks.reshape(-1, codebooks.shape[-1])
    places = _places(codes, codebooks.shape)
    return table.at[places].get(mode="promise_in_bounds")


def _forward(codebooks: jax.Array, codes: jax.Array) -> tuple[jax.Array, tuple]:
    return lookup(codebooks, codes), (codebooks, codes)


def _backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    codebooks, codes = residuals
    blank = jnp.zeros_like(codebooks)
    sums = jax.lax.platform_dependent(
        blank, codes, dy, cpu=_by_scatter, tpu=_by_scatter, default=_by_one_hot
    )
    return sums, None


lookup.defvjp(_forward, _backward)


def _places(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Rows of the table of all blocks."""
    blocks, entries, _ = shape
    count = codes.shape[-1]
    first = np.arange(count, dtype=np.int32) * blocks // max(count, 1) * entries
    return codes + first[None]


def _by_scatter(blank: jax.Array, codes: jax.Array, dy: jax.Array) -> jax.Array:
    """What is added to each entry, one code after the other."""
    table = blank.reshape(-1, blank.shape[-1])
    places = _places(codes, blank.shape)
    return table.at[places].add(dy, mode="promise_in_bounds").reshape(blank.shape)


def _by_one_hot(blank: jax.Array, codes: jax.Array, dy: jax.Array) -> jax.Array:
    """The same sums as products, some codes at a time."""
    blocks, entries, d = blank.shape
    rows, count = codes.shape
    # One block of codes after the other, in pieces of equal length.
    codes = codes.reshape(rows, blocks, -1).swapaxes(0, 1).reshape(blocks, -1)
    dy = dy.reshape(rows, blocks, -1, d).swapaxes(0, 1).reshape(blocks, -1, d)
    length = max(1, min(AT_ONCE // entries, rows * count // blocks))
    short = -codes.shape[1] % length
    codes = jnp.pad(codes, ((0, 0), (0, short)), constant_values=entries)
    dy = jnp.pad(dy, ((0, 0), (0, short), (0, 0)))
    pieces = codes.reshape(-1, length), dy.reshape(-1, length, d)

    def add(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        one_hot = jax.nn.one_hot(piece[0], entries, dtype=jnp.float32, axis=0)
        return jnp.matmul(one_hot, piece[1], precision="highest")

    sums = jax.lax.map(add, pieces)
    return sums.reshape(blocks, -1, entries, d).sum(1)
