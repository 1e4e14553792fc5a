"""`allocate`: one budget of bytes, divided among weights by their singular values."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics
from jaxcompress.lowrank._matrix import Matrix
from jaxcompress.lowrank._rank import Size
from jaxcompress.lowrank._whitened import output_values
from jaxcompress.tree import Rule, choose, flatten

Step = tuple[float, int, int]
"""What a step saves of the error, its bytes, and the rank it leads to; 0 is dense."""


def allocate(
    params: Any,
    where: Rule,
    *,
    ratio: float | None = None,
    size_bytes: int | None = None,
    stats: Mapping[str, Statistics] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> dict[str, int]:
    r"""Find the ranks of several weights that together fit a budget.

    The sum of the weights' relative squared errors, :math:`\sum_l \sum_{i>r_l}
    \sigma_{l,i}^2 / \sum_i \sigma_{l,i}^2`, is lowered step by step where a byte saves
    most. A weight of which no more ranks are smaller than the dense form goes back to
    dense in one last step, if the budget has room.

    Args:
      params: Parameter pytree.
      where: Rule that chooses the weights.
      ratio: Bytes of all chosen weights, relative to their dense bytes; or
      size_bytes: in bytes.
      stats: By path, as `calibrate` gives with ``gram=True``: errors are then of the
        outputs, each weight's inputs those of the float model.
      axes: Roles of the axes by path, as `trace_axes` gives.

    Returns:
      The rank of every weight that is factored, by path: for ``rules=`` of `whitened`
      and ``rank=`` of `svd`. Weights that stay dense are not in it. The total is at
      most the budget.

    Raises:
      ValueError: If neither or both budgets are given, the rule matches nothing, or the
        budget is below rank 1 of all.

    Examples:
      >>> import jax.numpy as jnp
      >>> flat, steep = jnp.eye(8), jnp.diag(2.0 ** -jnp.arange(8.0))
      >>> # In the first all directions count alike; it stays dense.
      >>> allocate({"flat": flat, "steep": steep}, "*", ratio=0.75)
      {'steep': 2}

    References:
      Fox, `Discrete Optimization via Marginal Analysis
      <https://doi.org/10.1287/mnsc.13.3.210>`_, 1966 (greedy steps of falling worth are
      optimal, but for the room that the last leaves).
    """
    who = "lowrank.allocate"
    flat, _ = flatten(params)
    paths = choose({where: True}, params, who=who)
    sizes: dict[str, Size] = {}
    steps: dict[str, list[Step]] = {}
    for path in paths:
        known = (axes or {}).get(path)
        sizes[path] = Matrix.of(flat[path], known, path=path, who=who).size
        seen = None if stats is None else stats.get(path)
        values = output_values(flat[path], seen, axes=known, path=path)
        steps[path] = list(_steps(sizes[path], np.asarray(values, np.float64)))
    dense = sum(size.dense_bytes for size in sizes.values())
    budget = _budget(ratio, size_bytes, dense, who)
    room = budget - sum(each[0][1] for each in steps.values())
    if room < 0:
        raise ValueError(
            f"{who}: the budget must hold rank 1 of all weights, {budget - room} "
            f"bytes; got {budget}. Raise it, or choose fewer weights."
        )
    ranks = {path: each[0][2] for path, each in steps.items()}
    heap = [(-_worth(each[1]), p, 1) for p, each in steps.items() if len(each) > 1]
    heapq.heapify(heap)
    while heap:
        _, path, n = heapq.heappop(heap)
        _, cost, rank = steps[path][n]
        if cost > room:
            continue  # Others may still fit; this weight's next steps come after it.
        room -= cost
        ranks[path] = rank
        if n + 1 < len(steps[path]):
            heapq.heappush(heap, (-_worth(steps[path][n + 1]), path, n + 1))
    return {path: rank for path, rank in ranks.items() if rank}


def _worth(step: Step) -> float:
    """Error saved a byte."""
    return step[0] / max(step[1], 1)


def _steps(size: Size, values: np.ndarray) -> Iterator[Step]:
    """Rank by rank, as long as something is saved; then dense."""
    gains = np.square(values).reshape(-1, values.shape[-1]).sum(0)
    gains = gains / max(gains.sum(), 1e-300)
    last = max(size.even, 1)
    useful = max(int((gains[:last] > 1e-12).sum()), 1)
    for i in range(useful):
        yield float(gains[i]), size.bytes_per_rank, i + 1
    rest = float(gains[useful:].sum())
    if useful == last and rest > 1e-12:
        yield rest, size.dense_bytes - useful * size.bytes_per_rank, 0


def _budget(ratio: float | None, size_bytes: int | None, dense: int, who: str) -> int:
    if (ratio is None) == (size_bytes is None):
        raise ValueError(
            f"{who}: give ratio or size_bytes, one of them; got {ratio} and "
            f"{size_bytes}."
        )
    if size_bytes is not None:
        return size_bytes
    assert ratio is not None
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"{who}: ratio must be above 0 and at most 1; got {ratio}.")
    return int(ratio * dense)
