"""`GatedArray`: a weight in training and the trained gates it is multiplied with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcompress.latent import LatentLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    GATE,
    WEIGHT,
    Leaf,
    OrderError,
    component,
    leaf_type,
    static,
)
from jaxcompress.prune._bitmask import BitmaskArray, store
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Site, map_values

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard-concrete distribution: its sharpness, and how far it is stretched."""


@leaf_type
class GatedArray(LatentLeaf):
    """A weight in training and the gates it is multiplied with, both trained.

    Attributes:
      latent: Array or leaf of the logical shape: the weight before the gates.
      log_alpha: ``float32``, of `latent`'s rank, with one for each axis that a gate
        spans: the location of each gate's distribution.
      layout: How the axes lie in storage.
    """

    latent: Any = component(role=WEIGHT)
    log_alpha: jax.Array = component(role=GATE)
    layout: Layout = static()

    @property
    def method(self) -> str:
        """``"gated"`` and the method of its weight."""
        inner = self.latent.method if isinstance(self.latent, Leaf) else "dense"
        return f"gated {inner}"

    def materialize(self) -> jax.Array:
        """The weight under its deterministic gates."""
        return self.under(deterministic(self.log_alpha), self.weight).materialize()

    def under(self, gate: jax.Array, w: jax.Array) -> MaskedArray:
        """A dense weight times its gates; masked where they are shut."""
        gate = jnp.broadcast_to(gate, w.shape)
        return MaskedArray(inner=w * gate.astype(w.dtype), mask=gate > 0)

    def stored(self, w: jax.Array) -> BitmaskArray:
        """The stored form of a dense weight, under the deterministic gates."""
        return store(self.under(deterministic(self.log_alpha), w), self.layout)

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> GatedArray:
        """The weight's own spec; gates are cut where there are several."""
        gates = zip(spec, self.log_alpha.shape, strict=True)
        return self.replace(
            latent=self.latent_specs(spec, sizes),
            log_alpha=PartitionSpec(*(s if n > 1 else None for s, n in gates)),
        )


def hard_concrete(log_alpha: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    r"""Gates between 0 and 1, exactly 0 or 1 with a probability above zero.

    .. math::
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \quad
        s = \sigma((\log u - \log(1 - u) + \log \alpha) / \beta)

    with :math:`\beta = 2/3`, :math:`\gamma = -0.1` and :math:`\zeta = 1.1`; without
    noise, :math:`s = \sigma(\log \alpha)`.

    Args:
      log_alpha: ``float32`` locations.
      noise: :math:`u` in (0, 1), of the same shape, or None.

    Returns:
      ``float32`` gates of that shape, differentiable in `log_alpha` where they are
      neither 0 nor 1.

    Examples:
      >>> hard_concrete(jnp.array([-3.0, 0.0, 3.0])).tolist()
      [0.0, 0.5, 1.0]

    References:
      Louizos et al., `Learning Sparse Neural Networks through L0 Regularization
      <https://arxiv.org/abs/1712.01312>`_, 2018, eq. 10, 11 and 13.
    """
    if noise is None:
        s = jax.nn.sigmoid(log_alpha)
    else:
        logit = jnp.log(noise) - jnp.log1p(-noise)
        s = jax.nn.sigmoid((logit + log_alpha) / TEMPERATURE)
    return jnp.clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)


@jax.jit
def deterministic(log_alpha: jax.Array) -> jax.Array:
    """`hard_concrete` without noise, the same bits wherever it is computed.

    Operation by operation it would round otherwise than compiled, where a product and
    a sum may round once. The barriers keep what stands around out of that program.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(hard_concrete(barrier(log_alpha)))


def at_gates(
    f: Callable[[GatedArray, Site], Any],
    otherwise: Callable[[jax.Array, Site], Any],
    params: Any,
    by: str,
) -> Any:
    """`f` of every `GatedArray`; `otherwise` of the values of leaves without one."""
    is_gated = lambda x: isinstance(x, GatedArray)

    def one(path: str, leaf: Any) -> Any:
        parts, structure = jax.tree.flatten(leaf, is_leaf=is_gated)
        if not any(map(is_gated, parts)):
            return map_values(otherwise, {path: leaf}, by=by)[path]
        number = itertools.count()
        try:
            parts = [
                f(x, Site(path, next(number), None)) if is_gated(x) else x
                for x in parts
            ]
        except OrderError as error:
            raise OrderError(f"{by} at {path!r}: {error}") from None
        return jax.tree.unflatten(structure, parts)

    flat, structure = flatten(params)
    return unflatten(structure, {path: one(path, leaf) for path, leaf in flat.items()})
