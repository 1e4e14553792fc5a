"""`grow`: more buckets for a weight in training, one split at a time."""

from __future__ import annotations

import numpy as np

from jaxcompress.hashing._array import HashedArray
from jaxcompress.leaf import Leaf
from kernels_pallas.hashing import MOST


def grow(leaf: HashedArray, buckets: int) -> HashedArray:
    r"""Add buckets to a hashed weight, whose values stay what they are.

    With :math:`2^L \le B < 2^{L+1}` buckets, a place with hash `h` is in bucket
    :math:`h \bmod 2^{L+1}` if there is one, else in :math:`h \bmod 2^L`. So bucket `B`
    takes over some places of bucket :math:`B - 2^L` alone, and begins with its value.

    Args:
      leaf: Hashed with ``linear=True``, its buckets an array.
      buckets: How many it shall have. Static.

    Returns:
      The same weight, bit for bit, with buckets that can be trained apart. What an
      optimizer holds for the buckets grows in the same way: `grow` takes a leaf that
      holds moments in their place.

    Raises:
      ValueError: If the hash is not one that grows, there are more buckets already, or
        they are quantized or pruned.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> w = {"w": jnp.ones((8, 8))}
      >>> leaf = jc.hashing.hash_params(w, "w", ratio=16.0, linear=True)["w"]
      >>> grow(leaf, 6)
      HashedArray(hashed to 6 buckets, float32[8, 8])

    References:
      Litwin, Linear hashing: a new tool for file and table addressing, VLDB 1980.
    """
    if not leaf.hashing.linear:
        raise ValueError(
            f"grow: {leaf.method} is by a hash that cannot grow; make it with "
            "linear=True."
        )
    if isinstance(leaf.buckets, Leaf) or leaf.scale is not None:
        raise ValueError(
            f"grow: buckets must be an array of the weight's own; got {leaf.method}. "
            "Grow it before its buckets are pruned or quantized."
        )
    before = leaf.buckets.shape[-1]
    if not before <= buckets <= MOST:
        raise ValueError(
            f"grow: buckets must be from {before} to {MOST}; got {buckets}. Buckets "
            "cannot be taken away."
        )
    origin = np.arange(buckets)
    while (late := origin >= before).any():
        top = 2 ** np.floor(np.log2(np.maximum(origin, 1))).astype(np.int64)
        origin = np.where(late, origin - top, origin)
    return leaf.replace(buckets=leaf.buckets[..., origin])
