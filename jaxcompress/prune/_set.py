"""SET: sparse from the start, with connections that come and go at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxcompress.prune._pattern import Pattern, Scope
from jaxcompress.prune._regrow import regrowing, uniform
from jaxcompress.prune._training import AxesOption, PruneState
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, leaf_key


def set(
    *,
    sparsity: float | Pattern,
    key: jax.Array,
    fraction: float | Schedule = 0.3,
    every: int = 100,
    until: int | None = None,
    scope: Scope = "layer",
    axes: AxesOption = None,
) -> Transform:
    r"""Drop the smallest of the kept weights now and then, and grow others at random.

    .. math:: |drop_l| = \lfloor \zeta_t n_l + 1/2 \rfloor, \quad
       n_l = \text{kept weights of layer } l

    The first masks are random. Weights just dropped do not grow, unless nothing else
    is pruned; those that grow start at zero.

    Args:
      sparsity: Fraction pruned, in [0, 1), from the first step to the last; or `nm`:
        each group then keeps its number of weights.
      key: Decides the first masks and what grows; the same for the same path.
      fraction: Fraction of each layer's kept weights that is dropped, in [0, 1]; or a
        schedule of it.
      every: Updates between two changes of the masks.
      until: Update from which the masks are fixed; never, if it is not given.
      scope: ``"layer"``, ``"global"`` or an allocation, as for `magnitude`. With
        ``"global"``, what grows is drawn from all weights, so layers exchange some.
      axes: As for `magnitude`.

    Returns:
      A transform whose masks, on one device or many, have the same number of weights
      at every step.

    Raises:
      ValueError: If `sparsity`, `fraction`, `scope` or `every` is out of range; from
        ``init`` if a weight is not finite or its axes are unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> scheme = set(sparsity=0.5, key=jax.random.key(0), fraction=0.5, every=1)
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
      >>> params, state = scheme.update(params, state)
      >>> int(state.masks["w"][0].sum()), int(jnp.count_nonzero(params["w"]))
      (2, 1)

    References:
      Mocanu et al., `Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018, Algorithm 1.
      Differs: positive and negative weights are ranked together, by magnitude; the
      first masks are of exact size (`scope` chooses Erdos-Renyi); a fixed number of
      updates takes the place of the epoch.
    """

    def growth(grads: Any, state: PruneState) -> Callable[[jax.Array, Site], jax.Array]:
        del grads
        return lambda w, site: uniform(
            w, jax.random.fold_in(leaf_key(key, site), state.step)
        )

    return regrowing(
        growth,
        sparsity,
        key=key,
        scope=scope,
        fraction=fraction,
        every=every,
        until=until,
        axes=axes,
        by="prune.set",
    )
