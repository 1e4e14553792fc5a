"""`hashed` and `hash_params`: weights that share values by hashing, to be trained."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.hashing._array import HashedArray
from jaxcompress.hashing._fit import nearest, without_buckets
from jaxcompress.hashing._size import bucket_count, check_hashing, common_ratio
from jaxcompress.leaf import Leaf, OrderError
from jaxcompress.transform import Transform, identity, select
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Site, bare, check_weights, leaf_key, map_values, values
from kernels_pallas.hashed_matmul import Hashing


def hashed(
    *,
    ratio: float | None = None,
    bytes: float | None = None,
    key: jax.Array | None = None,
    seed: int = 0,
    block: tuple[int, int] = (1, 1),
    aligned: bool = True,
    linear: bool = False,
    axes: Any = None,
) -> Transform:
    r"""Share the values of each weight by hashing, and train what is shared.

    .. math:: w_{nk} = \xi(n, k)\, b_{h(n, k)}

    Args:
      ratio: Weights for each bucket, at least 1.
      bytes: Of the buckets of all weights given to the transform together, in place of
        `ratio`; a weight's share is in proportion to its size.
      key: Decides the first buckets, for training from scratch: normal, with the mean
        square of the weight they replace. Without one they are fitted to the weight
        (`fit_hashed`).
      seed: Of the hash: 0 to ``2**32 - 1``.
      block: Outputs and inputs that are hashed together, to a run of consecutive
        buckets: ``(1, 1)`` is HashedNets, ``(1, Z)`` with ``aligned=False`` ROBE-Z.
      aligned: Whether runs begin at multiples of the block's inputs, which is faster,
        or anywhere.
      linear: Hash so that `grow` can add buckets one by one.
      axes: Contracting axes, or `Axes`; needed above rank 2 where no function was
        traced. Of an embedding table ``[vocabulary, width]``, -1.

    Returns:
      A transform whose ``init`` replaces each weight by a `HashedArray`; what is
      trained is what is stored. A weight that is one already is kept. Later transforms
      in a chain act on the buckets.

    Raises:
      ValueError: If an option is out of range; from ``init``: if a weight is not finite
        or its axes are unknown, or if `bytes` exceed the weights'.
      OrderError: From ``init``, if a weight is another kind of leaf.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = hashed(ratio=8.0, key=jax.random.key(0))
      >>> params, state = scheme.init({"w": jnp.ones((64, 32))})
      >>> params["w"]
      HashedArray(hashed to 256 buckets, float32[64, 32])
      >>> jc.lift(lambda p, x: x @ p["w"])(params, jnp.ones((2, 64))).shape
      (2, 32)

    References:
      Chen et al., `Compressing Neural Networks with the Hashing Trick
      <https://arxiv.org/abs/1504.04788>`_, 2015, eq. 3 and 7. Desai et al., `Random
      Offset Block Embedding Array (ROBE) <https://arxiv.org/abs/2108.02191>`_, 2022.
      Differs: a run ends with its row.
    """
    by = "hashing.hashed"
    hashing = Hashing(block, seed, aligned, linear)
    check_hashing(hashing, by)

    def share(w: jax.Array, site: Site, ratio: float) -> HashedArray:
        roles = axes if axes is not None else site.axes
        leaf = without_buckets(w, roles, hashing, who=by, path=site.path)
        count = bucket_count(leaf.sizes, ratio, hashing, who=by, path=site.path)
        if key is None:
            buckets = nearest(w, None, leaf.layout, hashing, count)
        else:
            stack = w.ndim - len(leaf.layout.order)
            shape = (*w.shape[:stack], count)
            drawn = jax.random.normal(leaf_key(key, site), shape, jnp.float32)
            buckets = (drawn * root_mean_square(w, stack)).astype(w.dtype)
        return leaf.replace(buckets=buckets)

    def init(params: Any) -> tuple[Any, tuple[()]]:
        check_weights(params, who=by)
        flat, structure = flatten(params)
        fresh = without_hashed(flat, hashing, by)
        if not fresh:
            return params, ()
        weights = [w for leaf in fresh.values() for w in values(leaf)]
        each = common_ratio(weights, ratio=ratio, bytes=bytes, who=by)
        shared = map_values(lambda w, site: share(w, site, each), fresh, by=by)
        return unflatten(structure, flat | shared), ()

    return identity()._replace(init=init)


def hash_params(
    params: Any,
    rules: Any = "**/kernel",
    *,
    ratio: float | None = None,
    bytes: float | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Replace weights of a tree by `HashedArray`, as `hashed` does.

    Args:
      params: Any pytree.
      rules: Which weights: a glob pattern, `where(...)` or a predicate.
      ratio: As for `hashed`.
      bytes: As for `hashed`.
      key: As for `hashed`: for training from scratch; without one, buckets are fitted.
      **options: Others of `hashed`.

    Returns:
      The tree; other leaves are the same objects.

    Raises:
      ValueError: As for `hashed`; if `rules` match nothing.

    Examples:
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
      >>> hash_params(params, ratio=8.0)["dense"]["kernel"]
      HashedArray(hashed to 256 buckets, float32[64, 32])
    """
    scheme = hashed(ratio=ratio, bytes=bytes, key=key, **options)
    return select({rules: scheme}).init(params)[0]


def root_mean_square(w: jax.Array, stack: int) -> jax.Array:
    """``float32[*stack, 1]``."""
    squares = jnp.square(w.astype(jnp.float32))
    mean = squares.mean(range(stack, w.ndim), dtype=jnp.float32)
    return jnp.sqrt(mean)[..., None]


def without_hashed(flat: dict[str, Any], hashing: Hashing, who: str) -> dict[str, Any]:
    """The weights that are still dense: an optimizer's `attach` calls `init` again.

    Raises:
      OrderError: If a weight is another kind of leaf, or hashed otherwise.
    """
    fresh = {}
    for path, x in flat.items():
        leaf = bare(x)
        if not isinstance(leaf, Leaf):
            fresh[path] = x
        elif not isinstance(leaf, HashedArray) or leaf.hashing != hashing:
            raise OrderError(
                f"{who}: {path!r} is {leaf.method}, whose own values hashing would "
                "replace; hash first in the chain, or leave it out of the rule."
            )
    return fresh
