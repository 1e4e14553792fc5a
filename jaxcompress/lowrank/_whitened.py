"""Low rank with the least error of the outputs, by the second moment of the inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Algorithm, Statistics, sweep
from jaxcompress.lift._algorithm import core_name
from jaxcompress.lift._second_moment import mean_gram
from jaxcompress.lowrank._array import LowRankArray
from jaxcompress.lowrank._decompose import rebalanced, truncated_svd
from jaxcompress.lowrank._factors import product
from jaxcompress.lowrank._matrix import AxesOption, Matrix
from jaxcompress.lowrank._rank import Rank, RankRule, check_rank
from jaxcompress.lowrank._svd import singular_values, svd_weight

DAMPING = 1e-6
"""Enough to settle what no input has seen, too little to be seen in the outputs."""


def whitened_weight(
    w: jax.Array,
    rank: Rank,
    stats: Statistics | None,
    *,
    axes: AxesOption = None,
    path: str = "w",
    damping: float = DAMPING,
) -> LowRankArray:
    r"""Factor one weight so that its matmul's output, not the weight, changes least.

    With the inputs' second moment :math:`H = X^T X / n + \lambda I = S^T S` and the
    leading `r` right singular vectors :math:`V_r` of :math:`S W`,

    .. math:: W \approx (W V_r) V_r^T.

    This is optimal: for any :math:`W'` of rank `r`, :math:`\|X(W - W')\|_F^2 / n =
    \|S W - S W'\|_F^2` (without damping), and :math:`S W'` has rank at most `r`, so by
    Eckart and Young the error is at least :math:`\sum_{i>r} \sigma_i(S W)^2`. It is
    attained, since :math:`S W V_r V_r^T` is the truncated decomposition of
    :math:`S W`. No inverse of :math:`S` is needed, so a singular second moment will do;
    where it has one, the factors are :math:`S^{-1} \mathrm{SVD}_r(S W)`.

    Args:
      w: ``float[*stack, *core]`` weight.
      rank: As for `svd`; rules by energy or error are of the outputs. Static.
      stats: Of the rows that entered its matmul, with their gram. None, or a stack
        entry without rows: as `svd_weight`.
      axes: Contracting axes, or `Axes`; as for `svd`. Static.
      path: Named in errors. Static.
      damping: :math:`\lambda`, relative to the mean second moment of an input. Static.

    Returns:
      A leaf of `w`'s shape and dtype. No other product of the rank has a smaller damped
      error of the outputs, but for rounding; with an identity for the second moment it
      is that of `svd_weight`.

    Raises:
      ValueError: As `svd_weight` does; or if the statistics are not of this weight or
        without gram, or `damping` is negative.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> x = jnp.array([[1.0, 0.0], [0.0, 0.1]])
      >>> w = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> leaf = whitened_weight(w, 1, statistics(x, gram=True))
      >>> abs(leaf.materialize()).round(2).tolist()  # The second input is small.
      [[1.0, 0.0], [0.0, 0.0]]

    References:
      Wang et al., `SVD-LLM <https://arxiv.org/abs/2403.07378>`_, 2024, section 3.1;
      Chen et al., `DRONE
      <https://papers.nips.cc/paper/2021/hash/f56de5ef149cf0aedcc8f4797031e229>`_, 2021,
      section 3. Differs: without the inverse of a factor of the second moment.
    """
    who = "lowrank.whitened_weight"
    matrix, a, moved = _moved(w, rank, stats, axes, path, damping, who)
    r = matrix.rank(rank, lambda: singular_values(moved), path=path, who=who)
    vt = truncated_svd(moved, r).vt
    left = product(a, jnp.matrix_transpose(vt))
    left, right = rebalanced(left, vt)
    if not matrix.enters:
        left, right = jnp.matrix_transpose(right), jnp.matrix_transpose(left)
    return matrix.leaf(left, right)


def output_values(
    w: jax.Array,
    stats: Statistics | None,
    *,
    axes: AxesOption = None,
    path: str = "w",
    damping: float = DAMPING,
) -> jax.Array:
    r"""Singular values of :math:`S W`: what each rank adds to the outputs.

    Args:
      w: As for `whitened_weight`, as the others.
      stats: None: those of the weight itself.
      axes: As there.
      path: As there.
      damping: As there.

    Returns:
      ``float32[*stack, k]``, descending; the squared error of the outputs at rank `r`
      is :math:`n \sum_{i>r} \sigma_i^2`, up to the scale of the second moment.
    """
    return singular_values(
        _moved(w, 1, stats, axes, path, damping, "lowrank.output_values")[2]
    )


def _moved(
    w: jax.Array,
    rank: Rank,
    stats: Statistics | None,
    axes: AxesOption,
    path: str,
    damping: float,
    who: str,
) -> tuple[Matrix, jax.Array, jax.Array]:
    """The weight's sides; W and S W, ``float32[*stack, inputs, outputs]``."""
    check_rank(rank, who)
    if not damping >= 0.0:
        raise ValueError(f"{who}: damping must not be negative; got {damping}.")
    matrix = Matrix.of(w, axes, path=path, who=who)
    a = matrix.of_weight(w)
    a = a if matrix.enters else jnp.matrix_transpose(a)
    k = a.shape[-2]
    gram = mean_gram(stats, matrix.stack, k, who=who, path=path)
    gram = gram.reshape(*matrix.stack, k, k)
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / k
    eye = jnp.broadcast_to(jnp.eye(k, dtype=jnp.float32), gram.shape)
    seen = mean > 0
    h = jnp.where(seen, gram / jnp.where(seen, mean, 1.0), eye) + damping * eye
    values, vectors = jnp.linalg.eigh(h)
    turned = product(jnp.matrix_transpose(vectors), a)
    return matrix, a, jnp.sqrt(jnp.maximum(values, 0.0))[..., None] * turned


