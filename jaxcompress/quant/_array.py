"""`QuantizedArray`: codes and scales in place of a weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.coded import CodedLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    FROZEN,
    Cast,
    LayoutOp,
    Leaf,
    Place,
    Ran,
    Traits,
    component,
    dense_dot_general,
    leaf_type,
    relayout_array,
    result_dtype,
    static,
)
from jaxcompress.quant import _matmul, _weight_only
from jaxcompress.quant._activations import Activations, fake_quantize_activations
from jaxcompress.quant._elements import E4M3, Binary, Element, Table
from jaxcompress.quant._granularity import Flat, split_blocks, spread
from jaxcompress.quant._kernels import portable_operand
from jaxcompress.quant._rounding import power_of_two
from kernels_pallas import packing


@leaf_type
class QuantizedArray(CodedLeaf):
    """A weight as low-bit codes and scales.

    In storage order, with ``b`` bits a code and ``G`` groups along the contracting
    axes, ``w[..., o, k] = (code[o, k] - zero[o, k // g]) * scale[o, k // g]``.

    Attributes:
      words: ``uint8[*stack, *out, ceil(K * b / 8)]``, packed along the contracting
        axes; or, in a training view, ``uint8`` codes in the logical shape.
      scale: ``[*stack, *out_blocks, G]`` floats, or uint8 codes of scales.
      zero_point: ``uint8``, as `scale`; of asymmetric integers.
      tensor_scale: ``float32[*stack, 1, ...]``; of two-level scales.
      activation_scale: ``float32[*stack, 1, ...]``; of static activations.
      activation_zero: Its zero point.
      element: What a code stands for.
      scale_format: How `scale` is stored.
      label: Name for reports.
      layout: How the axes lie in storage.
      packed: Whether `words` are packed.
      pad: Codes of padding at the end of the packed axis.
      dtype_name: Logical dtype.
      activations: How the matmul treats its other operand.
    """

    words: jax.Array = component(role=FROZEN)
    scale: jax.Array = component(role=FROZEN)
    zero_point: jax.Array | None = component(role=FROZEN, default=None)
    tensor_scale: jax.Array | None = component(role=FROZEN, default=None)
    activation_scale: jax.Array | None = component(role=FROZEN, default=None)
    activation_zero: jax.Array | None = component(role=FROZEN, default=None)
    element: Element = static()
    scale_format: str = static()
    label: str = static()
    layout: Layout = static()
    packed: bool = static()
    pad: int = static()
    dtype_name: str = static()
    activations: Activations | None = static(default=None)

    @property
    def traits(self) -> Traits:
        """Zero where it is on the grid; a kernel, or activations quantized too."""
        if isinstance(self.element, Table):
            zero = 0.0 in self.element.values
        else:
            zero = not isinstance(self.element, Binary)
        return Traits(
            preserves_zeros=zero,
            elementwise=True,
            own_matmul=self.activations is not None or _weight_only.has_kernel(self),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        if not self.packed:
            return tuple(self.words.shape)
        return self.layout.logical_shape((*self.words.shape[:-1], self.inputs))

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def method(self) -> str:
        """``"int4 g128"``."""
        return self.label

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.element.bits

    @property
    def inputs(self) -> int:
        """Contracting elements of packed words."""
        return self.words.shape[-1] * 8 // self.bits - self.pad

    def codes(self) -> jax.Array:
        """``uint8`` codes in the logical shape."""
        if self.packed:
            return self.layout.from_storage(self.elements())
        return self._checked_words()

    def elements(self) -> jax.Array:
        """``uint8[*stack, *out, K]`` codes in storage order."""
        if self.packed:
            return packing.unpack(self.words, bits=self.bits, count=self.inputs)
        return self.layout.to_storage(self._checked_words())

    def _checked_words(self) -> jax.Array:
        if self.words.dtype != jnp.uint8:
            raise TypeError(
                f"QuantizedArray: words must be uint8; got {self.words.dtype}. "
                "Arithmetic over a tree of compressed leaves (x * 2, averaging) "
                "corrupts codes: act on the params before `compress`."
            )
        return self.words

    def packed_codes(self) -> dict[str, int]:
        """The codes."""
        return {"words": self.bits if self.packed else 8}

    def with_elements(self, codes: jax.Array) -> QuantizedArray:
        """The leaf with other codes ``uint8[*stack, *out, K]``, unpacked."""
        return self.replace(words=self.layout.from_storage(codes), packed=False, pad=0)

    def without_elements(self) -> QuantizedArray:
        """The leaf without its codes, which are stored elsewhere."""
        return self.replace(words=None)

    def pack(self) -> QuantizedArray:
        """The stored form of a training view."""
        if self.packed:
            return self
        codes = self.elements()
        words = packing.pack(codes, bits=self.bits)
        pad = words.shape[-1] * 8 // self.bits - codes.shape[-1]
        return self.replace(words=words, packed=True, pad=pad)

    def unpack(self) -> QuantizedArray:
        """The same values with unpacked codes."""
        return self.with_elements(self.elements()) if self.packed else self

    def scales(self) -> jax.Array:
        """float32 scales in storage order."""
        if self.scale_format == "e8m0":
            exponent = self.scale.astype(jnp.int32) - 127
            return jnp.where(self.scale > 0, power_of_two(exponent), 0.0)
        if self.scale_format == "nvfp4":
            assert self.tensor_scale is not None
            return E4M3.decode(self.scale) * self.tensor_scale
        return self.scale.astype(jnp.float32)

    def materialize(self) -> jax.Array:
        """The dense values."""
        flat = Flat(self.shape, self.layout)
        codes = flat.flatten(self.codes())
        scale = flat.from_storage(self.scales())
        parts, _ = split_blocks(self.element.decode(codes), scale.shape)
        if self.zero_point is not None:
            zero = flat.from_storage(self.zero_point).astype(jnp.float32)
            parts = parts - spread(zero, codes.shape)
        values = parts * spread(scale, codes.shape)
        return flat.unflatten(values.reshape(codes.shape)).astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Transposes and reshapes change the layout; words stay where they are."""
        if isinstance(op, Cast):
            narrower = np.dtype(op.dtype).itemsize <= 4 and self.dtype == jnp.float32
            return (
                self.replace(dtype_name=op.dtype.name) if narrower else NotImplemented
            )
        layout = self.layout.relayout(op, self.shape)
        if layout is NotImplemented:
            return NotImplemented
        words = self.words if self.packed else relayout_array(self.words, op)
        return self.replace(words=words, layout=layout)

    def stacked(self, ndim: int) -> Leaf:
        """Count the first axes as stacks, with a scale for each entry."""
        layout = self.layout.stacked(ndim, len(self.shape))
        if layout is NotImplemented:
            return NotImplemented
        if layout is self.layout:
            return self
        grown = {
            name: _grow(a, self.shape[:ndim])
            for name, (a, _) in self.components().items()
            if name != "words"
        }
        return self.replace(layout=layout, **grown)

    def written(self, values: jax.Array, place: Place) -> Leaf:
        """Codes and scales of the values, where each has scales of its own."""
        from jaxcompress.quant._cache import encode_like

        if self.stacked(place.axes) is not self:
            return NotImplemented  # Parts that share scales cannot be written apart.
        part = encode_like(self, values)
        if part is NotImplemented:
            return NotImplemented
        return jax.tree.map(place.write, self, part)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """By a kernel, if for weights alone; with activations by integers that fit."""
        dense = functools.partial(
            dense_dot_general,
            self,
            dimension_numbers=dimension_numbers,
            leaf_is_lhs=leaf_is_lhs,
            **params,
        )
        if not self.traits.own_matmul:
            return dense(x)
        site = _matmul.Site.of(self, x, dimension_numbers, leaf_is_lhs)
        if self.activations is None:
            floats = jnp.issubdtype(x.dtype, jnp.floating)
            if site is None or not floats or not _weight_only.pays(self, x, site):
                return dense(x)
            dtype = result_dtype(x, self, params)
            batch = tuple(s for _, s in site.batch)
            operand = portable_operand(self.pack(), batch)
            return _weight_only.weight_only_dot(operand, x, site, dtype)
        if site is not None and _matmul.fits_int8(self):
            return _matmul.int8_dot(self, x, site, params)
        axes = tuple(dimension_numbers[0][1 if leaf_is_lhs else 0])
        batch = () if site is None else site.batch
        ran = dense(self.prepare_activations(x, axes, batch))
        return Ran(ran.out, "fake-quantized dot")

    def ragged_dot_general(
        self, x: jax.Array, group_sizes: jax.Array, numbers: Any, **params: Any
    ) -> Ran:
        """By the kernel, which reads the weights of experts that have rows."""
        if (
            self.activations is not None
            or not self.traits.own_matmul
            or not jnp.issubdtype(x.dtype, jnp.floating)
            or not _weight_only.by_experts(self, numbers)
        ):
            return super().ragged_dot_general(x, group_sizes, numbers, **params)
        dtype = result_dtype(x, self, params)
        operand = portable_operand(self.pack(), (0,))
        return _weight_only.ragged_weight_only_dot(operand, x, group_sizes, dtype)

    def prepare_activations(
        self,
        x: jax.Array,
        axes: tuple[int, ...] = (-1,),
        batch: Sequence[tuple[int, int]] = (),
    ) -> jax.Array:
        """Fake-quantize the other operand, a token being a slice along `axes`.

        Args:
          x: The other operand.
          axes: Its contracted axes.
          batch: Its batch axes, each with the storage axis that goes with it.
        """
        if self.activations is None:
            return x
        given = (self.activation_scale, self.activation_zero)
        scale, zero = (
            None if a is None else self.along(a, x.ndim, batch) for a in given
        )
        return fake_quantize_activations(
            x, self.activations, axes=axes, scale=scale, zero=zero
        )

    def along(
        self, a: jax.Array, ndim: int, batch: Sequence[tuple[int, int]]
    ) -> jax.Array:
        """A calibrated number for each stack entry, to broadcast against x.

        Args:
          a: One number an entry, in storage order.
          ndim: Axes of x.
          batch: Batch axes of x, each with the storage axis that goes with it.
        """
        varying = {i for i, n in enumerate(a.shape) if n > 1}
        pairs = sorted((axis, i) for axis, i in batch if i in varying)
        if len(pairs) < len(varying):
            raise ValueError(
                f"{self.label}: static activations with one scale a stack entry, of "
                f"shape {a.shape}, need the stack sliced (scan over the layers) or "
                "batched with the activations; here use dynamic activations."
            )
        ordered = jnp.moveaxis(a, [i for _, i in pairs], range(len(pairs)))
        sizes = [1] * ndim
        for axis, i in pairs:
            sizes[axis] = a.shape[i]
        return ordered.reshape(sizes)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> QuantizedArray:
        """Words and scales cut like the weight; whole words and groups only."""
        full = self.layout.absorb_stack(len(self.shape) - len(self.layout.order))
        spec = tuple(spec)
        out = [spec[a] for a in full.out]
        major, *minor = (spec[a] for a in full.contract)
        if any(m is not None for m in minor):
            raise ValueError(
                f"{self.label}: of the contracting axes {full.contract} only the first "
                f"may be sharded; got {spec}."
            )
        for name, entry in zip(full.contract[:1], [major], strict=True):
            self._check_cut(name, _parts(entry, sizes))
        words = PartitionSpec(*out, major) if self.packed else PartitionSpec(*spec)
        return self.replace(
            words=words,
            **{
                name: self._spec_of(a, out, major, sizes)
                for name, (a, _) in self.components().items()
                if name != "words"
            },
        )

    def _spec_of(self, a: jax.Array, out: list[Any], major: Any, sizes: Any) -> Any:
        entries = [*out, major]
        for i, (n, entry) in enumerate(zip(a.shape, entries, strict=True)):
            if n == 1:
                entries[i] = None
            elif n % _parts(entry, sizes):
                raise ValueError(
                    f"{self.label}: {n} blocks of scales along storage axis {i} cannot "
                    f"be cut in {_parts(entry, sizes)} parts; shard it by a divisor of "
                    f"{n}."
                )
        return PartitionSpec(*entries)

    def _check_cut(self, axis: int, parts: int) -> None:
        if parts == 1:
            return
        size = self.shape[axis]
        k = math.prod(self.shape[a] for a in self.layout.contract)
        per_word = 8 // math.gcd(self.bits, 8) if self.packed else 1
        groups = self.scale.shape[-1]
        able = [
            n
            for n in range(2, size + 1)
            if size % n == 0
            and (k // n) % per_word == 0
            and (groups == 1 or groups % n == 0)
        ]
        if parts not in able:
            raise ValueError(
                f"{self.label}: axis {axis} of size {size} cannot be cut in {parts} "
                f"parts inside words or groups; it can be cut in {able}."
            )


def _parts(entry: Any, sizes: dict[Any, int]) -> int:
    if entry is None:
        return 1
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(sizes[name] for name in names)


def _grow(a: jax.Array, full: tuple[int, ...]) -> jax.Array:
    """Repeat block values until the first axes have their full sizes."""
    for axis, n in enumerate(full):
        if a.shape[axis] != n:
            a = jnp.repeat(a, n // a.shape[axis], axis=axis)
    return a
