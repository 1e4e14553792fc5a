"""RigL: sparse from the start, with connections grown where gradients are large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.prune._overlap import masks
from jaxcompress.prune._pattern import Pattern, Scope
from jaxcompress.prune._regrow import regrowing
from jaxcompress.prune._training import (
    AxesOption,
    PruneState,
    everywhere,
    gradients,
)
from jaxcompress.schedules import Schedule
from jaxcompress.transform import Transform
from jaxcompress.values import Site, map_values


def rigl(
    *,
    sparsity: float | Pattern,
    key: jax.Array,
    fraction: float | Schedule = 0.3,
    every: int = 100,
    until: int | None = None,
    scope: Scope = "layer",
    axes: AxesOption = None,
) -> Transform:
    r"""Drop the smallest of the kept weights now and then, and grow by gradient.

    .. math:: I_{drop} = \operatorname{ArgTopK}_{i \in \theta}(-|\theta_i|, k), \quad
       I_{grow} = \operatorname{ArgTopK}_{i \notin \theta \setminus I_{drop}}
       (|\nabla_i L|, k)

    The gradient of a pruned weight is that at zero, so the view passes gradients to
    all weights and ``update`` needs them. The optimizer sees them too: pruned weights
    are held at zero all the same, but its moments and a clipped norm count them;
    `mask_gradients` gives it those of kept weights alone. What grows starts at zero.

    Args:
      sparsity: As for `set`.
      key: Decides the first masks, which are random; the same for the same path.
      fraction: As for `set`; the paper decays it,
        ``schedules.cosine(0.3, 0.0, begin=0, end=until)``.
      every: Updates between two changes of the masks.
      until: As for `set`; the paper's is three quarters of training.
      scope: As for `set`; with ``"global"``, gradients of all layers are compared.
      axes: As for `magnitude`.

    Returns:
      A transform whose masks, on one device or many, have the same number of weights
      at every step. Weights whose gradient is not finite grow last.

    Raises:
      ValueError: As for `set`; from ``update`` if it gets no gradients.

    Examples:
      >>> scheme = rigl(sparsity=0.5, key=jax.random.key(0), fraction=0.5, every=1)
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
      >>> grads = {"w": jnp.where(state.masks["w"][0], 0.0, jnp.eye(2) + 1.0)}
      >>> params, state = scheme.update(params, state, grads=grads)
      >>> int(state.masks["w"][0].sum())
      2

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
      Algorithm 1. Differs: the optimizer also takes the step at which masks change.
    """
    by = "prune.rigl"

    def growth(grads: Any, state: PruneState) -> Callable[[jax.Array, Site], jax.Array]:
        found = gradients(grads, state, by=by)

        def score(w: jax.Array, site: Site) -> jax.Array:
            del w
            size = jnp.abs(found[site.path][site.number].astype(jnp.float32))
            return jnp.where(size < jnp.inf, size, 0.0)

        return score

    return regrowing(
        growth,
        sparsity,
        key=key,
        scope=scope,
        fraction=fraction,
        every=every,
        until=until,
        axes=axes,
        by=by,
        again=True,
        backward=everywhere,
    )


def mask_gradients(grads: Any, state: Any) -> Any:
    """Gradients, zero where weights are pruned: for the optimizer beside `rigl`.

    Args:
      grads: Gradients of the params, as ``update`` gets them.
      state: State of a scheme, with pruning anywhere in it.

    Returns:
      The gradients of kept weights, and of leaves that are not pruned, unchanged.

    Examples:
      >>> scheme = rigl(sparsity=0.5, key=jax.random.key(0))
      >>> params, state = scheme.init({"w": jnp.ones((2, 2))})
      >>> grads = {"w": jnp.ones((2, 2))}
      >>> int(mask_gradients(grads, state)["w"].sum())
      2
    """
    kept = masks(state)
    flat, structure = tree.flatten(grads)

    def zeroed(g: jax.Array, site: Site) -> jax.Array:
        return jnp.where(kept[site.path][site.number], g, jnp.zeros_like(g))

    pruned = {path: flat[path] for path in kept}
    flat |= map_values(zeroed, pruned, by="prune.mask_gradients")
    return tree.unflatten(structure, flat)
