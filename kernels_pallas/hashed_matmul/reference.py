"""``x @ dequantize(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.hashing import place, row_state

Origin = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Hashing:
    """Which bucket a weight is.

    The weights of an aligned block of ``bn`` outputs and ``bk`` inputs are, row by
    row, consecutive buckets from a place that the block's hash names; past the last
    bucket comes the first. All have the block's sign. With ``key`` the eight bytes of
    ``n // bn`` and ``k // bk``, each as a little-endian uint32, and ``sign`` bit 31 of
    ``xxh32(key, seed + 0x9E3779B1 mod 2**32)``:

    ``w[n, k] = +-t[(h mod R + n mod bn) mod R, k mod bk]``
    ``h = xxh32(key, seed)``, ``t = buckets.reshape(R, bk)``

    or, where runs are not aligned, with ``B`` buckets,

    ``w[n, k] = +-buckets[(h mod B + (n mod bn) bk + k mod bk) mod B]``

    Attributes:
      block: ``(bn, bk)``; ``(1, 1)`` hashes each weight apart.
      seed: Of the hash.
      aligned: Whether runs begin at multiples of ``bk``, or anywhere.
      linear: Whether ``h mod R`` is by `kernels_pallas.hashing.bucket`'s table that
        grows.
    """

    block: tuple[int, int] = (1, 1)
    seed: int = 0
    aligned: bool = True
    linear: bool = False

    def starts(self, buckets: int) -> int:
        """Places where a run may begin."""
        return buckets // self.block[1] if self.aligned else buckets


def places(
    rows: jax.Array, columns: jax.Array, hashing: Hashing, *, buckets: int
) -> tuple[jax.Array, jax.Array]:
    """Bucket and sign of every weight.

    Args:
      rows: ``int32[...]`` outputs of the whole weight.
      columns: ``int32[...]`` inputs; they broadcast.
      hashing: Which bucket a weight is. Static.
      buckets: How many. Static.

    Returns:
      ``int32[...]`` and ``bool[...]``: whether the bucket's value is negated.
    """
    (bn, bk), count = hashing.block, hashing.starts(buckets)
    state = row_state((rows // bn).astype(jnp.uint32), seed=hashing.seed)
    block = (columns // bk).astype(jnp.uint32)
    first, negative = place(state, block, count=count, linear=hashing.linear)
    if not hashing.aligned:
        return (first + rows % bn * bk + columns % bk) % count, negative
    line = first if bn == 1 else (first + rows % bn) % count
    return line if bk == 1 else line * bk + columns % bk, negative


def dequantize(
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    k: int,
    origin: Origin = (0, 0),
) -> jax.Array:
    """The dense weight.

    Args:
      buckets: ``float[B]``.
      hashing: Which bucket a weight is.
      n: Outputs.
      k: Inputs.
      origin: Where in the whole weight this part of it begins, ``(output, input)``.

    Returns:
      ``float32[N, K]``.
    """
    span = lambda start, size: jnp.asarray(start, jnp.int32) + jnp.arange(size)
    rows, columns = span(origin[0], n)[:, None], span(origin[1], k)[None]
    at, negative = places(rows, columns, hashing, buckets=len(buckets))
    values = buckets.astype(jnp.float32)[at]
    return jnp.where(negative, -values, values)


def hashed_matmul(
    x: jax.Array,
    buckets: jax.Array,
    hashing: Hashing,
    *,
    n: int,
    origin: Origin = (0, 0),
) -> jax.Array:
    """Look every weight up, then multiply in float32.

    Args:
      x: ``float[M, K]``.
      buckets: ``float[B]``.
      hashing: Which bucket a weight is.
      n: Outputs.
      origin: As for `dequantize`.

    Returns:
      ``float32[M, N]``.
    """
    w = dequantize(buckets, hashing, n=n, k=x.shape[-1], origin=origin)
    return jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
