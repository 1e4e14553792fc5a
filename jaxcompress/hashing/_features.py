"""`hash_features`: sparse features of any number, hashed to a vector of fixed size."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.hashing import bucket, sign_seed, xxhash32


def hash_features(
    index: jax.Array,
    values: jax.Array | None = None,
    *,
    size: int,
    seed: int = 0,
) -> jax.Array:
    r"""Hash sparse features to a dense vector, with signs.

    .. math:: \phi_i = \sum_{j : h(j) = i} \xi(j)\, v_j

    Args:
      index: ``int32`` or ``uint32`` ``[..., count]`` numbers of the features that are
        there; hashes of words, say.
      values: ``float[..., count]`` of them; by default ones. Zeros count for nothing,
        so that they can pad.
      size: Entries of the result, 1 to ``2**30``. Static.
      seed: 0 to ``2**32 - 1``. Static.

    Returns:
      ``float32[..., size]``. Over hashes, the inner product of two results has the mean
      of the features' own. Feature `j` is entry ``xxh32(j, seed) mod size``, its key
      four bytes, little-endian; bit 31 of ``xxh32(j, (seed + 0x9E3779B1) mod 2**32)``
      negates it.

    Raises:
      TypeError: If `index` holds no integers of 32 bits.
      ValueError: If `size` or `seed` is out of range, or `values` are of another shape.

    Examples:
      >>> hash_features(jnp.array([7, 7, 9]), size=4).tolist()
      [-2.0, 0.0, -1.0, 0.0]

    References:
      Weinberger et al., `Feature Hashing for Large Scale Multitask Learning
      <https://arxiv.org/abs/0902.2206>`_, 2009, section 2.
    """
    who = "hash_features"
    if index.dtype not in (jnp.int32, jnp.uint32):
        raise TypeError(
            f"{who}: index must be int32 or uint32; got {index.dtype}. Convert by "
            "astype."
        )
    if not 1 <= size <= 2**30 or not 0 <= seed < 2**32:
        raise ValueError(
            f"{who}: size must be from 1 to 2**30 and seed of 32 bits; got size={size} "
            f"and seed={seed}."
        )
    if values is None:
        values = jnp.ones(index.shape, jnp.float32)
    if values.shape != index.shape:
        raise ValueError(
            f"{who}: values must be of the shape of index, {index.shape}; got "
            f"{values.shape}."
        )
    key = index.astype(jnp.uint32)
    at = bucket(xxhash32(key, seed=seed), size)
    negative = xxhash32(key, seed=sign_seed(seed)) >> 31 > 0
    signed = jnp.where(negative, -values, values).astype(jnp.float32)

    def add(at: jax.Array, signed: jax.Array) -> jax.Array:
        return jnp.zeros(size, jnp.float32).at[at].add(signed)

    for _ in index.shape[:-1]:
        add = jax.vmap(add)
    return add(at, signed)
