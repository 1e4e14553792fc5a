"""`pruning`: weights and operations of every layer, before and after."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jaxcompress import tree
from jaxcompress.leaf import materialize
from jaxcompress.lift._explain import table
from jaxcompress.prune import dependency_graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningRow:
    """One weight, before and after.

    Attributes:
      path: Key path.
      shape: Before.
      left: Shape after, or None if the weight is gone.
      weights: Entries before that are not zero.
      weights_left: Entries after that are not zero.
      flops: Multiplications and additions of the matmuls and convolutions with it, in
        one call, before.
      flops_left: The same after, of entries that are not zero: what a kernel that
        skips zeros would do.
    """

    path: str
    shape: tuple[int, ...]
    left: tuple[int, ...] | None
    weights: int
    weights_left: int
    flops: int
    flops_left: int

    @property
    def sparsity(self) -> float:
        """Fraction of the weight's non-zero entries that went."""
        return 1.0 - self.weights_left / max(self.weights, 1)


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """The result of `pruning`; prints as a table.

    Attributes:
      rows: One an array.
    """

    rows: tuple[PruningRow, ...]

    @property
    def sparsity(self) -> float:
        """Fraction of all non-zero entries that went."""
        left = sum(r.weights_left for r in self.rows)
        return 1.0 - left / max(sum(r.weights for r in self.rows), 1)

    @property
    def speedup(self) -> float:
        """Operations before, over those left."""
        left = sum(r.flops_left for r in self.rows)
        return sum(r.flops for r in self.rows) / max(left, 1)

    def __str__(self) -> str:
        """One line a weight, and the totals."""
        rows = [
            (
                r.path,
                _shape(r.shape),
                "gone" if r.left is None else _shape(r.left),
                f"{r.weights:,}",
                f"{r.weights_left:,}",
                f"{r.sparsity:.1%}",
                f"{r.flops:,}",
                f"{r.flops_left:,}",
            )
            for r in self.rows
        ]
        totals = [
            sum(getattr(r, name) for r in self.rows)
            for name in ("weights", "weights_left", "flops", "flops_left")
        ]
        a, b, c, d = (f"{n:,}" for n in totals)
        total = ("total", "", "", a, b, f"{self.sparsity:.1%}", c, d)
        header = (
            *("weight", "shape", "after", "weights", "left", "pruned"),
            *("flops", "flops left"),
        )
        return table(header, [*rows, total])


def pruning(
    fn: Callable[..., Any],
    before: Any,
    after: Any,
    *example: Any,
    fn_after: Callable[..., Any] | None = None,
) -> PruningReport:
    """What pruning took from each layer: entries, shapes and operations.

    Args:
      fn: ``fn(before, *example)``.
      before: The dense params.
      after: The pruned ones: masked or sparse leaves, arrays with zeros, or smaller
        arrays; params may be gone.
      *example: Arguments of one call; only their shapes matter.
      fn_after: Runs `after` where `fn` does not (`jaxcompress.prune.structured`).

    Raises:
      ValueError: If `after` has a path that `before` has not.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> params = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> half = jc.compress(params, {"w": jc.prune.magnitude(sparsity=0.5)})
      >>> report = pruning(lambda p, x: x @ p["w"], params, half, jnp.ones((1, 2)))
      >>> report.sparsity, report.speedup
      (0.5, 2.0)
    """
    old, new = tree.flatten(before)[0], tree.flatten(after)[0]
    if extra := sorted(new.keys() - old.keys()):
        raise ValueError(
            f"report.pruning: after has {extra[0]!r}, which before has not; pass the "
            "params that were pruned."
        )
    flops = _flops(fn, before, example)
    left = _flops(fn_after or fn, _shapes(after), example)
    return PruningReport(
        tuple(
            _row(path, w, new.get(path), flops[path], left[path])
            for path, w in old.items()
            if hasattr(w, "shape")
        )
    )


def _row(path: str, before: Any, after: Any, flops: int, flops_left: int) -> PruningRow:
    count = 0 if after is None else _nonzero(after)
    shape = None if after is None else tuple(after.shape)
    density = 0.0 if shape is None else count / max(math.prod(shape), 1)
    return PruningRow(
        path=path,
        shape=tuple(before.shape),
        left=shape,
        weights=_nonzero(before),
        weights_left=count,
        flops=flops,
        flops_left=round(flops_left * density),
    )


def _nonzero(w: Any) -> int:
    return int((materialize(w) != 0).sum())


def _shapes(params: Any) -> Any:
    flat, structure = tree.flatten(params)
    return tree.unflatten(
        structure,
        {
            path: jax.ShapeDtypeStruct(w.shape, w.dtype) if hasattr(w, "shape") else w
            for path, w in flat.items()
        },
    )


def _flops(fn: Callable[..., Any], params: Any, example: Any) -> dict[str, int]:
    """By path, the operations of the products in which a weight is an operand."""
    found: dict[str, int] = collections.defaultdict(int)
    for product in dependency_graph(fn, params, *example).products:
        for path in product.paths[:1]:
            found[path] += product.flops
    return found


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
