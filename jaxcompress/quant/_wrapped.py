"""The base of leaves that wrap a leaf and act on the other operand of its matmul."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Layout
from jaxcompress.leaf import Cast, LayoutOp, Leaf, Ran, Traits, dense_dot_general
from jaxcompress.quant._matmul import Site


class WrappedArray(Leaf):
    """A weight made of an inner leaf and small arrays.

    A matmul that contracts the leaf's contracting axes brings the other operand to
    the form ``[*batch, *free, K]``, changes it (`_enter`), runs the inner leaf's own
    rule, and adds what runs beside it (`_beside`). Any other matmul, a convolution or
    a look-up (of the whole table) runs on `materialize()`. If the inner leaf quantizes
    activations, they are quantized as `_enter` leaves them; where that form cannot be
    reached (a window of several positions, a stack of experts in one ragged dot,
    contracting axes other than the leaf's), activations stay as they are.

    Small arrays lie in storage order, ``[*stack, *out, ...]``, with size one along the
    output axes they are shared by.

    Attributes:
      inner: The leaf that is multiplied.
      layout: How the axes lie in storage.
    """

    inner: Leaf
    layout: Layout

    @property
    def traits(self) -> Traits:
        """A matmul of its own."""
        return Traits(own_matmul=True)

    # -- what each defines

    def _enter(self, rows: jax.Array, site: Site) -> jax.Array:
        """Activations as the inner leaf takes them, ``[*batch, *free, K]``."""
        del site
        return rows

    def _leave(self, entered: jax.Array, rows: jax.Array, site: Site) -> jax.Array:
        """Undo `_enter` on activations that the inner leaf has quantized."""
        del rows, site
        return entered

    def _beside(self, rows: jax.Array, site: Site, precision: Any) -> jax.Array | None:
        """Float32 product beside the inner leaf's, ``[*batch, *free, *out]``."""
        del rows, site, precision
        return None

    def _shared(self) -> tuple[Any, ...]:
        """Small arrays that are the same along the output axes."""
        return ()

    @abc.abstractmethod
    def _weight(self, inner: jax.Array) -> jax.Array:
        """The weight of the inner one, both ``float32[*stack, *out, K]``."""

    @abc.abstractmethod
    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        """Specs of the small arrays, given those of the storage axes."""

    # -- what follows

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(self.inner.shape)

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.inner.dtype

    @property
    def _k(self) -> int:
        return math.prod(self.shape[a] for a in self.layout.contract)

    @property
    def _outputs(self) -> int:
        """Number of storage axes before the contracted one, stack axes included."""
        return self.ndim - self.layout.contracting

    def materialize(self) -> jax.Array:
        """The dense values."""
        inner = self.layout.to_storage(self.inner.materialize().astype(jnp.float32))
        return self.layout.from_storage(self._weight(inner)).astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """The inner leaf and the layout follow; small arrays stay where they are."""
        inner = self.inner.relayout(op)
        if inner is NotImplemented:
            return NotImplemented
        if isinstance(op, Cast):
            return self.replace(inner=inner)
        layout = self.layout.relayout(op, self.shape)
        if layout is NotImplemented:
            return NotImplemented
        return self.replace(inner=inner, layout=layout)

    def stacked(self, ndim: int) -> Leaf:
        """Count the first axes as stacks, if every small array has them."""
        inner = self.inner.stacked(ndim)
        if inner is NotImplemented:
            return NotImplemented
        layout = self.layout.stacked(ndim, self.ndim)
        changes: dict[str, Any] = {"inner": inner, "layout": layout}
        for name, (a, _) in self.components().items():
            if name == "inner":
                continue
            if tuple(a.shape[:ndim]) != self.shape[:ndim]:
                return NotImplemented
            changes[name] = a.stacked(ndim) if isinstance(a, Leaf) else a
        if any(a is NotImplemented for a in changes.values()):
            return NotImplemented
        return self.replace(**changes)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """The inner leaf's rule on the changed operand, and what runs beside it."""
        site = Site.of(self, x, dimension_numbers, leaf_is_lhs)
        if site is None or not self._fits(site):
            return dense_dot_general(
                self, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            )
        rows = to_rows(x, site)
        entered = self._enter(rows, site)
        ran = self.inner.dot_general(
            x if entered is rows else from_rows(entered, x, site),
            dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            **params,
        )
        beside = self._beside(rows, site, params.get("precision"))
        out = ran.out
        if beside is not None:
            beside = jnp.transpose(beside, site.order)
            out = (out.astype(jnp.float32) + beside).astype(out.dtype)
        return Ran(out, f"{type(self).__name__}: {ran.how}")

    def _fits(self, site: Site) -> bool:
        """Whether every output axis that a small array varies along is a batch axis."""
        batch = {s for _, s in site.batch}
        return all(
            n == 1 or i in batch
            for a in self._shared()
            for i, n in enumerate(a.shape[: self._outputs])
        )

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """What the inner leaf makes of the changed operand, changed back."""
        contract = tuple(a % x.ndim for a in axes)
        free = tuple(a for a in range(x.ndim) if a not in contract)
        site = Site((), contract, free, (), None, False)
        if len(axes) > 1 or x.shape[contract[0]] != self._k or not self._fits(site):
            return x
        rows = to_rows(x, site)
        given = from_rows(self._enter(rows, site), x, site)
        prepared = self.inner.prepare_activations(given, contract)
        if prepared is given:
            return x
        return from_rows(self._leave(to_rows(prepared, site), rows, site), x, site)

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Any:
        """The inner leaf's, and those of the small arrays."""
        full = self.layout.absorb_stack(self.ndim - len(self.layout.order))
        major, *minor = (spec[a] for a in full.contract)
        if any(m is not None for m in minor):
            raise ValueError(
                f"{self.method}: of the contracting axes {full.contract} only the "
                f"first may be sharded; got {tuple(spec)}."
            )
        out = [spec[a] for a in full.out]
        return self.replace(
            inner=self.inner.component_specs(spec, sizes),
            **self._side_specs(out, major, sizes),
        )

    def _for_rows(self, a: jax.Array, site: Site) -> jax.Array:
        """A shared array ``[*stack, *1, ...]`` as ``[*batch, *1, ...]``."""
        batch = tuple(s for _, s in site.batch)
        a = jnp.moveaxis(a, batch, tuple(range(len(batch))))
        ones = (1,) * len(site.free)
        return a.reshape(*a.shape[: len(batch)], *ones, *a.shape[self._outputs :])


def to_rows(x: jax.Array, site: Site) -> jax.Array:
    """The other operand as ``[*batch, *free, K]``, K in the leaf's order."""
    batch = tuple(a for a, _ in site.batch)
    x = jnp.transpose(x, (*batch, *site.free, *site.contract))
    return x.reshape(*x.shape[: x.ndim - len(site.contract)], -1)


def from_rows(rows: jax.Array, x: jax.Array, site: Site) -> jax.Array:
    """Undo `to_rows` for an operand like `x`."""
    order = (*(a for a, _ in site.batch), *site.free, *site.contract)
    rows = rows.reshape(tuple(x.shape[a] for a in order)).astype(x.dtype)
    return jnp.transpose(rows, tuple(order.index(a) for a in range(x.ndim)))


def side_dot(
    rows: jax.Array, factor: jax.Array, batch: Sequence[int], precision: Any
) -> jax.Array:
    """``float32[*batch, *free, *rest]`` of rows and ``[*rest, channels]``.

    Args:
      rows: ``[*batch, *free, channels]``.
      factor: Contracted along its last axis; its axes `batch` go with those of rows.
      batch: Axes of `factor`.
      precision: As for `jax.lax.dot_general`.
    """
    contract = ((rows.ndim - 1,), (factor.ndim - 1,))
    return jax.lax.dot_general(
        rows,
        factor.astype(rows.dtype),
        (contract, (tuple(range(len(batch))), tuple(batch))),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def shared_spec(a: Any, entries: Sequence[Any]) -> PartitionSpec:
    """Spec of a small array: that of the storage axes, None along axes of size one."""
    return PartitionSpec(
        *(None if n == 1 else e for n, e in zip(a.shape, entries, strict=True))
    )
