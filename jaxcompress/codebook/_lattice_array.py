"""`LatticeArray`: eight weights at a time as a point of a lattice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.codebook import _e8
from jaxcompress.layout import Layout
from jaxcompress.leaf import (
    FROZEN,
    STEP,
    Cast,
    LayoutOp,
    Leaf,
    component,
    leaf_type,
    static,
)


@leaf_type
class LatticeArray(Leaf):
    """A weight of which 8 consecutive inputs at a time are a point of E8P, scaled.

    ``w[..., o, 8 s : 8 s + 8] = scale[o] * point(words[o, s])``, in storage order: 2
    bits a weight, and no table but one of the program.

    Attributes:
      words: ``uint16[*stack, *out, S]``, one code for each sub-vector.
      scale: ``float[*stack, *out]``.
      layout: How the axes lie in storage.
      short: Inputs that the last sub-vector lacks.
      dtype_name: Logical dtype.
    """

    words: jax.Array = component(role=FROZEN)
    scale: jax.Array = component(role=STEP)
    layout: Layout = static()
    short: int = static(default=0)
    dtype_name: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        *lead, count = self.words.shape
        return self.layout.logical_shape((*lead, count * _e8.DIMS - self.short))

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return jnp.dtype(self.dtype_name)

    @property
    def method(self) -> str:
        """``"lattice E8P"``."""
        return "lattice E8P"

    def materialize(self) -> jax.Array:
        """The dense values."""
        if self.words.dtype != jnp.uint16:
            raise TypeError(
                f"LatticeArray: words must be uint16; got {self.words.dtype}. "
                "Arithmetic over a tree of compressed leaves (x * 2, averaging) "
                "corrupts codes: act on the params before `compress`."
            )
        points = _e8.decode(self.words)
        w = points.reshape(*self.words.shape[:-1], -1)
        w = w[..., : w.shape[-1] - self.short]
        w = w * self.scale.astype(jnp.float32)[..., None]
        return self.layout.from_storage(w).astype(self.dtype)

    def relayout(self, op: LayoutOp) -> Leaf:
        """Transposes and reshapes change the layout; words stay where they are."""
        if isinstance(op, Cast):
            narrower = np.dtype(op.dtype).itemsize <= 4 and self.dtype == jnp.float32
            if not narrower:
                return NotImplemented
            return self.replace(dtype_name=np.dtype(op.dtype).name)
        layout = self.layout.relayout(op, self.shape)
        if layout is NotImplemented:
            return NotImplemented
        return self.replace(layout=layout)

    def stacked(self, ndim: int) -> Leaf:
        """Count the first axes as stacks, if they lead in storage."""
        layout = self.layout.stacked(ndim, len(self.shape))
        if layout is NotImplemented:
            return NotImplemented
        return self.replace(layout=layout)

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> LatticeArray:
        """Codes and scales cut like the weight, between sub-vectors."""
        full = self.layout.absorb_stack(len(self.shape) - len(self.layout.order))
        out = [spec[a] for a in full.out]
        major, *minor = (spec[a] for a in full.contract)
        names = major if isinstance(major, tuple) else (major,)
        parts = 1
        for name in names:
            parts *= 1 if name is None else sizes[name]
        if any(m is not None for m in minor) or (
            parts > 1 and (self.short or self.words.shape[-1] % parts)
        ):
            raise ValueError(
                f"{self.method}: the {self.words.shape[-1]} sub-vectors of 8 cannot be "
                f"cut as {tuple(spec)} says; cut the outputs, or only the first "
                "contracting axis, between sub-vectors."
            )
        return self.replace(words=PartitionSpec(*out, major), scale=PartitionSpec(*out))
