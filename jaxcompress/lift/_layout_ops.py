"""Operations that move a weight without computing on it: it stays compressed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxcompress.leaf import Cast, Leaf, Reshape, Transpose
from jaxcompress.lift import _compat
from jaxcompress.lift._tracked import Tracked
from jaxcompress.lift._updates import dynamic_update_slice, leading_axes, scatter


def _transpose(eqn: Any, w: Tracked) -> Tracked:
    return w.relayout(Transpose(permutation=tuple(eqn.params["permutation"])))


def _reshape(eqn: Any, w: Tracked) -> Tracked:
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        return NotImplemented
    shape = tuple(eqn.outvars[0].aval.shape)
    moved = w.relayout(Reshape(shape=shape))
    if moved is NotImplemented and w.shape == (1, *shape):
        # What a dynamic index leaves of a stack: the one entry, of every component.
        return w.leading(lambda a: a[0], axes=1, dims=w.dims[1:])
    return moved


def _broadcast_in_dim(eqn: Any, w: Tracked, *dynamic: Any) -> Tracked:
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    added = [n for i, n in enumerate(shape) if i not in kept]
    if (
        dynamic
        or any(n != 1 for n in added)
        or tuple(shape[i] for i in kept) != w.shape
    ):
        return NotImplemented
    return w.relayout(Reshape(shape=tuple(shape)))


def _cast(eqn: Any, w: Tracked) -> Tracked:
    dtype = np.dtype(eqn.params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return NotImplemented
    return w if dtype == w.dtype else w.relayout(Cast(dtype=dtype))


def _same(eqn: Any, w: Tracked) -> Tracked:
    del eqn
    return w


def _slice(eqn: Any, w: Tracked) -> Tracked:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    window = [slice(*s) for s in zip(starts, limits, strides, strict=True)]
    axes = leading_axes(eqn.outvars[0].aval.shape, w.shape)
    return w.leading(lambda a: a[tuple(window[:axes])], axes=axes, dims=w.dims)


def _dynamic_slice(eqn: Any, w: Tracked, *starts: jax.Array) -> Tracked:
    sizes = eqn.params["slice_sizes"]
    axes = leading_axes(sizes, w.shape)

    def cut(a: jax.Array) -> jax.Array:
        rest = (jnp.zeros_like(starts[0]),) * (a.ndim - axes)
        return jax.lax.dynamic_slice(
            a, (*starts[:axes], *rest), (*sizes[:axes], *a.shape[axes:])
        )

    return w.leading(cut, axes=axes, dims=w.dims)


def _gather(eqn: Any, w: Tracked, indices: jax.Array) -> Tracked:
    """Rows of the first axis; see `rows` for the form that is understood."""
    found = rows(eqn, w)
    if found is None or len(w.shape) < 3:
        return NotImplemented
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return NotImplemented  # Out of range means NaN, which codes cannot say.
    return take_rows(w, indices)


def rows(eqn: Any, w: Tracked) -> bool | None:
    """True if a gather reads whole rows ``w[indices]`` of the first axis."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batch = eqn.outvars[0].aval.ndim - len(w.shape) + 1
    whole = (
        tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(numbers.offset_dims) == tuple(range(batch, eqn.outvars[0].aval.ndim))
        and tuple(sizes) == (1, *w.shape[1:])
    )
    return True if whole else None


def take_rows(w: Tracked, indices: jax.Array) -> Tracked:
    """``w[indices[..., 0]]``, clipped, still compressed; or ``NotImplemented``."""
    index = jnp.clip(indices[..., 0], 0, w.shape[0] - 1)
    dims = ((),) * index.ndim + w.dims[1:]
    return w.leading(lambda a: a[index], axes=1, dims=dims)


def _sharding_constraint(eqn: Any, w: Tracked) -> Tracked:
    sharding = eqn.params["sharding"]
    if not isinstance(w.value, Leaf):
        placed = jax.lax.with_sharding_constraint(w.value, sharding)
        return Tracked(value=placed, path=w.path, dims=w.dims, rank=w.rank)
    if not isinstance(sharding, NamedSharding):
        return NotImplemented
    spec = tuple(
        itertools.islice((*sharding.spec, *[None] * w.value.ndim), w.value.ndim)
    )
    try:
        specs = w.value.component_specs(spec, dict(sharding.mesh.shape))
    except ValueError:
        return NotImplemented
    value = jax.tree.map(
        lambda a, s: jax.lax.with_sharding_constraint(
            a, NamedSharding(sharding.mesh, s)
        ),
        w.value,
        specs,
    )
    return Tracked(value=value, path=w.path, dims=w.dims, rank=w.rank)


def _vary(eqn: Any, w: Tracked) -> Tracked:
    """Mark every component as varying over the manual mesh axes."""

    def vary(a: jax.Array) -> jax.Array:
        varying = _compat.varying_axes(a)
        missing = tuple(n for n in eqn.params["axes"] if n not in varying)
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    value = jax.tree.map(vary, w.value)
    return Tracked(value=value, path=w.path, dims=w.dims, rank=w.rank)


LAYOUT_OPS: dict[str, Callable[..., Tracked]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": _gather,
    "scatter": scatter,
    "sharding_constraint": _sharding_constraint,
    "pvary": _vary,
}
"""By primitive: ``(eqn, weight, *other operands) -> weight`` or NotImplemented."""
