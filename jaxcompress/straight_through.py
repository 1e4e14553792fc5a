"""A trained array whose forward pass is a stored form of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .leaf import (
    FROZEN,
    WEIGHT,
    LayoutOp,
    Leaf,
    Ran,
    Traits,
    component,
    dense_dot_general,
    dense_ragged_dot,
    leaf_type,
    relayout_array,
    relayout_mask,
)


@jax.custom_jvp
def straight_through(w: jax.Array, value: jax.Array) -> jax.Array:
    """`value` in the forward pass, the identity in `w` in the backward pass.

    Exact: the result is `value` bit for bit, unlike ``w + stop_gradient(value - w)``.

    References:
      Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
      <https://arxiv.org/abs/1308.3432>`_, 2013, section 3.
    """
    del w
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


@leaf_type
class StraightThrough(Leaf):
    """A trained array whose forward pass is a stored form of itself.

    ``materialize() == stored.materialize()`` bit for bit; the gradient goes to
    `latent`, where `gate` (if any) is true. The one fake method of the library.
    """

    latent: jax.Array = component(role=WEIGHT)
    stored: Leaf = component(role=FROZEN)
    gate: jax.Array | None = component(role=FROZEN, default=None)

    @property
    def traits(self) -> Traits:
        """Those of the stored form."""
        return self.stored.traits

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.stored.dtype

    @property
    def method(self) -> str:
        """That of the stored form, marked as in training."""
        return f"{self.stored.method} (training view)"

    def materialize(self) -> jax.Array:
        """The stored form's value, differentiable in `latent`."""
        latent = self.latent.astype(self.dtype)
        if self.gate is not None:
            latent = jnp.where(self.gate, latent, jax.lax.stop_gradient(latent))
        return straight_through(
            latent, jax.lax.stop_gradient(self.stored).materialize()
        )

    def relayout(self, op: LayoutOp) -> Leaf:
        """Relayout latent and stored form alike."""
        stored = self.stored.relayout(op)
        if stored is NotImplemented:
            return NotImplemented
        gate = None if self.gate is None else relayout_mask(self.gate, op)
        return self.replace(
            latent=relayout_array(self.latent, op), stored=stored, gate=gate
        )

    def stacked(self, ndim: int) -> Leaf:
        """Stacked as the stored form is."""
        stored = self.stored.stacked(ndim)
        if stored is NotImplemented:
            return NotImplemented
        return self.replace(stored=stored)

    def map_leading(self, f: Callable[[jax.Array], jax.Array], ndim: int) -> Leaf:
        """As of the stored form, and of the trained array."""
        stored = self.stored.map_leading(f, ndim)
        if stored is NotImplemented:
            return NotImplemented
        gate = None if self.gate is None else f(self.gate)
        return self.replace(latent=f(self.latent), stored=stored, gate=gate)

    def dot_general(
        self,
        x: jax.Array,
        dimension_numbers: Any,
        *,
        leaf_is_lhs: bool,
        **params: Any,
    ) -> Ran:
        """The stored form's own rule; gradients as of `materialize()`."""
        contracted = tuple(dimension_numbers[0][1 if leaf_is_lhs else 0])
        options = {"leaf_is_lhs": leaf_is_lhs, **params}

        def own(view: StraightThrough, x: jax.Array) -> Ran:
            return view.stored.dot_general(x, dimension_numbers, **options)

        def dense(view: StraightThrough, x: jax.Array) -> Ran:
            x = view.stored.prepare_activations(x, contracted)
            return dense_dot_general(view, x, dimension_numbers, **options)

        if not self.traits.own_matmul:
            return super().dot_general(x, dimension_numbers, **options)
        return Ran(_run_as(own, dense, self, x), "training view")

    def ragged_dot_general(
        self, x: jax.Array, group_sizes: jax.Array, numbers: Any, **params: Any
    ) -> Ran:
        """The stored form's own rule; gradients as of `materialize()`."""

        def own(view: StraightThrough, x: jax.Array) -> Ran:
            return view.stored.ragged_dot_general(x, group_sizes, numbers, **params)

        def dense(view: StraightThrough, x: jax.Array) -> Ran:
            return dense_ragged_dot(view, x, group_sizes, numbers, **params)

        if not self.traits.own_matmul:
            return super().ragged_dot_general(x, group_sizes, numbers, **params)
        return Ran(_run_as(own, dense, self, x), "training view")

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the stored form does."""
        return self.stored.prepare_activations(x, axes)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> StraightThrough:
        """The trained array's own spec, and those of the stored form."""
        own = PartitionSpec(*spec)
        return self.replace(
            latent=own,
            stored=self.stored.component_specs(spec, sizes),
            gate=None if self.gate is None else own,
        )


def _run_as(
    own: Callable[..., Ran], dense: Callable[..., Ran], view: StraightThrough, x: Any
) -> jax.Array:
    """What `own` gives, with the derivatives of `dense`."""
    run = jax.custom_jvp(lambda view, x: own(view, x).out)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        reference = lambda view, x: dense(view, x).out
        return run(*primals), jax.jvp(reference, primals, tangents)[1]

    return run(view, x)
