"""`repack`: quantized weights in the order that a chip's kernel reads."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    FROZEN,
    Cast,
    LayoutOp,
    Leaf,
    Ran,
    Traits,
    component,
    dense_dot_general,
    leaf_type,
    result_dtype,
    static,
)
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._kernels import (
    Operand,
    kernel_format,
    portable_operand,
)
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._scales import stored_scale
from jaxcompress.quant._weight_only import (
    by_experts,
    ragged_weight_only_dot,
    weight_only_dot,
)
from kernels_pallas import layouts
from kernels_pallas.formats import Table
from kernels_pallas.layouts import LAYOUTS, Stored, Weight
from kernels_pallas.target import current_target


def repack(params: Any, to: str | None = None) -> Any:
    """Put quantized weights in the order that a device's kernels read.

    Once, after `compress` or `io.load`, on the machine that runs the model. A weight
    that has no kernel there (quantized activations, which XLA multiplies well by
    itself; tables of more than 16 entries; groups across the kernel's tiles) stays as
    it is. Files hold the portable order: `io.save` undoes this.

    Args:
      params: A pytree with compressed leaves.
      to: ``"tpu"``, ``"gpu"`` or ``"portable"``; by default what the device in use
        reads. Static.

    Returns:
      The pytree with `RepackedArray` leaves; their values are the same, bit for bit.

    Raises:
      ValueError: If `to` names no layout.

    Examples:
      >>> import jaxcompress as jc
      >>> leaf = jc.quant.quantize(jnp.eye(256), jc.quant.int4(group_size=128))
      >>> turned = repack({"w": leaf}, to="tpu")["w"]
      >>> turned.words.shape, turned.words.dtype.name, turned.shape
      ((32, 256), 'int32', (256, 256))
      >>> bool((turned.materialize() == leaf.materialize()).all())
      True
    """
    to = current_target().reads if to is None else to
    if to not in LAYOUTS:
        raise ValueError(
            f"repack: to must be one of {sorted(LAYOUTS)}; got {to!r}. The default is "
            "that of the device in use."
        )

    def turn(leaf: Any) -> Any:
        leaf = leaf.portable() if isinstance(leaf, Leaf) else leaf
        if to == "portable" or not _has_kernel(leaf, to):
            return leaf
        return _repacked(leaf, to)

    return jax.tree.map(turn, params, is_leaf=lambda a: isinstance(a, Leaf))


def _has_kernel(leaf: Any, to: str) -> bool:
    if not isinstance(leaf, QuantizedArray) or leaf.activations is not None:
        return False
    fmt, _ = kernel_format(leaf.element)
    small = not isinstance(fmt, Table) or fmt.bits in (
        (3, 4) if to == "gpu" else range(5)
    )
    k, groups = leaf.inputs, leaf.scale.shape[-1]
    whole = groups == 1 or (k // groups) in (32, 64, 128, 256)
    return leaf.packed and small and whole


def _repacked(leaf: QuantizedArray, to: str) -> RepackedArray:
    stack = leaf.layout.stack_ndim(leaf.words.ndim)
    operand = portable_operand(leaf, tuple(range(stack)))
    k = leaf.inputs
    turn = lambda w: layouts.repack(
        w, operand.fmt, n=math.prod(operand.out), k=k, to=LAYOUTS[to]
    )
    for _ in range(stack):
        turn = jax.vmap(turn)
    words, scale, zero = turn(operand.weight)
    return RepackedArray(
        words=words,
        scale=scale,
        zero=zero,
        frame=leaf.replace(words=None, scale=None, zero_point=None),
        device=to,
        out=operand.out,
        blocks=tuple(leaf.scale.shape[stack:]),
        k=k,
    )


@leaf_type
class RepackedArray(Leaf):
    """A `QuantizedArray` in the layout of a device's kernels; see `repack`.

    Attributes:
      words: Codes, ``[*stack, ...]`` in the layout `device` of
        `kernels_pallas.layouts`.
      scale: float32 scales in that layout.
      zero: Zero points in that layout.
      frame: The rest of the portable leaf.
      device: Name of the layout.
      out: Sizes of the output axes, in storage order.
      blocks: Shape of one weight's scales in the portable leaf.
      k: Inputs.
    """

    words: jax.Array = component(role=FROZEN)
    scale: jax.Array = component(role=FROZEN)
    zero: jax.Array | None = component(role=FROZEN, default=None)
    frame: QuantizedArray = component(role=FROZEN)
    device: str = static()
    out: tuple[int, ...] = static()
    blocks: tuple[int, ...] = static()
    k: int = static()

    @property
    def traits(self) -> Traits:
        """Those of the portable leaf, with a matmul of its own."""
        return self.frame.traits._replace(own_matmul=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        storage = (*self.words.shape[:-2], *self.out, self.k)
        return self.layout.logical_shape(storage)

    @property
    def layout(self) -> Layout:
        """How the axes lie in storage."""
        return self.frame.layout

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self.frame.dtype

    @property
    def method(self) -> str:
        """``"int4 g128"``, and the device."""
        return f"{self.frame.label} ({self.device} layout)"

    def portable(self) -> QuantizedArray:
        """The leaf this was made of, bit for bit."""
        fmt, unit = kernel_format(self.frame.element)
        groups = self.blocks[-1]
        n = math.prod(self.out)
        stored = Stored(fmt, n, self.k, groups, LAYOUTS[self.device])
        back = lambda w: layouts.unpack(w, stored)
        stack = self.words.shape[:-2]
        for _ in stack:
            back = jax.vmap(back)
        words, scale, zero = back(Weight(self.words, self.scale, self.zero))

        def side(a: jax.Array) -> jax.Array:
            """One value a block of outputs."""
            a = a.reshape(*stack, *self.out, groups)
            steps = (m // n for m, n in zip(self.out, self.blocks[:-1], strict=True))
            every = (slice(None),) * len(stack)
            return a[(*every, *(slice(None, None, step) for step in steps))]

        frame = self.frame
        return frame.replace(
            words=words.reshape(*stack, *self.out, -1),
            scale=stored_scale(
                side(scale) / unit, frame.scale_format, frame.tensor_scale
            ),
            zero_point=None if zero is None else side(zero).astype(jnp.uint8),
        )

    def materialize(self) -> jax.Array:
        """As the portable leaf."""
        return self.portable().materialize()

    def relayout(self, op: LayoutOp) -> Leaf:
        """Transposes and reshapes change the layout; words stay where they are."""
        if isinstance(op, Cast):
            frame = self.frame.replace(dtype_name=op.dtype.name)
            return self.replace(frame=frame)
        layout = self.layout.relayout(op, self.shape)
        if layout is NotImplemented or self.words.ndim > 2:
            return NotImplemented
        return self.replace(frame=self.frame.replace(layout=layout))

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self.words.ndim - 2 >= ndim else NotImplemented

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """By the kernel, on its device, where the stack is batched."""
        site = Site.of(self, x, dimension_numbers, leaf_is_lhs)
        stack = tuple(range(self.words.ndim - 2))
        if (
            site is None
            or tuple(s for _, s in site.batch) != stack
            or self.device != current_target().reads
            or not jnp.issubdtype(x.dtype, jnp.floating)
        ):
            return dense_dot_general(
                self, x, dimension_numbers, leaf_is_lhs=leaf_is_lhs, **params
            )
        dtype = result_dtype(x, self, params)
        return weight_only_dot(self._operand(), x, site, dtype)

    def ragged_dot_general(
        self, x: jax.Array, group_sizes: jax.Array, numbers: Any, **params: Any
    ) -> Ran:
        """By the kernel, on a TPU, where the stack is the experts."""
        if (
            self.words.ndim != 3
            or (self.device, current_target().reads) != ("tpu", "tpu")
            or not jnp.issubdtype(x.dtype, jnp.floating)
            or not by_experts(self, numbers)
        ):
            return super().ragged_dot_general(x, group_sizes, numbers, **params)
        dtype = result_dtype(x, self, params)
        return ragged_weight_only_dot(self._operand(), x, group_sizes, dtype)

    def _operand(self) -> Operand:
        return Operand(
            Weight(self.words, self.scale, self.zero),
            kernel_format(self.frame.element)[0],
            self.out,
            LAYOUTS[self.device],
            self.blocks[-1],
        )
