"""`corrected`: what another method loses, made up for by a product of low rank."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf, materialize
from jaxcompress.lowrank._rank import Rank, check_rank
from jaxcompress.lowrank._sum import SumArray
from jaxcompress.lowrank._svd import svd_weight
from jaxcompress.transform import Transform, as_transform, identity
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Oriented, bare, check_weights


def corrected(*, rule: Any, rank: Rank) -> Transform:
    r"""Compress each weight by any rule, and add the error's best low-rank product.

    .. math:: W \approx Q + \mathrm{SVD}_r(W - Q), \quad Q = \mathrm{compress}(W)

    Args:
      rule: A number format or transform. Its stored form is frozen but for its own
        trainable components (the values of a mask, the buckets of a hash).
      rank: As for `svd`, of the error.

    Returns:
      A transform whose ``init`` puts a `SumArray` in place of each weight: the stored
      form and a `LowRankArray`, whose factors are trained. The weight's error is never
      above the rule's, but for rounding of the factors. For number formats whose error
      is weighed by inputs, and for adapters, there are
      `quant.low_rank_correction_weight` and `quant.lora`.

    Raises:
      ValueError: As `svd` and the rule do; from ``init``, under jit if the rule's
        ``compress`` runs outside it.
      OrderError: From ``init``, if the rule does not compress a weight whole, or a
        transform in front of it in a chain already did.

    Examples:
      >>> import jaxcompress as jc
      >>> w = jnp.outer(jnp.arange(1.0, 9.0), jnp.arange(1.0, 9.0)) / 3
      >>> rule = corrected(rule=jc.quant.int2(), rank=1)
      >>> leaf = jc.compress({"w": w}, {"w": rule})["w"]
      >>> plain = jc.compress({"w": w}, {"w": jc.quant.int2()})["w"]
      >>> error = lambda q: float(jnp.square(q.materialize() - w).sum())
      >>> leaf, error(leaf) < 0.5 * error(plain)
      (SumArray(int2 + rank 1, float32[8, 8]), True)

    References:
      Yao et al., `ZeroQuant-V2 <https://arxiv.org/abs/2303.08302>`_, 2023, section 4
      (low-rank compensation).
    """
    by = "lowrank.corrected"
    check_rank(rank, by)
    part = as_transform(rule)

    def init(params: Any) -> tuple[Any, tuple[()]]:
        check_weights(params, who=by)
        flat, structure = flatten(params)
        fresh = {p: x for p, x in flat.items() if not isinstance(bare(x), SumArray)}
        stored, _ = flatten(part.compress(*part.init(fresh)))
        done = {p: _corrected(p, x, stored[p], rank, by) for p, x in fresh.items()}
        return unflatten(structure, flat | done), ()

    return identity()._replace(init=init)


def _corrected(path: str, x: Any, stored: Any, rank: Rank, by: str) -> Any:
    """A weight's stored form and the correction of its error."""
    axes = x.axes if isinstance(x, Oriented) else None
    first = bare(stored)
    if not isinstance(first, Leaf):
        return x
    error = materialize(bare(x)).astype(jnp.float32) - first.materialize().astype(
        jnp.float32
    )
    second = svd_weight(error, rank, axes=axes, path=path, who=by)
    to = lambda a: a.astype(first.dtype)
    result = SumArray(first=first, second=jax.tree.map(to, second))
    return x.replace(value=result) if isinstance(x, Oriented) else result
