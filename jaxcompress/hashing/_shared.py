"""`shared`: one vector of buckets for several weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.hashing._array import HashedArray
from jaxcompress.hashing._fit import bucket_means, without_buckets
from jaxcompress.hashing._hashed import root_mean_square
from jaxcompress.hashing._size import check_hashing, common_ratio, whole_runs
from jaxcompress.leaf import Leaf, OrderError
from jaxcompress.transform import Transform, as_transform, identity
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Oriented, bare, check_weights
from kernels_pallas.hashed_matmul import Hashing, places


def shared(
    *,
    ratio: float | None = None,
    bytes: float | None = None,
    key: jax.Array | None = None,
    seed: int = 0,
    block: tuple[int, int] = (1, 1),
    aligned: bool = True,
    axes: Any = None,
    rule: Any = None,
) -> Transform:
    r"""Share one vector of buckets among all the weights given to the transform.

    .. math:: w^{(m)}_{nk} = s_m\, \xi_m(n, k)\, b_{h_m(n, k)}

    Args:
      ratio: Weights, of all together, for each bucket; at least 1.
      bytes: Of the buckets, in place of `ratio`.
      key: Decides the first buckets, for training from scratch: standard normal, each
        weight with its root mean square as its scale. Without one the buckets are those
        of least squared error for all weights, and scales are one.
      seed: Of the hash; that of a weight is ``seed`` xor the CRC-32 of its key path.
      block: As for `hashed`.
      aligned: As for `hashed`.
      axes: As for `hashed`.
      rule: A number format or transform for the buckets.

    Returns:
      A transform. Its params hold the buckets once, in the leaf of the first weight,
      and a trained scale for every weight (for every layer of a stack, whose layers
      hash apart). Leaves of the view and of the stored form refer to the same buckets,
      which `stored_bytes` and files count for each of them; a stack repeats them for
      every layer, as a scan needs. For a file that holds them once, save the params,
      and take the view after loading.

    Raises:
      ValueError: As for `hashed`.
      OrderError: If another transform follows in a chain; from ``init``, if a weight is
        another kind of leaf.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = shared(ratio=8.0, key=jax.random.key(0))
      >>> params, state = scheme.init({"a": jnp.ones((16, 8)), "b": jnp.ones((8, 16))})
      >>> [a.shape for a in jax.tree.leaves(params)]
      [(32,), (), ()]
      >>> scheme.view(params, state)["b"]
      HashedArray(hashed to 32 buckets, float32[8, 16])

    References:
      Desai et al., `Efficient model compression with Random Operation Access Specific
      Tile (ROAST) hashing <https://arxiv.org/abs/2207.10702>`_, 2022, the global
      sharing of section 3. Differs: scales are trained; blocks are those of `hashed`.
    """
    by = "hashing.shared"
    hashing = Hashing(block, seed, aligned)
    check_hashing(hashing, by)
    inner = identity() if rule is None else as_transform(rule)

    def init(params: Any) -> tuple[Any, Any]:
        check_weights(params, who=by)
        flat, structure = flatten(params)
        if not any(isinstance(bare(x), HashedArray) for x in flat.values()):
            flat = _distributed(flat, ratio, bytes, key, hashing, axes, by)
        _check(flat, hashing, by)
        owned, state = inner.init({"buckets": _owner(flat).buckets})
        return unflatten(structure, _owning(flat, owned["buckets"])), state

    def run(f: Callable[[Any, Any], Any], params: Any, state: Any) -> Any:
        flat, structure = flatten(params)
        if _is_view(flat):
            return params
        buckets = f({"buckets": _owner(flat).buckets}, state)["buckets"]
        return unflatten(structure, {p: _given(x, buckets) for p, x in flat.items()})

    def update(
        params: Any, state: Any, *, grads: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        flat, structure = flatten(params)
        if grads is not None:
            grads = {"buckets": _owner(flatten(grads)[0]).buckets}
        owned = {"buckets": _owner(flat).buckets}
        owned, state = inner.update(owned, state, grads=grads, **extra)
        return unflatten(structure, _owning(flat, owned["buckets"])), state

    return Transform(
        init=init,
        view=lambda params, state: run(inner.view, params, state),
        update=update,
        compress=lambda params, state: run(inner.compress, params, state),
    )


def _with(x: Any, leaf: HashedArray) -> Any:
    return x.replace(value=leaf) if isinstance(x, Oriented) else leaf


def _owner(flat: dict[str, Any]) -> HashedArray:
    """The first weight's leaf, which holds the buckets."""
    return bare(next(iter(flat.values())))


def _owning(flat: dict[str, Any], buckets: Any) -> dict[str, Any]:
    """The leaves, the first of them with these buckets."""
    path, x = next(iter(flat.items()))
    return flat | {path: _with(x, bare(x).replace(buckets=buckets))}


