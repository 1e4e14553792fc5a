"""The loops behind searched ranges.

They know no number format: they are given functions of the ranges of all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.quant._ranges import HQQ, MSE


class Ends(NamedTuple):
    """One number for each end of the range of each block.

    Attributes:
      high: For the upper end; of a symmetric format, for both.
      low: For the lower end, or None.
    """

    high: jax.Array
    low: jax.Array | None = None

    def where(self, condition: jax.Array, other: Ends) -> Ends:
        """These ends where the condition holds, elsewhere the others."""
        return jax.tree.map(lambda a, b: jnp.where(condition, a, b), self, other)


def ratios(search: MSE, *, powers_of_two: bool) -> np.ndarray:
    """Ratios to try beside one."""
    if powers_of_two:
        lowest = math.floor(math.log2(search.shrink))
        return np.array([2.0, *(2.0**-i for i in range(1, 1 - lowest))], np.float32)
    return np.linspace(1.0, search.shrink, search.steps + 1)[1:].astype(np.float32)


def least_error(
    error: Callable[[Ends], jax.Array], ones: Ends, tried: np.ndarray
) -> Ends:
    """Ratios of least error for each block.

    Args:
      error: Of each block, from ratios of its range.
      ones: The ratios of the full range, which wins ties.
      tried: Other ratios.
    """
    table, n = jnp.asarray(tried), len(tried)

    def step(i: jax.Array, carry: tuple[jax.Array, Ends]) -> tuple[jax.Array, Ends]:
        least, best = carry
        r = jnp.broadcast_to(table[i % n], best.high.shape)
        trial = Ends(r)
        if best.low is not None:  # Both ends; then the lower; then the upper.
            trial = Ends(
                high=jnp.where(i // n == 1, best.high, r),
                low=jnp.where(i // n == 2, best.low, r),
            )
        e = error(trial)
        return jnp.minimum(e, least), trial.where(e < least, best)

    rounds = 1 if ones.low is None else 3
    return jax.lax.fori_loop(0, rounds * n, step, (error(ones), ones))[1]


def shrink_error(x: jax.Array, beta: jax.Array, norm: float) -> jax.Array:
    """The generalized soft threshold of `hqq`."""
    size = jnp.abs(x)
    cut = jnp.where(size > 0, size, 1.0) ** (norm - 1.0) / beta
    return jnp.sign(x) * jnp.maximum(size - cut, 0.0)


def half_quadratic(
    search: HQQ,
    first: Any,
    *,
    residual: Callable[[Any], tuple[jax.Array, jax.Array]],
    solve: Callable[[Any, jax.Array, jax.Array], Any],
    total: Callable[[jax.Array], jax.Array],
) -> Any:
    """The iterate of least :math:`l_p` error for each block.

    Args:
      search: The settings.
      first: Scales to begin with: a pytree with an entry for each block.
      residual: From scales to ``q - z`` and to the error in units of the first scale.
      solve: From scales, ``q - z`` and the error without its large part (both of the
        weight's shape) to new scales.
      total: Sums over each block.
    """

    def measure(scales: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        points, x = residual(scales)
        return total(jnp.abs(x) ** search.norm), points, x

    def step(_: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        scales, points, x, best, least, beta = carry
        scales = solve(scales, points, x - shrink_error(x, beta, search.norm))
        e, points, x = measure(scales)
        best = jax.tree.map(lambda a, b: jnp.where(e < least, a, b), scales, best)
        least = jnp.minimum(e, least)
        return scales, points, x, best, least, beta * search.growth

    e, points, x = measure(first)
    start = (first, points, x, first, e, jnp.float32(search.beta))
    return jax.lax.fori_loop(0, search.steps, step, start)[3]


def nearest_rank(percent: float, *, lower: bool = False) -> Callable[..., jax.Array]:
    """A reduction to the entry of that rank, from below or (`lower`) from above.

    Of blocks that must share a scale (``keepdims``), the widest counts.
    """

    def reduce(
        a: jax.Array, axis: tuple[int, ...], keepdims: bool = False
    ) -> jax.Array:
        if keepdims:
            return (jnp.min if lower else jnp.max)(a, axis=axis, keepdims=True)
        a = jnp.moveaxis(a, axis, tuple(range(-len(axis), 0)))
        a = a.reshape(*a.shape[: a.ndim - len(axis)], -1)
        rank = math.ceil(percent / 100 * a.shape[-1]) - 1
        return jnp.sort(a, -1)[..., a.shape[-1] - 1 - rank if lower else rank]

    return reduce
