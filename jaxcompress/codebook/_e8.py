"""The lattice E8: its nearest point, and 2**16 points of it by a table of 256."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.codebook._beam import in_chunks

DIMS = 8
_UNROLL = 4


def nearest_e8(x: jax.Array) -> jax.Array:
    r"""The point of the lattice E8 nearest to each vector.

    .. math:: E_8 = D_8 \cup (D_8 + \tfrac12), \quad
        D_8 = \{z \in \mathbb Z^8 : \textstyle\sum z_i \text{ even}\}

    Args:
      x: ``float[..., 8]``.

    Returns:
      Points of `x`'s shape and dtype; no other is nearer.

    Raises:
      ValueError: If the last axis is not of 8.

    Examples:
      >>> nearest_e8(jnp.array([0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4])).tolist()
      [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]

    References:
      Conway & Sloane, `Fast Quantizing and Decoding Algorithms for Lattice Quantizers
      and Codes <https://doi.org/10.1109/TIT.1982.1056484>`_, 1982, section V.
    """
    if x.shape[-1] != DIMS:
        raise ValueError(
            f"nearest_e8: the last axis of x must be of 8; got shape {x.shape}. Cut "
            "the weight in sub-vectors of 8."
        )
    half = jnp.asarray(0.5, x.dtype)
    whole, shifted = _nearest_d8(x), _nearest_d8(x - half) + half
    distance = lambda p: jnp.sum(jnp.square(x - p), axis=-1, keepdims=True)
    return jnp.where(distance(whole) <= distance(shifted), whole, shifted)


def _nearest_d8(x: jax.Array) -> jax.Array:
    """Round; where the sum is odd, the worst rounded goes the other way."""
    near = jnp.round(x)
    off = x - near
    worst = jnp.argmax(jnp.abs(off), axis=-1, keepdims=True)
    place = jnp.arange(DIMS, dtype=worst.dtype).reshape((1,) * (x.ndim - 1) + (DIMS,))
    one = jnp.ones_like(off)
    step = jnp.where((place == worst), jnp.where(off < 0, -one, one), 0 * one)
    odd = jnp.sum(near, axis=-1, keepdims=True) % 2 != 0
    return jnp.where(odd, near + step, near)


@functools.cache
def magnitudes() -> np.ndarray:
    """``float32[256, 8]``: magnitudes of points of ``D8 + 1/2``, the shortest first.

    The 227 of squared length at most 10, and 29 of the 56 of length 12 that have five
    entries 3/2.
    """
    levels = (0.5, 1.5, 2.5)
    every = np.array(list(itertools.product(levels, repeat=DIMS)), np.float32)
    square = np.square(every).sum(-1)
    within = every[square <= 10]
    within = within[np.argsort(np.square(within).sum(-1), kind="stable")]
    beyond = every[(square == 12) & ((every == 1.5).sum(-1) == 5)]
    return np.concatenate([within, beyond])[:256]


@functools.cache
def _odd() -> np.ndarray:
    """``bool[256]``: magnitudes whose sum is odd, which take an odd number of signs."""
    return magnitudes().sum(-1) % 2 != 0


def encode(x: jax.Array) -> jax.Array:
    """Codes of the nearest points of the codebook E8P.

    Args:
      x: ``float32[n, 8]``.

    Returns:
      ``uint16[n]``: magnitudes in bits 0 to 7, signs of all entries but the first in
      8 to 14, which of the shifts 1/4 and -1/4 in bit 15. The first sign makes the sum
      even.
    """

    def one(x: jax.Array) -> jax.Array:
        n = x.shape[0]
        xt = x.T
        both = jnp.concatenate([xt - 0.25, xt + 0.25], axis=1)
        index, error, negative = _search(both)
        shift = error[n:] < error[:n]
        index = jnp.where(shift, index[n:], index[:n])
        negative = jnp.where(shift[None], negative[:, n:], negative[:, :n])
        bits = jnp.arange(8, 15, dtype=jnp.int32)[:, None]
        signs = jnp.sum(negative[1:].astype(jnp.int32) << bits, axis=0)
        return (index | signs | (shift.astype(jnp.int32) << 15)).astype(jnp.uint16)

    return in_chunks(one, x)


def _search(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nearest points of ``D8 + 1/2`` in the table: index, error, signs ``[8, n]``."""
    a, negative = jnp.abs(y), y < 0
    odd = jnp.sum(negative.astype(jnp.int32), axis=0) % 2 == 1
    table = jnp.asarray(magnitudes()).reshape(-1, _UNROLL, DIMS)
    parity = jnp.asarray(_odd()).reshape(-1, _UNROLL)

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]):
        error, index = best
        for u in range(_UNROLL):
            t = table[i, u][:, None]
            flip = jnp.min(a * t, axis=0) * jnp.where(odd != parity[i, u], 4.0, 0.0)
            found = jnp.sum(jnp.square(a - t), axis=0) + flip
            nearer = found < error
            error = jnp.where(nearer, found, error)
            index = jnp.where(nearer, i * _UNROLL + u, index)
        return error, index

    n = y.shape[1]
    start = jnp.full(n, jnp.inf, jnp.float32), jnp.zeros(n, jnp.int32)
    error, index = jax.lax.fori_loop(0, table.shape[0], step, start)
    weakest = jnp.argmin(a * jnp.asarray(magnitudes())[index].T, axis=0)
    place = jnp.arange(DIMS, dtype=weakest.dtype)[:, None] == weakest[None]
    wrong = odd != jnp.asarray(_odd())[index]
    return index, error, negative ^ (place & wrong[None])


def decode(codes: jax.Array) -> jax.Array:
    """Points ``float32[..., 8]`` of codes ``uint16[...]``."""
    codes = codes.astype(jnp.int32)
    index = codes & 255
    bits = (
        codes[..., None]
        >> jnp.arange(8, 15, dtype=jnp.int32).reshape((1,) * codes.ndim + (7,))
    ) & 1
    first = (bits.sum(-1, dtype=jnp.int32) + jnp.asarray(_odd(), jnp.int32)[index]) % 2
    negative = jnp.concatenate([first[..., None], bits], axis=-1) == 1
    point = jnp.asarray(magnitudes())[index]
    point = jnp.where(negative, -point, point)
    shift = jnp.where(codes >> 15 == 1, -0.25, 0.25)
    return point + shift[..., None]
