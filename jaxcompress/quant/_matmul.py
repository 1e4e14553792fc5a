"""The integer matmul of a leaf whose weights and activations are both integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxcompress.layout import Layout
from jaxcompress.leaf import Ran, dense_dot_general, result_dtype
from jaxcompress.quant._activations import activation_scale, encode_activations
from jaxcompress.quant._elements import Integer, Ternary
from jaxcompress.quant._kernels import (
    as_matrices,
    kernel_result,
    kernel_rows,
    portable_operand,
)
from kernels_pallas import formats
from kernels_pallas.scaled_matmul import int8_matmul

if TYPE_CHECKING:
    from jaxcompress.quant._array import QuantizedArray


class Stored(Protocol):
    """A leaf whose elements lie in storage order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        ...

    @property
    def layout(self) -> Layout:
        """How the axes lie in storage."""
        ...


class Site(NamedTuple):
    """A `dot_general` between ``x`` and a leaf, in storage terms.

    Attributes:
      batch: Pairs of batch axes (of x, of storage), by storage axis.
      contract: Contracted axes of x, in the order the leaf flattens them.
      free: The other axes of x.
      order: Permutation from ``[batch, x free, out in storage order]`` to the
        result's axes.
      dimension_numbers: As given.
      leaf_is_lhs: As given.
    """

    batch: tuple[tuple[int, int], ...]
    contract: tuple[int, ...]
    free: tuple[int, ...]
    order: tuple[int, ...]
    dimension_numbers: Any
    leaf_is_lhs: bool

    @classmethod
    def of(
        cls,
        leaf: Stored,
        x: jax.Array,
        dimension_numbers: Any,
        leaf_is_lhs: bool,
    ) -> Site | None:
        """The site, or None if it does not contract the leaf's contracting axes."""
        contract, batch = dimension_numbers
        i, j = (0, 1) if leaf_is_lhs else (1, 0)
        rank = len(leaf.shape)
        layout = leaf.layout.absorb_stack(rank - len(leaf.layout.order))
        wanted = [a + rank for a in layout.contract]
        pairs = dict(zip(contract[i], contract[j], strict=True))
        if set(pairs) != set(wanted):
            return None
        place = {a + rank: n for n, a in enumerate(layout.out)}
        x_contract = tuple(pairs[a] for a in wanted)
        batched = list(zip(batch[j], batch[i], strict=True))
        ordered = sorted((place[w], a) for a, w in batched)
        taken = {*x_contract, *batch[j]}
        free = tuple(a for a in range(x.ndim) if a not in taken)
        # Where each axis of the result comes from.
        by_storage = [place[w] for _, w in batched]
        lead = [sorted(by_storage).index(s) for s in by_storage]
        x_axes = [len(batched) + n for n in range(len(free))]
        rest = sorted(set(place.values()) - set(by_storage))
        start = len(batched) + len(free)
        logical = sorted((a for a in place if place[a] in rest), key=lambda a: a)
        w_axes = [start + rest.index(place[a]) for a in logical]
        tail = w_axes + x_axes if leaf_is_lhs else x_axes + w_axes
        return cls(
            batch=tuple((a, s) for s, a in ordered),
            contract=x_contract,
            free=free,
            order=tuple(lead + tail),
            dimension_numbers=dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
        )


def fits_int8(leaf: QuantizedArray) -> bool:
    """Whether both operands are symmetric integers, their scales outside the sum."""
    act = leaf.activations
    whole = isinstance(leaf.element, Ternary) or (
        isinstance(leaf.element, Integer)
        and leaf.element.symmetric
        and leaf.element.fraction == 0
    )
    return (
        whole
        and _outside_the_sum(leaf)
        and act is not None
        and isinstance(act.element, Integer)
        and act.element.symmetric
        and act.element.fraction == 0
    )


def _outside_the_sum(leaf: QuantizedArray) -> bool:
    """Whether a scale belongs to whole outputs, one or all along each axis."""
    *outputs, groups = leaf.scale.shape
    rank = len(leaf.shape)
    layout = leaf.layout.absorb_stack(rank - len(leaf.layout.order))
    sizes = [leaf.shape[a] for a in layout.out]
    return groups == 1 and all(
        n in (1, size) for n, size in zip(outputs, sizes, strict=True)
    )


def int8_dot(
    leaf: QuantizedArray, x: jax.Array, site: Site, params: dict[str, Any]
) -> Ran:
    """``int8 x int8 -> int32``, then scales; gradients of the fake-quantized dot."""

    @jax.custom_jvp
    def run(leaf: QuantizedArray, x: jax.Array) -> jax.Array:
        return _run(leaf, x, site, params)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def reference(leaf: QuantizedArray, x: jax.Array) -> jax.Array:
            x = leaf.prepare_activations(x, site.contract, site.batch)
            return dense_dot_general(
                leaf, x, site.dimension_numbers, leaf_is_lhs=site.leaf_is_lhs, **params
            ).out

        return run(*primals), jax.jvp(reference, primals, tangents)[1]

    return Ran(run(leaf, x), "int8 dot")


def _run(
    leaf: QuantizedArray, x: jax.Array, site: Site, params: dict[str, Any]
) -> jax.Array:
    operand = portable_operand(leaf.pack(), tuple(s for _, s in site.batch))
    assert isinstance(operand.fmt, formats.Integer)
    codes, scale = _encoded(leaf, x, site)
    y = int8_matmul(
        as_matrices(codes, site),
        operand.weight,
        operand.fmt,
        x_scale=as_matrices(scale, site),
        dtype=result_dtype(x, leaf, params),
        **operand.options,
    )
    return kernel_result(y, codes, operand.out, site)


def _encoded(
    leaf: QuantizedArray, x: jax.Array, site: Site
) -> tuple[jax.Array, jax.Array]:
    """int8 activations ``[*batch, *free, K]``, and scales ``[*batch, *free, 1]``."""
    act = leaf.activations
    assert act is not None
    rows = kernel_rows(x, site).astype(jnp.float32)
    if act.static:
        assert leaf.activation_scale is not None
        batch = [(i, s) for i, (_, s) in enumerate(site.batch)]
        scale = leaf.along(leaf.activation_scale, rows.ndim, batch)
    else:
        scale, _ = activation_scale(rows, act, (rows.ndim - 1,))
    codes = encode_activations(rows, scale, None, act.element).astype(jnp.int8)
    return codes, jnp.broadcast_to(scale, (*rows.shape[:-1], 1))