Core = Callable[..., Leaf]
"""``(w, rank, stats, *, axes, path) -> leaf``: an algorithm for one weight."""


def whitened(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, Rank],
    damping: float = DAMPING,
    **options: Any,
) -> Any:
    """Factor a model by `whitened_weight`, in the order it runs.

    Each weight sees the inputs that the factored weights before it give.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs: tuples of arguments, or single arguments, alike.
      rules: As for `compress`, to ranks: numbers or rules of shapes (`by_ratio`,
        `by_bytes`). What `allocate` finds is such a mapping.
      damping: As for `whitened_weight`.
      **options: As for `jaxcompress.lift.sweep`; ``reference=True`` makes up for the
        errors of earlier weights too.

    Returns:
      `params` with a `LowRankArray` where the rules chose. Weights that are only looked
      up have no statistics, and are factored as by `svd`.

    Raises:
      ValueError: As `jaxcompress.lift.sweep` and `whitened_weight` do; for rules that
        look at singular values.

    Examples:
      >>> from jaxcompress.lowrank import by_ratio
      >>> params = {"w": jax.random.normal(jax.random.key(0), (32, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32))
      >>> whitened(lambda p, x: x @ p["w"], params, [x], rules={"w": by_ratio(0.5)})
      {'w': LowRankArray(rank 8, float32[32, 32])}

    References:
      Wang et al., 2024, Algorithm 1. Differs: each weight, not each layer, sees the
      inputs of the factored weights before it.
    """
    core = functools.partial(whitened_weight, damping=damping)
    algorithms = {rule: _algorithm(core, rank) for rule, rank in rules.items()}
    return sweep(fn, params, batches, algorithms, **options)


def _algorithm(core: Core, rank: Rank) -> Algorithm:
    check_rank(rank, "lowrank.whitened")
    if isinstance(rank, RankRule) and rank.looks:
        raise ValueError(
            f"lowrank.whitened: {rank!r} looks at singular values, which a sweep does "
            "not know before it runs; find ranks by lowrank.allocate with the "
            "statistics of jc.calibrate(..., gram=True), or give a ratio."
        )

    def run(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        return core(w, rank, stats, axes=axes, path=path)

    def baseline(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        del stats
        return svd_weight(w, rank, axes=axes, path=path)

    return Algorithm(run=run, baseline=baseline, name=f"{core_name(core)} {rank!r}")
