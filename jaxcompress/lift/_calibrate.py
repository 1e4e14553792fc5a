"""Statistics of what enters each weight's matmul, in one jitted pass a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.lift._trace import Tracer, refuse_closures
from jaxcompress.lift._tracked import LiftError, Tracked, track
from jaxcompress.lift._walk import Taps, Use, Walker


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Sums over the rows that entered a weight's matmul; mergeable.

    The channels are the weight's contracting axes flattened, in the order of its
    `Axes.contract`; scanned layers and experts stack in front. All float32.

    Attributes:
      count: ``[*stack]`` rows seen.
      absmax: ``[*stack, K]`` largest magnitude of each channel.
      total: ``[*stack, K]`` sum.
      total_square: ``[*stack, K]`` sum of squares.
      gram: ``[*stack, K, K]`` sum of ``x x^T``, or None.
    """

    count: jax.Array
    absmax: jax.Array
    total: jax.Array
    total_square: jax.Array
    gram: jax.Array | None = None

    @property
    def mean(self) -> jax.Array:
        """Mean of each channel; zero where no row was seen."""
        return self.total / jnp.maximum(self.count, 1.0)[..., None]

    @property
    def second_moment(self) -> jax.Array:
        """Mean square of each channel; zero where no row was seen."""
        return self.total_square / jnp.maximum(self.count, 1.0)[..., None]

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of rows; the shapes must be equal."""
        gram = None
        if self.gram is not None and other.gram is not None:
            gram = self.gram + other.gram
        return Statistics(
            count=self.count + other.count,
            absmax=jnp.maximum(self.absmax, other.absmax),
            total=self.total + other.total,
            total_square=self.total_square + other.total_square,
            gram=gram,
        )

    def fold(self) -> Statistics:
        """Merge along the first stack axis."""
        return Statistics(
            count=self.count.sum(0),
            absmax=self.absmax.max(0),
            total=self.total.sum(0),
            total_square=self.total_square.sum(0),
            gram=None if self.gram is None else self.gram.sum(0),
        )


def statistics(
    x: jax.Array, *, weights: jax.Array | None = None, gram: bool = False
) -> Statistics:
    """Statistics of the rows of `x`.

    Args:
      x: ``float[*stack, rows, K]``.
      weights: ``[*stack, rows]`` of 0 and 1: rows to leave out are 0.
      gram: Also ``X^T X``.
    """
    x = x.astype(jnp.float32)
    if weights is None:
        weights = jnp.ones(x.shape[:-1], jnp.float32)
    x = x * weights[..., None]
    return Statistics(
        count=weights.sum(-1),
        absmax=jnp.abs(x).max(-2, initial=0.0),
        total=x.sum(-2),
        total_square=jnp.square(x).sum(-2),
        gram=jnp.matmul(jnp.matrix_transpose(x), x, precision="highest")
        if gram
        else None,
    )


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    gram: bool = False,
    where: Any = "**",
) -> dict[str, Statistics]:
    """Statistics of the inputs of every matmul, convolution and ragged dot.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called, in one jitted pass a batch.
        Sharded inputs stay sharded.
      params: Parameter pytree, compressed or not.
      batches: Example inputs: tuples of arguments, or single arguments.
      gram: Also collect ``X^T X`` (K^2 floats a weight).
      where: Rule for the weights to watch.

    Returns:
      By key path, for each watched weight that is used in a matmul, the `Statistics`
      of the rows that entered it, stacked over scanned layers and experts.

    Raises:
      ValueError: If there are no batches, or `where` matches no weight.
      LiftError: If a watched weight is used in a while loop or in shard_map, or was
        closed over.

    Examples:
      >>> stats = calibrate(lambda p, x: x @ p["w"], {"w": jnp.eye(2)},
      ...                   [jnp.array([[1.0, -2.0], [3.0, 0.0]])])
      >>> stats["w"].absmax.tolist(), stats["w"].mean.tolist()
      ([3.0, 2.0], [2.0, -1.0])
    """
    watched = frozenset(tree.choose({where: True}, params, who="calibrate"))
    tracer = Tracer(fn, who="calibrate")

    @jax.jit
    def collect(params: Any, batch: tuple[Any, ...]) -> Taps:
        walker = Walker(
            visit=lambda use: _tap(use, watched, gram),
            merge=Statistics.merge,
            fold=Statistics.fold,
            inline=True,
            custom_vjp="inline",
        )
        return walker.run(trace.jaxpr, dynamic(params, batch))[1]

    def dynamic(params: Any, batch: tuple[Any, ...]) -> list[Any]:
        return tracer.signature((track(params, arrays=True), *batch), {})[1]

    def check(trace: Any) -> Any:
        refuse_closures(trace, operands, who="calibrate")
        return trace

    result: Taps | None = None
    for number, item in enumerate(batches):
        batch = item if isinstance(item, tuple) else (item,)
        signature, operands = tracer.signature((track(params, arrays=True), *batch), {})
        trace = tracer(signature, check)
        taps = collect(params, batch)
        result = taps if result is None else _merge_batches(result, taps, number)
    if result is None:
        raise ValueError("calibrate: batches is empty; pass at least one batch.")
    return dict(sorted(result.items()))


def _merge_batches(result: Taps, taps: Taps, number: int) -> Taps:
    for path in result.keys() & taps.keys():
        if result[path].absmax.shape != taps[path].absmax.shape:
            raise ValueError(
                f"calibrate: batch {number} gives {path!r} statistics of shape "
                f"{taps[path].absmax.shape}, earlier ones {result[path].absmax.shape}; "
                "a weight must be used the same way in every batch."
            )
    merged = {p: result[p].merge(taps[p]) for p in result.keys() & taps.keys()}
    return {**result, **taps, **merged}


def _tap(use: Use, watched: frozenset[str], gram: bool) -> tuple[Tracked, Taps]:
    """Statistics of the other operand, for the operations that contract a weight."""
    rows = ROWS.get(use.op)
    paths = watched.intersection(use.weight.paths)
    if rows is None or not paths:
        return use.weight, {}
    x, weights = rows(use)
    stats = statistics(x, weights=weights, gram=gram)
    return use.weight, dict.fromkeys(paths, stats)


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


def _conv_rows(use: Use) -> tuple[jax.Array, None]:
    """``[positions, K]`` patches, K in the weight's order; groups share statistics."""
    p = use.eqn.params
    if p["batch_group_count"] != 1:
        raise LiftError(
            f"calibrate: {use.weight.path!r} is used in a convolution with "
            "batch_group_count > 1, which has no statistics; leave it out: where=..."
        )
    numbers = p["dimension_numbers"]
    x = use.operands[1 - use.position]
    groups = p["feature_group_count"]
    _, in_axis, *spatial = numbers.rhs_spec
    sizes = [use.weight.shape[a] for a in spatial]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec).astype(jnp.float32),
        sizes,
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
    )  # [batch, channels * window, *positions], channels major.
    width = use.weight.shape[in_axis]
    patches = patches.reshape(patches.shape[0], groups, width, *sizes, -1)
    axes = {in_axis: 2, **{a: 3 + i for i, a in enumerate(spatial)}}
    order = sorted(axes, key=lambda a: use.weight.dims[a] or (-1,))
    patches = jnp.transpose(
        patches, (0, 1, patches.ndim - 1, *(axes[a] for a in order))
    )
    k = width
    for n in sizes:
        k *= n
    return patches.reshape(-1, k), None


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
