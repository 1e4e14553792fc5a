"""``x @ dequantize(w).T`` in plain `jax.numpy`: what every kernel must agree with."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.hashing import bucket, murmur3, negative

Origin = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


@dataclasses.dataclass(frozen=True)
class Hashing:
    """Which bucket a weight is.

    The weights of an aligned block of ``bn`` outputs and ``bk`` inputs are, row by
    row, consecutive buckets from a place that the block's hash names; past the last
    bucket comes the first. Runs begin at multiples of ``bk``. Bit 31 of the hash is
    the block's sign.

    ``w[n, k] = +-t[(h mod R + n mod bn) mod R, k mod bk]``
    ``h = murmur3(n // bn, k // bk; seed)``, ``t = buckets.reshape(R, bk)``

    Attributes:
      block: ``(bn, bk)``; ``(1, 1)`` hashes each weight apart.
      seed: Of the hash.
    """

    block: tuple[int, int] = (1, 1)
    seed: int = 0

    def rows(self, buckets: int) -> int:
        """R, the places where a run may begin."""
        return buckets // self.block[1]


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
    (bn, bk), count = hashing.block, hashing.rows(len(buckets))
    at = lambda start, size: jnp.asarray(start, jnp.int32) + jnp.arange(size)
    rows, columns = at(origin[0], n)[:, None], at(origin[1], k)[None]
    block = (rows // bn).astype(jnp.uint32), (columns // bk).astype(jnp.uint32)
    h = murmur3(*block, seed=hashing.seed)
    line = (bucket(h, count) + rows % bn) % count
    values = buckets.astype(jnp.float32)[line * bk + columns % bk]
    return jnp.where(negative(h), -values, values)


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
