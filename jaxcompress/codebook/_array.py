"""`CodebookArray`: indices into tables of values in place of a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.codebook import _matmul, _sharding
from jaxcompress.coded import CodedLeaf
from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import (
    CODEBOOK,
    FROZEN,
    STEP,
    Cast,
    LayoutOp,
    Leaf,
    OrderError,
    Ran,
    Traits,
    component,
    dense_dot_general,
    leaf_type,
    map_value,
    static,
)
from kernels_pallas import packing
from kernels_pallas.codebook_matmul import decode


@leaf_type
class CodebookArray(CodedLeaf):
    """A weight of which ``d`` consecutive inputs at a time are a codebook entry.

    In storage order, with ``A`` codes that are added, ``S = ceil(K / d)`` sub-vectors,
    and ``B`` runs of ``S / B`` of them with codebooks of their own,
    ``w[..., o, d s + j] = scale[o] * sum_a codebooks[s B // S, a, code[o, a, s], j]``.
    ``A = B = d = 1`` shares single weights. The layout says along which axes
    sub-vectors lie: a table ``[vocab, dim]`` with ``contract=(-1,)`` has them in rows.

    Attributes:
      words: ``uint8[*stack, *out, A, ceil(S * b / 8)]`` codes, packed along the
        sub-vectors; or, in a training view, ``uint8[*stack, *out, A, S]``.
      codebooks: ``float[*own, B, A, E, d]``, or a leaf; ``own`` are the first of the
        storage axes, those with codebooks of their own.
      scale: ``float[*stack, *out]``, or None.
      layout: How the axes lie in storage.
      code_bits: Bits of a code, 1 to 8.
      packed: Whether `words` are packed.
      pad: Codes of padding at the end of the packed axis.
      short: Inputs that the last sub-vector lacks.
      zero_entry: Whether entry 0 of each (single) codebook is held at zero.
      dtype_name: Logical dtype.
    """

    words: jax.Array = component(role=FROZEN)
    codebooks: Any = component(role=CODEBOOK)
    scale: jax.Array | None = component(role=STEP, default=None)
    layout: Layout = static()
    code_bits: int = static()
    packed: bool = static(default=True)
    pad: int = static(default=0)
    short: int = static(default=0)
    zero_entry: bool = static(default=False)
    dtype_name: str = static()

    @property
    def traits(self) -> Traits:
        """Zero where an entry is held there; a kernel where the device has one."""
        _, books, _, d = self.codebooks.shape[-4:]
        return Traits(
            preserves_zeros=self.zero_entry,
            elementwise=books == d == 1,
            own_matmul=self.words is not None and _matmul.has_kernel(self),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.layout.logical_shape((*self.words.shape[:-2], self.inputs))

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def method(self) -> str:
        """``"codebook 4 bit"``, ``"codebook 2x8 bit d8"`` of sums of vectors."""
        _, books, _, d = self.codebooks.shape[-4:]
        times = f"{books}x" if books > 1 else ""
        return f"codebook {times}{self.bits} bit{f' d{d}' if d > 1 else ''}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.code_bits

    @property
    def subvectors(self) -> int:
        """``S``: sub-vectors of an output."""
        if not self.packed:
            return self.words.shape[-1]
        return self.words.shape[-1] * 8 // self.bits - self.pad

    @property
    def inputs(self) -> int:
        """``K``: contracting elements of an output."""
        return self.subvectors * self.codebooks.shape[-1] - self.short

    @property
    def own(self) -> int:
        """How many storage axes have codebooks of their own."""
        return len(self.codebooks.shape) - 4

    def codes(self) -> jax.Array:
        """``uint8[*stack, *out, A, S]``."""
        if self.packed:
            return packing.unpack(self.words, bits=self.bits, count=self.subvectors)
        if self.words.dtype != jnp.uint8:
            raise TypeError(
                f"CodebookArray: words must be uint8; got {self.words.dtype}. "
                "Arithmetic over a tree of compressed leaves (x * 2, averaging) "
                "corrupts codes: act on the params before `compress`."
            )
        return self.words

    def elements(self) -> jax.Array:
        """``uint8[*stack, *out, K]`` codes of single weights, in storage order."""
        return self.codes()[..., 0, :]

    def packed_codes(self) -> dict[str, int]:
        """The codes."""
        return {"words": self.bits if self.packed else 8}

    def with_elements(self, codes: jax.Array) -> CodebookArray:
        """The leaf with other codes ``uint8[*stack, *out, K]``, unpacked."""
        return self.replace(words=codes[..., None, :], packed=False, pad=0)

    def without_elements(self) -> CodebookArray:
        """The leaf without its codes, which are stored elsewhere."""
        return self.replace(words=None)

    def pack(self) -> CodebookArray:
        """The stored form of a training view."""
        if self.packed:
            return self
        words = packing.pack(self.codes(), bits=self.bits)
        pad = words.shape[-1] * 8 // self.bits - self.words.shape[-1]
        return self.replace(words=words, packed=True, pad=pad)

    def entries(self) -> jax.Array:
        """``float32[*own, B, A, E, d]`` codebooks, entry 0 at zero where it is held."""
        books = self.codebooks
        books = books.materialize() if isinstance(books, Leaf) else books
        books = books.astype(jnp.float32)
        return books.at[..., 0, :].set(0.0) if self.zero_entry else books

    def materialize(self) -> jax.Array:
        """The dense values."""
        codes, entries = self.codes(), self.entries()
        own, lead = entries.shape[: self.own], codes.shape[:-2]
        run = decode
        for _ in own:
            run = jax.vmap(run)
        w = run(codes.reshape(*own, -1, *codes.shape[-2:]), entries)
        w = w.reshape(*lead, -1)[..., : self.inputs]
        if self.scale is not None:
            w = w * self.scale.astype(jnp.float32)[..., None]
        return self.layout.from_storage(w).astype(self.dtype)

    def values(self) -> tuple[Any, ...]:
        """The codebooks."""
        books = self.codebooks
        return books.values() if isinstance(books, Leaf) else (books,)

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the codebooks; every code keeps its entry.

        Raises:
          OrderError: If `f` is for the weights themselves: a mask, quantized
            activations.
        """
        return self.replace(codebooks=entries_after(f, self.codebooks))

    def value_axes(self) -> tuple[Any, ...]:
        """Entries along an axis -2, every codebook for itself."""
        books = self.codebooks
        if isinstance(books, Leaf):
            return books.value_axes()
        return (Axes(contract=(-2,), stack=books.ndim - 2),)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Transposes and reshapes change the layout; words stay where they are."""
        if isinstance(op, Cast):
            narrower = np.dtype(op.dtype).itemsize <= 4 and self.dtype == jnp.float32
            return (
                self.replace(dtype_name=op.dtype.name) if narrower else NotImplemented
            )
        layout = self.layout.relayout(op, self.shape)
        return (
            NotImplemented if layout is NotImplemented else self.replace(layout=layout)
        )

    def stacked(self, ndim: int) -> Leaf:
        """Count the first axes as stacks, with codebooks for each entry."""
        layout = self.layout.stacked(ndim, len(self.shape))
        if layout is NotImplemented:
            return NotImplemented
        if self.own >= ndim:
            return self.replace(layout=layout)
        books = self.codebooks
        books = books.materialize() if isinstance(books, Leaf) else books
        core = books.shape[self.own :]
        books = books.reshape(
            *books.shape[: self.own], *(1,) * (ndim - self.own), *core
        )
        books = jnp.broadcast_to(books, (*self.shape[:ndim], *core))
        return self.replace(layout=layout, codebooks=books)

    def map_leading(self, f: Callable[[jax.Array], jax.Array], ndim: int) -> Leaf:
        """Codes and scales alone, where all entries share the codebooks."""
        layout = self.layout.stacked(ndim, len(self.shape))
        if layout is NotImplemented or self.own:
            return super().map_leading(f, ndim)
        scale = None if self.scale is None else f(self.scale)
        return self.replace(words=f(self.words), scale=scale, layout=layout)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """By the kernel for weights too large for a dense copy."""
        dense = functools.partial(
            dense_dot_general,
            self,
            x,
            dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            **params,
        )
        if not self.traits.own_matmul:
            return dense()
        site = _matmul.site_of(self, x, dimension_numbers, leaf_is_lhs)
        if site is None:
            return dense()
        return _matmul.codebook_dot(self, x, site, params)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> CodebookArray:
        """Codes and scales cut like the weight; whole words and runs only."""
        return self.replace(**_sharding.component_specs(self, spec, sizes))


def entries_after(f: Callable[[jax.Array], jax.Array | Leaf], books: Any) -> Any:
    """Codebooks after `f`; they stay tables of values that weights share.

    Raises:
      OrderError: If `f` cannot act on them, or makes something else.
    """
    shape = tuple(books.shape)
    try:
        found = map_value(f, books)
        dense = found.materialize if isinstance(found, Leaf) else lambda: found
        same = jax.eval_shape(dense).shape == shape
    except (TypeError, ValueError, AssertionError) as error:
        raise OrderError(
            f"it cannot act on values that weights share, of shape {shape}: {error}"
        ) from error
    if not same or (isinstance(found, Leaf) and found.traits.own_matmul):
        raise OrderError(
            f"it acts on weights or activations, not on {math.prod(shape)} values that "
            "weights share; chain it before the codebook."
        )
    return found
