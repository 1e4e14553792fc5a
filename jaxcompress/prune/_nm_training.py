"""SR-STE: training with `n` of every `m` weights kept, chosen anew in every step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.prune._nm import nm
from jaxcompress.prune._top_kast import anew
from jaxcompress.prune._training import AxesOption, PruneState
from jaxcompress.transform import Transform
from jaxcompress.values import Site, map_values


def sr_ste(
    *,
    n: int = 2,
    m: int = 4,
    decay: float = 2e-4,
    every: int = 1,
    axes: AxesOption = None,
) -> Transform:
    r"""Keep the `n` largest of every `m` inputs, train all, and pull the others in.

    .. math:: \frac{\partial L}{\partial W} := g(\widetilde W) + \lambda\,
       \overline{E} \odot W, \quad \overline{E} = 1 \text{ where a weight is masked}

    Masks are chosen anew after every step from the weights as they are; the params
    are dense, so weights come back. The gradient is that of the masked weights, passed
    straight through, and `decay` times each masked weight.

    The second term is added once in a backward pass, whatever the loss is multiplied
    by: scale gradients, not the loss, or multiply `decay` alike. The view has no
    forward-mode derivative, but with ``decay=0.0``.

    Args:
      n: Weights kept of each group, as for `nm`.
      m: Consecutive inputs of a group, as for `nm`.
      decay: The factor of masked weights in the gradient.
      every: Updates between two choices of the masks.
      axes: As for `magnitude`.

    Raises:
      ValueError: If an option is out of range; from ``init`` as for `magnitude`.

    Examples:
      >>> scheme = sr_ste(n=1, m=2, decay=0.5)
      >>> params, state = scheme.init({"w": jnp.array([1.0, -4.0, 3.0, 2.0])})
      >>> loss = lambda p: scheme.view(p, state)["w"].materialize().sum()
      >>> loss(params).tolist(), jax.grad(loss)(params)["w"].tolist()
      (-1.0, [1.5, 1.0, 1.0, 2.0])

    References:
      Zhou et al., `Learning N:M Fine-Grained Structured Sparse Neural Networks From
      Scratch <https://arxiv.org/abs/2102.04010>`_, 2021, eq. 9. Differs: momentum and
      preconditioning of the optimizer act on the second term too, as on weight decay.
    """
    by = "prune.sr_ste"
    if not 0.0 <= decay < float("inf"):
        raise ValueError(f"{by}: decay must be finite and at least 0; got {decay}.")
    base = anew(nm(n, m), by=by, every=every, axes=axes)
    if decay == 0.0:
        return base

    def view(params: Any, state: PruneState) -> Any:
        def pulled(w: jax.Array, site: Site) -> jax.Array:
            return _pulled(decay, w, state.masks[site.path][site.number])

        return base.view(map_values(pulled, params, by=by), state)

    return base._replace(view=view)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pulled(decay: float, w: jax.Array, mask: jax.Array) -> jax.Array:
    """`w`, whose gradient gains ``decay * w`` where masked."""
    del decay, mask
    return w


def _pulled_forward(decay: float, w: jax.Array, mask: jax.Array) -> Any:
    del decay
    return w, jnp.where(mask, jnp.zeros_like(w), w)


def _pulled_backward(decay: float, pruned: jax.Array, g: jax.Array) -> Any:
    return g + jnp.asarray(decay, pruned.dtype) * pruned, None


_pulled.defvjp(_pulled_forward, _pulled_backward)
