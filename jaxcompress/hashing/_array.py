"""`HashedArray`: a weight whose values are shared by hashing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import (
    FROZEN,
    STATIC_TYPES,
    STEP,
    WEIGHT,
    Cast,
    LayoutOp,
    Leaf,
    OrderError,
    Ran,
    Reshape,
    Traits,
    Transpose,
    component,
    dense_dot_general,
    dequantize,
    leaf_type,
    map_value,
    result_dtype,
    static,
)
from jaxcompress.quant._kernels import kernel_result, kernel_rows
from jaxcompress.quant._matmul import Site
from kernels_pallas.hashed_matmul import Hashing, choose, hashed_matmul, look_up
from kernels_pallas.target import current_target

STATIC_TYPES[Hashing.__name__] = Hashing


@leaf_type
class HashedArray(Leaf):
    r"""A weight of few values, each at the places that hash to its bucket.

    In storage order, outputs flattened into `n` and inputs into `k`,

    .. math:: w_{nk} = s\, \xi(n, k)\, b_{h(n, k)}

    where bucket `h` and sign :math:`\xi` are those of
    `kernels_pallas.hashed_matmul.Hashing`: xxHash32 of the place, or of its block.
    Neither is stored. The weights of a stack hash alike, but for `first`.

    Attributes:
      buckets: ``float[*stack, B]``, or a leaf of that shape.
      scale: ``float32[*stack]``, or None: one. Of buckets that several weights share.
      first: ``int32[*stack]``, the row of the hash at which each weight of the stack
        begins, in whole blocks, or None: zero.
      hashing: Which bucket a weight is.
      layout: How the axes lie in storage.
      sizes: Of the output axes in storage order, and of all inputs.
      dtype_name: Logical dtype.
    """

    buckets: Any = component(role=WEIGHT)
    scale: jax.Array | None = component(role=STEP, default=None)
    first: jax.Array | None = component(role=FROZEN, default=None)
    hashing: Hashing = static()
    layout: Layout = static()
    sizes: tuple[int, ...] = static()
    dtype_name: str = static()

    @property
    def traits(self) -> Traits:
        """A matmul of its own."""
        return Traits(own_matmul=True)

    @property
    def _stack(self) -> tuple[int, ...]:
        """Sizes of the stack."""
        if self.scale is not None:
            return tuple(self.scale.shape)
        return tuple(self.buckets.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.logical_shape((*self._stack, *self.sizes))

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def method(self) -> str:
        """``"hashed to 64 buckets"``, with blocks and the method of the buckets."""
        if self.buckets is None:
            return "hashed to shared buckets"
        block = self.hashing.block
        blocks = "" if block == (1, 1) else f" in {block[0]}x{block[1]}"
        inner = f", {self.buckets.method}" if isinstance(self.buckets, Leaf) else ""
        return f"hashed to {self.buckets.shape[-1]} buckets{blocks}{inner}"

    def materialize(self) -> jax.Array:
        """The dense values, looked up place by place."""
        core = self.shape[len(self._stack) :]
        return self._at([np.arange(n, dtype=np.int32) for n in core])

    def _at(self, coordinates: Sequence[Any]) -> jax.Array:
        """The outer product of ``int32[n]`` coordinates along each axis of the core."""
        axes = [
            jnp.expand_dims(c, [i for i in range(len(coordinates)) if i != axis])
            for axis, c in enumerate(coordinates)
        ]
        major = self.sizes[-1] // math.prod(self.layout.minor)
        rows = _flat(axes, self.layout.out, self.sizes[:-1])
        columns = _flat(axes, self.layout.contract, (major, *self.layout.minor))

        def values(buckets: jax.Array, first: jax.Array) -> jax.Array:
            return look_up(buckets, rows + first, columns, self.hashing)

        for _ in self._stack:
            values = jax.vmap(values)
        first = self.first
        first = jnp.zeros(self._stack, jnp.int32) if first is None else first
        return values(self._table(), first).astype(self.dtype)

    def _table(self) -> jax.Array:
        """``float32[*stack, B]``: what a place's value is, up to its sign."""
        buckets = self.buckets
        if isinstance(buckets, Leaf):
            buckets = dequantize(buckets)
        buckets = buckets.astype(jnp.float32)
        return buckets if self.scale is None else buckets * self.scale[..., None]

    def values(self) -> tuple[Any, ...]:
        """The buckets, unless several weights share them."""
        buckets = self.buckets
        if self.scale is not None:
            return ()
        return buckets.values() if isinstance(buckets, Leaf) else (buckets,)

    def value_axes(self) -> tuple[Any, ...]:
        """Buckets are the inputs of one output; stacks stay."""
        if self.scale is not None:
            return ()
        axes = Axes(contract=(-1,), stack=len(self._stack))
        whole = tuple(self.buckets.shape)
        return tuple(axes if v.shape == whole else None for v in self.values())

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the buckets.

        Raises:
          OrderError: If several weights share them: each would be changed by itself.
        """
        if self.scale is not None:
            raise OrderError(
                f"{self.method}: several weights share the buckets, on which a later "
                "transform cannot act once; give it to the sharing one: "
                "hashing.shared(rule=...)."
            )
        return self.replace(buckets=map_value(f, self.buckets))

    def relayout(self, op: LayoutOp) -> Leaf:
        """The layout of the core follows; stacks must stay in front."""
        if isinstance(op, Cast):
            narrower = np.dtype(op.dtype).itemsize <= 4 and self.dtype == jnp.float32
            return (
                self.replace(dtype_name=op.dtype.name) if narrower else NotImplemented
            )
        stack = len(self._stack)
        inner = _of_core(op, self._stack)
        if inner is None:
            return NotImplemented
        layout = self.layout.relayout(inner, self.shape[stack:])
        if layout is NotImplemented:
            return NotImplemented
        return self.replace(layout=layout)

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if len(self._stack) >= ndim else NotImplemented

    def take(self, index: jax.Array) -> jax.Array:
        """Rows of the first axis, each looked up by itself."""
        if self._stack:
            return NotImplemented
        rest = [np.arange(n, dtype=np.int32) for n in self.shape[1:]]
        flat = index.astype(jnp.int32).reshape(-1)
        return self._at([flat, *rest]).reshape(*index.shape, *self.shape[1:])

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """By the kernel that computes hashes; no dense weight is kept for gradients.

        Not of a whole stack whose layers hash apart; of a layer of it.
        """
        site = Site.of(self, x, dimension_numbers, leaf_is_lhs)
        stacks = tuple(range(len(self._stack)))
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        batched = site is not None and tuple(s for _, s in site.batch) == stacks
        apart = stacks and self.first is not None
        if site is None or not batched or not floats or apart:
            return dense_dot_general(
                self, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            )
        x = self.prepare_activations(x, site.contract)
        rows, out = kernel_rows(x, site), self.sizes[:-1]
        dtype = result_dtype(x, self, params)
        n, table = math.prod(out), self._table()
        origin = (0 if self.first is None else self.first, 0)
        y = hashed_matmul(rows, table, self.hashing, n=n, origin=origin).astype(dtype)
        m = math.prod(rows.shape[len(stacks) : -1])
        choice = choose(
            *(m, n, self.sizes[-1], table.shape[-1], self.hashing),
            target=current_target(),
        )
        return Ran(kernel_result(y, rows, out, site), choice.how)

    def prepare_activations(
        self, x: jax.Array, axes: tuple[int, ...] = (-1,)
    ) -> jax.Array:
        """As the buckets do."""
        buckets = self.buckets
        return buckets.prepare_activations(x, axes) if isinstance(buckets, Leaf) else x

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> HashedArray:
        """Stacks can be cut; a bucket belongs to the whole weight."""
        stack = len(self._stack)
        if any(entry is not None for entry in spec[stack:]):
            raise ValueError(
                f"{self.method}: the buckets belong to all of the weight, so its own "
                f"axes cannot be cut; got {tuple(spec)}. Replicate it, as with "
                "PartitionSpec(): its buckets are small, and XLA shards what is looked "
                "up."
            )
        lead = PartitionSpec(*spec[:stack])
        own = (*spec[:stack], None)
        inner = isinstance(self.buckets, Leaf)
        return self.replace(
            buckets=self.buckets.component_specs(own, sizes)
            if inner
            else PartitionSpec(*own),
            scale=None if self.scale is None else lead,
            first=None if self.first is None else lead,
        )


def _flat(coordinates: Sequence[Any], axes: Sequence[int], sizes: Sequence[int]) -> Any:
    """The place along some axes, flattened in this order."""
    step = lambda place, axis: place * axis[1] + coordinates[axis[0]]
    zero = jnp.zeros((1,) * len(coordinates), jnp.int32)
    return functools.reduce(step, zip(axes, sizes, strict=True), zero)


def _of_core(op: LayoutOp, stack: Sequence[int]) -> Any:
    """The operation on the axes after the stacks, or None if those move."""
    n = len(stack)
    match op:
        case Transpose(permutation=p) if p[:n] == tuple(range(n)):
            return Transpose(permutation=tuple(i - n for i in p[n:]))
        case Reshape(shape=new) if tuple(new[:n]) == tuple(stack):
            return Reshape(shape=tuple(new[n:]))
    return None