def _is_view(flat: dict[str, Any]) -> bool:
    """Whether every leaf has its buckets: the same transform has been here."""
    leaves = [bare(x) for x in flat.values()]
    if len(leaves) == 1 and not leaves[0].scale.shape:
        return False
    return all(
        leaf.buckets is not None and (leaf.first is not None or not leaf.scale.shape)
        for leaf in leaves
    )


def _given(x: Any, buckets: Any) -> Any:
    """A leaf with the buckets of all, for every layer of a stack."""
    leaf = bare(x)
    stack = leaf.scale.shape
    if not stack:
        return _with(x, leaf.replace(buckets=buckets))
    spread = lambda a: jnp.broadcast_to(a, (*stack, *a.shape))
    first = jnp.asarray(_first_rows(leaf, math.prod(stack)).reshape(stack))
    return _with(x, leaf.replace(buckets=jax.tree.map(spread, buckets), first=first))


def _first_rows(leaf: HashedArray, layers: int) -> np.ndarray:
    """Row of the hash at which each layer begins, all of them at whole blocks."""
    n, bn = math.prod(leaf.sizes[:-1]), leaf.hashing.block[0]
    return np.arange(layers, dtype=np.int32) * np.int32(-(-n // bn) * bn)


def _check(flat: dict[str, Any], hashing: Hashing, who: str) -> None:
    for path, x in flat.items():
        leaf = bare(x)
        ours = isinstance(leaf, HashedArray) and leaf.scale is not None
        if not ours or leaf.hashing != _of_path(hashing, path):
            kind = leaf.method if isinstance(leaf, Leaf) else "dense"
            raise OrderError(
                f"{who}: {path!r} is {kind}, not one of the weights that share; hash "
                "first in the chain, and all of them together."
            )


def _of_path(hashing: Hashing, path: str) -> Hashing:
    """The hash of one of the weights."""
    seed = hashing.seed ^ zlib.crc32(path.encode())
    return Hashing(hashing.block, seed, hashing.aligned)


def _distributed(
    flat: dict[str, Any],
    ratio: float | None,
    bytes: float | None,
    key: jax.Array | None,
    hashing: Hashing,
    axes: Any,
    who: str,
) -> dict[str, Any]:
    """Leaves for all weights, the first with the buckets."""
    weights = {path: bare(x) for path, x in flat.items()}
    if odd := [path for path, w in weights.items() if isinstance(w, Leaf)]:
        raise OrderError(
            f"{who}: {odd[0]!r} is {weights[odd[0]].method}, whose own values hashing "
            "would replace; hash first in the chain, or leave it out of the rule."
        )
    each = common_ratio(list(weights.values()), ratio=ratio, bytes=bytes, who=who)
    leaves: dict[str, HashedArray] = {}
    for path, x in flat.items():
        roles = axes if axes is not None else getattr(x, "axes", None)
        own = _of_path(hashing, path)
        leaf = without_buckets(weights[path], roles, own, who=who, path=path)
        stack = weights[path].ndim - len(leaf.layout.order)
        scale = jnp.ones(weights[path].shape[:stack], jnp.float32)
        if key is not None:
            scale = root_mean_square(weights[path], stack)[..., 0]
        leaves[path] = leaf.replace(scale=scale)
    total = sum(w.size for w in weights.values()) / each
    narrowest, leaf = min(leaves.items(), key=lambda item: item[1].sizes[-1])
    count = whole_runs(total, leaf.sizes, hashing, who=who, path=narrowest)
    if key is None:
        buckets = _fitted(weights, leaves, count)
    else:
        buckets = jax.random.normal(key, (count,), jnp.float32)
    dtypes = {np.dtype(w.dtype) for w in weights.values()}
    buckets = buckets.astype(dtypes.pop() if len(dtypes) == 1 else jnp.float32)
    return _owning({p: _with(x, leaves[p]) for p, x in flat.items()}, buckets)


def _fitted(
    weights: dict[str, Any], leaves: dict[str, HashedArray], count: int
) -> jax.Array:
    """The buckets of least squared error for all weights together."""
    found = []
    for path, w in weights.items():
        leaf = leaves[path]
        w = leaf.layout.to_storage(w).astype(jnp.float32).reshape(-1, leaf.sizes[-1])
        layers = len(w) // math.prod(leaf.sizes[:-1])
        within = np.arange(len(w) // layers, dtype=np.int32)
        rows = jnp.asarray(_first_rows(leaf, layers)[:, None] + within).reshape(-1, 1)
        columns = jnp.arange(w.shape[-1], dtype=jnp.int32)[None]
        at, negative = places(rows, columns, leaf.hashing, buckets=count)
        found.append((jnp.where(negative, -w, w).reshape(-1), at.reshape(-1)))
    values, at = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    return jax.jit(bucket_means, static_argnames="count")(values, at, count=count)
