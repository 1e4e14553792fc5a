"""The other operand of a weight's use, as rows of channels in the weight's order."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.lift import _histogram
from jaxcompress.lift._statistics import Statistics
from jaxcompress.lift._tracked import LiftError
from jaxcompress.lift._walk import Use


def _in_weight_order(
    use: Use, contracted: tuple[int, ...], weight: tuple[int, ...]
) -> tuple[int, ...]:
    """Contracted axes of x in the order of the parameter's own contracting axes."""
    order = sorted(
        range(len(weight)), key=lambda i: use.weight.dims[weight[i]] or (-1,)
    )
    return tuple(contracted[i] for i in order)


def _dot_rows(use: Use) -> tuple[jax.Array, None]:
    """``[*batch, rows, K]``; the batch axes are the weight's stacks."""
    contract, batch = use.eqn.params["dimension_numbers"]
    i, j = use.position, 1 - use.position
    x = use.operands[j]
    contracted = _in_weight_order(use, tuple(contract[j]), tuple(contract[i]))
    order = sorted(range(len(batch[i])), key=lambda b: batch[i][b])
    batches = tuple(batch[j][b] for b in order)
    free = tuple(a for a in range(x.ndim) if a not in contracted and a not in batches)
    x = jnp.transpose(x, (*batches, *free, *contracted))
    lead = x.shape[: len(batches)]
    width = 1
    for n in x.shape[x.ndim - len(contracted) :]:
        width *= n
    return x.reshape(*lead, -1, width), None


def _conv_order(use: Use) -> tuple[tuple[int, ...], list[int]]:
    """Sizes of the window, and the order of its axes (1, 2, ...) and inputs (0) in K.

    Raises:
      LiftError: For a convolution that has no statistics.
    """
    p = use.eqn.params
    if p["batch_group_count"] != 1:
        raise LiftError(
            f"calibrate: {use.weight.path!r} is used in a convolution with "
            "batch_group_count > 1, which has no statistics; leave it out: where=..."
        )
    _, *axes = p["dimension_numbers"].rhs_spec
    order = sorted(range(len(axes)), key=lambda i: use.weight.dims[axes[i]] or (-1,))
    return tuple(use.weight.shape[a] for a in axes[1:]), order


def _conv_rows(use: Use) -> tuple[jax.Array, None]:
    """``[positions, K]`` patches, K in the weight's order; groups share statistics."""
    p = use.eqn.params
    sizes, order = _conv_order(use)
    x = use.operands[1 - use.position].astype(jnp.float32)
    x = jnp.transpose(x, p["dimension_numbers"].lhs_spec)
    patches = jax.lax.conv_general_dilated_patches(
        x,
        sizes,
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
    )  # [batch, channels * window, *positions], channels major.
    groups = p["feature_group_count"]
    width = x.shape[1] // groups
    patches = patches.reshape(x.shape[0], groups, width, *sizes, -1)
    patches = jnp.transpose(patches, (0, 1, patches.ndim - 1, *(2 + i for i in order)))
    return patches.reshape(-1, width * math.prod(sizes)), None


def conv_statistics(use: Use, histogram: bool) -> Statistics:
    """Those of `_conv_rows`, without the patches.

    Over the batch first, in one pass; then, for each place in the window, over the
    positions it meets. The histogram is of the input, each entry once.
    """
    sizes, order = _conv_order(use)
    p = use.eqn.params
    x = use.operands[1 - use.position].astype(jnp.float32)
    batch, *rest = p["dimension_numbers"].lhs_spec
    channels, groups = rest[0], p["feature_group_count"]

    def over_batch(a: jax.Array, op: Callable[..., jax.Array]) -> jax.Array:
        """``[channels, *spatial]``."""
        return jnp.transpose(op(a, axis=batch), [i - (i > batch) for i in rest])

    def over_windows(a: jax.Array, op: Callable[..., jax.Array]) -> jax.Array:
        """``[channels, *spatial]`` to ``[K]``."""
        found = [op(part, axis=tuple(range(1, a.ndim))) for part in _shifts(use, a)]
        each = jnp.stack(found, -1).reshape(groups, -1, *sizes)
        return jnp.transpose(op(each, axis=0), order).reshape(-1)

    high, low = over_batch(x, jnp.max), over_batch(x, jnp.min)
    positions = math.prod(jax.eval_shape(lambda a: _shifts(use, a)[0], high).shape[1:])
    rows = jnp.moveaxis(x, channels, -1).reshape(-1, x.shape[channels])
    return Statistics(
        count=jnp.float32(x.shape[batch] * groups * positions),
        absmax=over_windows(jnp.maximum(high, -low), jnp.max),
        total=over_windows(over_batch(x, jnp.sum), jnp.sum),
        total_square=over_windows(over_batch(jnp.square(x), jnp.sum), jnp.sum),
        low=jnp.minimum(low.min(), 0.0),
        high=jnp.maximum(high.max(), 0.0),
        counts=_histogram.histogram(rows) if histogram else None,
    )


def _shifts(use: Use, a: jax.Array) -> list[jax.Array]:
    """What each place in the window meets, of ``[channels, *spatial]``."""
    p = use.eqn.params
    pads = [
        (lo, hi, d - 1)
        for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)
    ]
    a = jax.lax.pad(a, np.float32(0), [(0, 0, 0), *pads])
    _, _, *axes = p["dimension_numbers"].rhs_spec
    sizes = [use.weight.shape[i] for i in axes]
    dilation, strides = p["rhs_dilation"], p["window_strides"]
    steps = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(a.shape[1:], sizes, dilation, strides, strict=True)
    ]
    parts = []
    for place in np.ndindex(*sizes):
        start = [i * d for i, d in zip(place, dilation, strict=True)]
        end = [
            b + (n - 1) * s + 1 for b, n, s in zip(start, steps, strides, strict=True)
        ]
        parts.append(jax.lax.slice(a, (0, *start), (a.shape[0], *end), (1, *strides)))
    return parts


def _ragged_rows(use: Use) -> tuple[jax.Array, jax.Array]:
    """``[groups, rows, K]`` with the rows of other groups left out."""
    x, sizes = use.operands[0], use.operands[2]
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0], dtype=ends.dtype)
    mine = (row[None] < ends[:, None]) & (row[None] >= (ends - sizes)[:, None])
    x = jnp.broadcast_to(x[None], (sizes.shape[0], *x.shape))
    return x, mine.astype(jnp.float32)


ROWS: dict[str, Callable[[Use], tuple[jax.Array, jax.Array | None]]] = {
    "dot_general": _dot_rows,
    "conv_general_dilated": _conv_rows,
    "ragged_dot": _ragged_rows,
    "ragged_dot_general": _ragged_rows,
}
"""``[*stack, rows, K]`` of what enters a weight, and which rows count, by operation."""
