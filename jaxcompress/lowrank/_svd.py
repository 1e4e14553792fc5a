"""`svd`: trained weights as products of thin factors, which train on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.lowrank._array import LowRankArray
from jaxcompress.lowrank._decompose import leading
from jaxcompress.lowrank._matrix import (
    AxesOption,
    Matrix,
    check_factored,
)
from jaxcompress.lowrank._rank import Rank, check_rank
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, leaf_key, replace_weights


def svd(
    *, rank: Rank, key: jax.Array | None = None, axes: AxesOption = None
) -> Transform:
    r"""Replace each weight by the best product of two thin factors.

    .. math:: W \approx L R, \quad L = U_r \Sigma_r^{1/2}, \quad
        R = \Sigma_r^{1/2} V_r^T

    Rows and columns are the axes that the matmul contracts and the others, so the
    kernel of a convolution is a matrix of window and inputs by outputs.

    Args:
      rank: Singular values kept: a number, a rule (`by_ratio`, `by_bytes`,
        `by_energy`, `by_error`), or one of these for each path, as `allocate` finds
        them. Static.
      key: With one, weights of at least twice the rank and 16 either way are
        decomposed by `randomized_svd`, which is far faster for large ones.
      axes: Contracting axes, or `Axes`; as for `magnitude`. Static.

    Returns:
      A transform whose ``init`` puts a `LowRankArray` of the weight's dtype in place of
      each weight; both factors are trained, and what is trained is what is stored. The
      error of the product is the least of its rank, :math:`\sqrt{\sum_{i>r}
      \sigma_i^2}`, but for rounding of the factors; near that with a `key`.

    Raises:
      ValueError: If `rank` is out of range; from ``init`` if a weight is not finite or
        its axes are unknown.
      OrderError: From ``init``, if a weight has a higher rank by an earlier factoring.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.lowrank import by_ratio
      >>> w = jnp.array([[2.0, 0.0], [0.0, 0.5]])
      >>> params, state = svd(rank=1).init({"w": w})
      >>> params["w"], abs(params["w"].materialize()).round(3).tolist()
      (LowRankArray(rank 1, float32[2, 2]), [[2.0, 0.0], [0.0, 0.0]])
      >>> jc.compress({"w": jnp.ones((64, 64))}, {"w": svd(rank=by_ratio(0.25))})
      {'w': LowRankArray(rank 8, float32[64, 64])}

    References:
      Eckart & Young, `The Approximation of One Matrix by Another of Lower Rank
      <https://doi.org/10.1007/BF02288367>`_, 1936; Denton et al., `Exploiting Linear
      Structure <https://arxiv.org/abs/1404.0736>`_, 2014, section 3.1; Halko et al.,
      2011 (randomized).
    """
    by = "lowrank.svd"
    check_rank(rank, by)

    def factored(w: jax.Array, site: Site) -> LowRankArray:
        stated = site.axes if axes is None else axes
        draw = None if key is None else leaf_key(key, site)
        return svd_weight(w, rank, key=draw, axes=stated, path=site.path, who=by)

    def ready(x: Any, path: str) -> bool:
        if not isinstance(x, LowRankArray):
            return False
        check_factored(x, rank, path=path, who=by)
        return True

    def init(params: Any) -> tuple[Any, tuple[()]]:
        return replace_weights(factored, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def svd_weight(
    w: jax.Array,
    rank: Rank,
    *,
    key: jax.Array | None = None,
    axes: AxesOption = None,
    path: str = "w",
    who: str = "lowrank.svd_weight",
) -> LowRankArray:
    """`svd` of one weight.

    Args:
      w: ``float[*stack, *core]`` weight.
      rank: As for `svd`. Static.
      key: As for `svd`.
      axes: As for `svd`. Static.
      path: Named in errors. Static.
      who: Function named in errors. Static.

    Returns:
      The leaf.

    Raises:
      ValueError: As `svd` does.

    Examples:
      >>> svd_weight(jnp.ones((3, 4)), 1)
      LowRankArray(rank 1, float32[3, 4])
    """
    check_rank(rank, who)
    matrix = Matrix.of(w, axes, path=path, who=who)
    a = matrix.of_weight(w)
    r = matrix.rank(rank, lambda: singular_values(a), path=path, who=who)
    return matrix.leaf(*leading(a, r, key).balanced())


def singular_values(a: jax.Array) -> jax.Array:
    """``float32[*stack, k]``, descending."""
    return jnp.linalg.svd(a, compute_uv=False)


def rank_of(
    rank: Rank, w: jax.Array, *, axes: AxesOption = None, path: str = "w"
) -> int:
    """The rank that a rule finds for a weight.

    Args:
      rank: As for `svd`.
      w: ``float[*stack, *core]`` weight.
      axes: As for `svd`.
      path: Named in errors.

    Returns:
      A number from 1 to the smaller side.

    Raises:
      ValueError: As `svd` does.

    Examples:
      >>> from jaxcompress.lowrank import by_error
      >>> rank_of(by_error(0.0), jnp.ones((8, 4)))
      1
    """
    who = "lowrank.rank_of"
    check_rank(rank, who)
    matrix = Matrix.of(w, axes, path=path, who=who)
    values = lambda: singular_values(matrix.of_weight(w))
    return matrix.rank(rank, values, path=path, who=who)
