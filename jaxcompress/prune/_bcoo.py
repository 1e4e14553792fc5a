"""Pruned weights as `jax.experimental.sparse` arrays, and back."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental.sparse import BCOO

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.prune._bitmask import BitmaskArray, store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._sparse import SparseLeaf


def to_bcoo(leaf: SparseLeaf | MaskedArray, *, nse: int | None = None) -> BCOO:
    """A pruned weight in the format of `jax.experimental.sparse`.

    Args:
      leaf: Stored or in training; codes become floats.
      nse: Stored elements of each stack entry; by default as many as the fullest entry
        keeps, which needs a concrete mask. Static.

    Returns:
      The array of `leaf`'s shape and dtype with its stack axes as batch axes
      (``n_batch``), all others sparse, the indices of an entry ascending and unique.
      Kept elements that are zero are stored. ``todense()`` is ``materialize()``, bit
      for bit.

    Raises:
      ValueError: If `nse` is below what an entry keeps, or not given under jit.
      TypeError: If `leaf` is no pruned weight.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = jc.prune.magnitude(sparsity=0.5)
      >>> w = jnp.array([[1.0, -4.0], [3.0, 2.0]])
      >>> sparse = to_bcoo(scheme.compress(*scheme.init({"w": w}))["w"])
      >>> sparse.data.tolist(), sparse.indices.tolist()
      ([-4.0, 3.0], [[0, 1], [1, 0]])
    """
    stack = leaf.stack if isinstance(leaf, SparseLeaf) else 0
    masked = leaf.expand() if isinstance(leaf, SparseLeaf) else leaf
    if not isinstance(masked, MaskedArray):
        raise TypeError(
            "prune.to_bcoo: leaf must be a pruned weight (BitmaskArray, NMArray, "
            f"BlockSparseArray or MaskedArray); got {type(leaf).__name__}. Of a dense "
            "array, use jax.experimental.sparse.BCOO.fromdense."
        )
    lead, core = leaf.shape[:stack], leaf.shape[stack:]
    kept = masked.mask.reshape(*lead, -1)
    nse = _stored(kept, nse)
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :nse]
    full = jnp.take_along_axis(kept, order, axis=-1)
    dense = masked.materialize().reshape(kept.shape)
    data = jnp.take_along_axis(dense, order, axis=-1)
    places = jnp.unravel_index(order, core)
    # A place outside the shape marks what fills up an entry.
    places = [
        jnp.where(full, p, n).astype(jnp.int32)
        for p, n in zip(places, core, strict=True)
    ]
    data = jnp.where(full, data, jnp.zeros_like(data))
    return BCOO(
        (data, jnp.stack(places, -1)),
        shape=leaf.shape,
        indices_sorted=True,
        unique_indices=True,
    )


def _stored(kept: jax.Array, nse: int | None) -> int:
    if isinstance(kept, Tracer):
        if nse is None:
            raise ValueError(
                "prune.to_bcoo: nse must be given where the mask is traced; got None. "
                "Call it outside jit, or give the number of elements to store."
            )
        return nse
    most = int(kept.sum(-1, dtype=jnp.int32).max(initial=0))
    if nse is not None and nse < most:
        raise ValueError(
            f"prune.to_bcoo: nse must be at least the {most} weights that are kept; "
            f"got {nse}."
        )
    return most if nse is None else nse


def from_bcoo(
    sparse: BCOO, *, axes: Axes | int | tuple[int, ...] | None = None
) -> BitmaskArray:
    """A `BitmaskArray` of an array of `jax.experimental.sparse`.

    Args:
      sparse: Its batch axes stack independent weights; no dense axes. Elements with
        equal indices add up.
      axes: Contracting axes of one weight; needed above rank 2. Static.

    Returns:
      The leaf of its shape and dtype; `to_bcoo` gives it back, sorted.

    Raises:
      ValueError: If it has dense axes, or the axes of a weight are unknown.

    Examples:
      >>> from_bcoo(BCOO.fromdense(jnp.eye(3)))
      BitmaskArray(bitmask dense, float32[3, 3])
    """
    if sparse.n_dense:
        raise ValueError(
            "prune.from_bcoo: dense axes have no place in a bitmask; got n_dense="
            f"{sparse.n_dense}. Use jax.experimental.sparse.bcoo_update_layout with "
            "n_dense=0."
        )
    stack, core = sparse.n_batch, sparse.shape[sparse.n_batch :]
    who = "prune.from_bcoo"
    contract = axes.contract if isinstance(axes, Axes) else axes
    if isinstance(contract, tuple) or contract is None:
        stated = None if contract is None else Axes(contract=contract)
    else:
        stated = Axes(contract=(contract,))
    known = resolve_axes(core, stated, who=who, path="sparse")
    values, kept = _scatter(sparse, core)
    masked = MaskedArray(inner=values, mask=kept)
    roles = Axes(contract=known.contract, stack=stack)
    return store(masked, Layout.of(sparse.shape, roles))


def _scatter(sparse: BCOO, core: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Dense values, and where an element is stored."""
    lead = sparse.shape[: sparse.n_batch]
    data = jnp.broadcast_to(sparse.data, (*lead, sparse.nse))
    where = jnp.broadcast_to(sparse.indices, (*lead, sparse.nse, len(core)))

    def one(data: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = tuple(jnp.moveaxis(where, -1, 0))
        values = jnp.zeros(core, data.dtype).at[at].add(data, mode="drop")
        return values, jnp.zeros(core, bool).at[at].set(True, mode="drop")

    values, kept = jax.vmap(one)(
        data.reshape(math.prod(lead), sparse.nse),
        where.reshape(math.prod(lead), sparse.nse, len(core)),
    )
    return values.reshape(sparse.shape), kept.reshape(sparse.shape)
