"""`sparse_plus`: a weight as a sparse matrix and one of low rank."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Layout
from jaxcompress.lowrank._decompose import truncated_svd
from jaxcompress.lowrank._factors import product
from jaxcompress.lowrank._matrix import AxesOption, Matrix
from jaxcompress.lowrank._rank import Rank, check_rank
from jaxcompress.lowrank._sum import SumArray
from jaxcompress.lowrank._svd import singular_values
from jaxcompress.prune import MaskedArray, lowest
from jaxcompress.prune import rank as order_of
from jaxcompress.prune._bitmask import store
from jaxcompress.prune._pattern import pruned_count
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, replace_weights

Split = tuple[jax.Array, jax.Array, jax.Array]
"""Two factors, and the mask of what they leave to the sparse part."""


def sparse_plus(
    *, rank: Rank, sparsity: float, steps: int = 20, axes: AxesOption = None
) -> Transform:
    r"""Split each weight into a sparse one and a product of low rank.

    .. math:: \min_{S, L} \|W - S - L\|_F \quad \text{with} \quad
        \operatorname{rank} L \le r, \; \operatorname{nnz} S \le (1 - s)\, m n

    by turns: :math:`L \leftarrow \mathrm{SVD}_r(W - S)`, and :math:`S \leftarrow` the
    entries of :math:`W - L` of the largest magnitude. Each is the best given the other,
    so the error never rises. It starts once from :math:`L = \mathrm{SVD}_r(W)` and once
    from :math:`L = 0`, which finds outliers among small weights, and keeps the better.

    Args:
      rank: As for `svd`.
      sparsity: Fraction of the sparse part that is zero, in [0, 1). Static.
      steps: Turns.
      axes: As for `svd`. Static.

    Returns:
      A transform whose ``init`` puts a `SumArray` of a masked array and a
      `LowRankArray` in place of each weight; values and factors are trained, the mask
      stays. ``compress`` stores the sparse part as bits and values.

    Raises:
      ValueError: If an option is out of range; as `svd` does.

    Examples:
      >>> w = jnp.ones((4, 4)).at[1, 2].set(9.0)
      >>> scheme = sparse_plus(rank=1, sparsity=15 / 16)
      >>> packed = scheme.compress(*scheme.init({"w": w}))["w"]
      >>> packed, packed.materialize().round(2)[1].tolist()
      (SumArray(bitmask dense + rank 1, float32[4, 4]), [1.0, 1.0, 9.0, 1.0])

    References:
      Zhou & Tao, `GoDec <https://icml.cc/2011/papers/41_icmlpaper.pdf>`_, 2011,
      Algorithm 1. Differs: exact decompositions; a second start.
    """
    by = "lowrank.sparse_plus"
    check_rank(rank, by)
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"{by}: sparsity is the fraction that is zero and must be in [0, 1); got "
            f"{sparsity}."
        )
    if steps < 1:
        raise ValueError(f"{by}: steps must be positive; got {steps}.")

    def split(w: jax.Array, site: Site) -> SumArray:
        stated = site.axes if axes is None else axes
        matrix = Matrix.of(w, stated, path=site.path, who=by)
        a = matrix.of_weight(w)
        r = matrix.rank(rank, lambda: singular_values(a), path=site.path, who=by)
        left, right, mask = alternate(a, r, sparsity, steps)
        second = matrix.leaf(left, right)
        rest = w - second.materialize()
        kept = matrix.weight(mask).astype(bool)
        values = jnp.where(kept, rest, jnp.zeros_like(rest))
        return SumArray(first=MaskedArray(inner=values, mask=kept), second=second)

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, SumArray)
        return replace_weights(split, params, ready=ready, by=by), ()

    def compress(params: Any, state: tuple[()]) -> Any:
        del state
        stored = lambda x: _stored(x, sparsity) if isinstance(x, SumArray) else x
        return jax.tree.map(stored, params, is_leaf=lambda x: isinstance(x, SumArray))

    return identity()._replace(init=init, compress=compress)


@functools.partial(jax.jit, static_argnames=("rank", "sparsity"))
def alternate(w: jax.Array, rank: int, sparsity: float, steps: Any) -> Split:
    """Factors ``[*stack, m, r]`` and ``[*stack, r, n]``, and the mask of the rest."""
    *stack, m, n = w.shape
    count = pruned_count(sparsity, m * n)

    def rest_of(left: jax.Array, right: jax.Array) -> Split:
        size = order_of(jnp.abs(w - product(left, right)))
        return left, right, ~lowest([size], count, stack=len(stack))[0]

    def turn(_: int, split: Split) -> Split:
        left, right, mask = split
        without_sparse = jnp.where(mask, product(left, right), w)
        return rest_of(*truncated_svd(without_sparse, rank).balanced())

    def error(split: Split) -> jax.Array:
        left, right, mask = split
        rest = jnp.where(mask, 0.0, w - product(left, right))
        return jnp.square(rest).sum((-2, -1), keepdims=True)

    first = truncated_svd(w, rank).balanced()
    zero = jax.tree.map(jnp.zeros_like, first)
    a, b = (
        jax.lax.fori_loop(0, steps, turn, rest_of(*start)) for start in (first, zero)
    )
    better = error(a) <= error(b)
    left, right, mask = (jnp.where(better, x, y) for x, y in zip(a, b, strict=True))
    return left, right, mask


def _stored(leaf: SumArray, sparsity: float) -> SumArray:
    """The sparse part as bits and values."""
    masked, low = leaf.parts()
    if not isinstance(masked, MaskedArray):
        return leaf
    core = len(low.left_axes) + len(low.right_axes)
    enters = low.left_axes if low.left_enters else low.right_axes
    layout = Layout(
        order=(*(a for a in range(-core, 0) if a not in enters), *enters),
        contracting=len(enters),
        minor=tuple(leaf.shape[a] for a in enters[1:]),
    )
    n = math.prod(leaf.shape[low.stack :])
    capacity = n - pruned_count(sparsity, n)
    return leaf.replace(first=store(masked, layout, capacity=capacity))
