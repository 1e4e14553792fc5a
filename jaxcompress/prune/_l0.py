"""L0 regularization: trained gates that close, one for each weight or structure."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import OrderError, map_value
from jaxcompress.prune._gated import (
    HIGH,
    LOW,
    TEMPERATURE,
    GatedArray,
    at_gates,
    deterministic,
    hard_concrete,
)
from jaxcompress.prune._masked import check_maskable
from jaxcompress.prune._training import AxesOption
from jaxcompress.transform import Transform
from jaxcompress.values import Site, leaf_key

Structures = Literal["weight", "output", "input"]

OPEN = 2.5
"""From 2.4 on the deterministic gate is 1, and up to -2.4 it is 0."""


def l0(
    *,
    key: jax.Array,
    end: int,
    structures: Structures = "weight",
    log_alpha: float = OPEN,
    axes: AxesOption = None,
) -> Transform:
    r"""Multiply weights with trained random gates, which a penalty closes.

    The loss is :math:`L(w \odot z) + \lambda\,` `l0_penalty`, of the params.

    Args:
      key: Decides the noise of the gates, new at each update.
      end: Updates after which the gates are deterministic, and the view is bit for bit
        what ``compress`` stores. Until then it is not.
      structures: ``"weight"``: a gate for each weight; ``"output"``, ``"input"``: for
        all weights of an output or input feature together.
      log_alpha: Location of the gates at first. From 2.4 on, ``compress`` at the start
        changes no weight; lower starts are pruned sooner. Gates of weights that are
        all zero start closed.
      axes: As for `magnitude`.

    Returns:
      A transform whose ``init`` puts a `GatedArray` in place of each weight; its
      component of role ``"gate"`` is trained and not decayed. Weights whose
      deterministic gate is 0 are pruned; the others are stored times their gates.

    Raises:
      ValueError: If an option is out of range; from ``init`` if a weight is not finite
        or its axes are unknown.
      OrderError: If a weight has no gates, or `l0` is chained with itself.

    Examples:
      >>> scheme = l0(key=jax.random.key(0), end=0, structures="output")
      >>> params, state = scheme.init({"w": jnp.array([[1.0, 0.0], [2.0, 0.0]])})
      >>> params["w"].log_alpha.tolist()
      [[2.5, -2.5]]
      >>> scheme.compress(params, state)["w"].materialize().tolist()
      [[1.0, 0.0], [2.0, 0.0]]

    References:
      Louizos et al., `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018, eq. 10 to 13. Differs: one sample of
      the gates a step, shared by the batch; training ends without noise.
    """
    by = "prune.l0"
    if structures not in ("weight", "output", "input"):
        raise ValueError(
            f"{by}: structures must be 'weight', 'output' or 'input'; got "
            f"{structures!r}."
        )
    if end < 0:
        raise ValueError(f"{by}: end must not be negative; got {end}.")
    if not math.isfinite(log_alpha):
        raise ValueError(f"{by}: log_alpha must be finite; got {log_alpha}.")

    def gated(w: jax.Array, site: Site) -> GatedArray:
        stated = axes if axes is not None else site.axes
        roles = resolve_axes(w.shape, stated, who=by, path=site.path)
        alive = jnp.any(w != 0, _spanned(w.ndim, roles, structures), keepdims=True)
        start = jnp.where(alive, log_alpha, -OPEN).astype(jnp.float32)
        return GatedArray(latent=w, log_alpha=start, layout=Layout.of(w.shape, roles))

    def missing(w: jax.Array, site: Site) -> Any:
        del w, site
        raise OrderError(
            "there are no gates of its own; pass the params that init returned, and "
            "chain prune.l0 once."
        )

    def init(params: Any) -> tuple[Any, jax.Array]:
        check_maskable(params, who=by)
        ready = at_gates(lambda leaf, site: leaf, gated, params, by)
        return ready, jnp.zeros((), jnp.int32)

    def view(params: Any, state: jax.Array) -> Any:
        def fake(leaf: GatedArray, site: Site) -> Any:
            fresh = jax.random.fold_in(leaf_key(key, site), state)
            noise = jax.random.uniform(
                fresh, leaf.log_alpha.shape, jnp.float32, minval=1e-6, maxval=1 - 1e-6
            )
            quiet = deterministic(leaf.log_alpha)
            gate = jnp.where(state < end, hard_concrete(leaf.log_alpha, noise), quiet)
            return map_value(lambda w: leaf.under(gate, w), leaf.latent)

        return at_gates(fake, missing, params, by)

    def update(params: Any, state: jax.Array, **extra: Any) -> tuple[Any, jax.Array]:
        del extra
        return params, state + 1

    def compress(params: Any, state: jax.Array) -> Any:
        del state
        stored = lambda leaf, site: map_value(leaf.stored, leaf.latent)
        return at_gates(stored, missing, params, by)

    return Transform(init, view, update, compress)


def l0_penalty(params: Any) -> jax.Array:
    r"""Expected number of weights that are not zero under random gates.

    .. math:: \sum_g |g| \, \sigma(\log \alpha_g - \beta \log(-\gamma / \zeta))

    Args:
      params: Those that `l0`'s ``init`` returned.

    Returns:
      ``float32[]``: the sum over all gates, times the weights that each spans.

    Raises:
      ValueError: If there are no gates in `params`.

    Examples:
      >>> scheme = l0(key=jax.random.key(0), end=0, structures="input")
      >>> params, _ = scheme.init({"w": jnp.array([[1.0, 2.0], [0.0, 0.0]])})
      >>> float(l0_penalty(params))  # 2 (0.983... + 0.288...)
      2.5448...

    References:
      Louizos et al., 2018, eq. 9 and 12.
    """
    is_gated = lambda x: isinstance(x, GatedArray)
    leaves = [x for x in jax.tree.leaves(params, is_leaf=is_gated) if is_gated(x)]
    if not leaves:
        raise ValueError(
            "prune.l0_penalty: there are no gates in params; pass those that the init "
            "of prune.l0 returned."
        )
    total = jnp.zeros((), jnp.float32)
    for leaf in leaves:
        spanned = leaf.size / leaf.log_alpha.size
        shift = TEMPERATURE * math.log(-LOW / HIGH)
        total += spanned * jax.nn.sigmoid(leaf.log_alpha - shift).sum()
    return total


def _spanned(ndim: int, roles: Axes, structures: Structures) -> tuple[int, ...]:
    """The axes along which weights share a gate."""
    core = range(roles.stack - ndim, 0)
    if structures == "weight":
        return ()
    return tuple(a for a in core if (a in roles.contract) == (structures == "output"))
