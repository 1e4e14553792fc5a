"""A weight made ready for the algorithms that weigh errors by a second moment.

They work on one weight at a time as ``[K, R]``, its contracting axes flattened by its
output axes flattened, so that all outputs of one input are consecutive in memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import mean_gram
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import static_range
from jaxcompress.quant._granularity import PerChannel
from jaxcompress.quant._quantize import Grid
from jaxcompress.quant._scales import Scales, compute_scales, stored_scale
from jaxcompress.quant._steps import Problem, Steps


class Laid(NamedTuple):
    """A weight made ready: its problem, and the arrays of every stack entry.

    Attributes:
      grid: The format laid over the weight.
      problem: What all entries have in common.
      w: ``float32[S, K, R]``.
      steps: Scales ``[S, groups, blocks]`` of blocks that are not searched, or None.
      tensor: ``float32[S]`` scales of the tensor; of two-level scales.
      gram: ``float32[S, K, K]`` mean of ``x x^T``; zero without data.
      activations: Scale and zero point of static activations, or None each.
    """

    grid: Grid
    problem: Problem
    w: jax.Array
    steps: Steps | None
    tensor: jax.Array
    gram: jax.Array
    activations: tuple[jax.Array | None, jax.Array | None]


def lay(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Axes | int | tuple[int, ...] | None,
    path: str,
    candidates: int,
    who: str,
) -> Laid:
    """Check a weight and its statistics, and bring them to ``[S, K, R]``.

    Raises:
      ValueError: As `quantize` does; or if the statistics are not of this weight, or
        an option is out of range.
    """
    if fmt.rounding != "nearest":
        raise ValueError(
            f"{who}: the algorithm chooses the codes, so rounding must be 'nearest'; "
            f"got {fmt.rounding!r} for {path!r}."
        )
    if candidates < 1:
        raise ValueError(f"{who}: candidates must be positive; got {candidates}.")
    activations = (None, None)
    if fmt.activations is not None and fmt.activations.static:
        if stats is None:
            raise ValueError(
                f"{who}: static activations of {path!r} need statistics for their "
                "scale; pass stats, or use dynamic activations."
            )
        activations = static_range(stats, fmt.activations)
    grid = Grid.of(w, fmt.replace(search=None), axes=axes, path=path, check=True)
    flat, layout = grid.blocks.flat, grid.blocks.layout
    stack = flat.shape[: flat.stack]
    counts = list(grid.blocks.counts)
    groups = counts.pop(flat.position)
    kept = fmt.granularity.axes if isinstance(fmt.granularity, PerChannel) else None
    problem = Problem(
        fmt=grid.fmt,
        out=tuple(flat.shape[a] for a in layout.out),
        out_blocks=tuple(counts[flat.stack :]),
        groups=groups,
        tied=kept is not None and bool(set(kept) & set(layout.contract)),
        candidates=candidates,
    )
    entries = math.prod(stack)
    a = grid.flatten(w)
    scales = None
    if problem.tied or fmt.scale == "nvfp4":
        scales = compute_scales(a, grid.blocks, flat.stack, grid.fmt)
    storage = layout.to_storage(jnp.asarray(w).astype(jnp.float32))
    columns = storage.reshape(entries, math.prod(problem.out), flat.k)

    def steps_of(a: jax.Array) -> jax.Array:
        return jnp.swapaxes(flat.to_storage(a).reshape(entries, -1, groups), -1, -2)

    tensor = jnp.ones(entries, jnp.float32)
    steps = None
    if scales is not None:
        tensor = tensor if scales.tensor is None else scales.tensor.reshape(entries)
        steps = jax.tree.map(steps_of, Steps(scales.value, scales.zero))
    return Laid(
        grid=grid,
        problem=problem,
        w=jnp.swapaxes(columns, -1, -2),
        steps=steps if problem.tied else None,
        tensor=tensor,
        gram=mean_gram(stats, stack, flat.k, who=who, path=path),
        activations=activations,
    )


def finish(laid: Laid, codes: jax.Array, steps: Steps) -> QuantizedArray:
    """The leaf of codes ``uint8[S, K, R]`` and scales ``[S, groups, blocks]``."""
    grid, problem = laid.grid, laid.problem
    flat, layout = grid.blocks.flat, grid.blocks.layout
    stack = flat.shape[: flat.stack]

    def in_storage(a: jax.Array, out: tuple[int, ...]) -> jax.Array:
        return jnp.swapaxes(a, -1, -2).reshape(*stack, *out, a.shape[-2])

    def in_flat(a: jax.Array) -> jax.Array:
        return flat.from_storage(in_storage(a, problem.out_blocks))

    ones = (1,) * (len(problem.out) + 1)
    tensor = laid.tensor.reshape(*stack, *ones)
    value = in_flat(steps.scale)
    scales = Scales(
        stored=stored_scale(value, problem.fmt.scale, tensor),
        value=value,
        zero=None if steps.zero is None else in_flat(steps.zero),
        tensor=tensor if problem.fmt.scale == "nvfp4" else None,
    )
    words = layout.from_storage(in_storage(codes, problem.out))
    return grid.leaf(words, scales, *laid.activations).pack()
