"""`NMArray`: the stored form of a weight that keeps N of every M inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jaxcompress import coded
from jaxcompress.coded import CodedLeaf
from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, Leaf, component, leaf_type, static
from jaxcompress.prune import _bitmask
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._sparse import SparseLeaf, join, specs_along
from kernels_pallas import packing


@leaf_type
class NMArray(SparseLeaf):
    """The kept elements of every group, and their places in it.

    ``w[..., o, g m + place[..., o, g n + i]] = element[..., o, g n + i]``, zero
    elsewhere; ``G = ceil(K / m)`` groups lie along the contracting axes. It is the
    portable layout of `kernels_pallas.nm_sparse_matmul`.

    Attributes:
      elements: ``[*stack, *out, G n]`` floats, or ``uint8`` packed codes; those of a
        group in the order of their places.
      places: ``uint8[*stack, *out, ceil(G n b / 8)]``, packed, ``b = log2 m`` bits
        each.
      frame: The quantized leaf without its codes, or None.
      layout: How the axes lie in storage.
      n: Elements kept.
      m: Of so many.
      pad: Places of padding at the end of each row of `places`.
      short: Inputs that the last group lacks.
      dtype_name: Logical dtype.
    """

    elements: jax.Array = component(role=FROZEN)
    places: jax.Array = component(role=FROZEN)
    frame: CodedLeaf | None = component(role=FROZEN, default=None)
    layout: Layout = static()
    n: int = static()
    m: int = static()
    pad: int = static()
    short: int = static()
    dtype_name: str = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        k = self._count // self.n * self.m - self.short
        return self.layout.logical_shape((*self.places.shape[:-1], k))

    @property
    def method(self) -> str:
        """``"2:4"`` and the method of its values."""
        return f"{self.n}:{self.m} {self.kind}"

    @property
    def stack(self) -> int:
        """How many leading axes stack independent weights."""
        return self.layout.stack_ndim(self.places.ndim)

    @property
    def _count(self) -> int:
        """Kept elements of an output."""
        return self.places.shape[-1] * 8 // place_bits(self.m) - self.pad

    def expand(self) -> MaskedArray:
        """The training form: every element in its place."""
        count = self._count
        places = packing.unpack(self.places, bits=place_bits(self.m), count=count)
        elements = coded.unpack(self.elements, self.frame, count)
        lead = places.shape[:-1]
        groups = (*lead, count // self.n, self.n)
        places, elements = places.reshape(groups), elements.reshape(groups)
        input_ = jax.lax.broadcasted_iota(
            jnp.uint8, (*groups[:-1], self.m), len(groups) - 1
        )
        dense = jnp.zeros(input_.shape, elements.dtype)
        kept = jnp.zeros(input_.shape, bool)
        for i in range(self.n):
            here = input_ == places[..., i : i + 1]
            dense = jnp.where(here, elements[..., i : i + 1], dense)
            kept = kept | here
        k = count // self.n * self.m - self.short
        flat = lambda a: a.reshape(*lead, -1)[..., :k]
        mask = self.layout.from_storage(flat(kept))
        return MaskedArray(inner=join(flat(dense), self), mask=mask)

    def packed_codes(self) -> dict[str, int]:
        """Places, and the codes of a quantized weight."""
        codes = {} if self.frame is None else {"elements": self.frame.bits}
        return {"places": place_bits(self.m), **codes}

    def stored_again(self, masked: MaskedArray) -> Leaf:
        """In the same pattern."""
        return store_nm(masked, self.layout, n=self.n, m=self.m)

    def intersection(self, masked: MaskedArray) -> Leaf:
        """As bits, since groups may keep fewer than n."""
        return _bitmask.store(masked, self.layout)

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> NMArray:
        """Stack and output axes can be cut, inputs cannot."""
        full = self.layout.absorb_stack(self.stack)
        entries = [spec[a] for a in full.out]
        if any(spec[a] is not None for a in full.contract):
            raise ValueError(
                f"{self.method}: contracting axes cannot be sharded, since groups are "
                f"packed along them; got {tuple(spec)}. Shard the outputs or the stack."
            )
        return self.replace(
            elements=PartitionSpec(*entries),
            places=PartitionSpec(*entries),
            frame=self.frame and specs_along(entries, self.frame),
        )


def place_bits(m: int) -> int:
    """Bits of a place in a group of `m`."""
    return max((m - 1).bit_length(), 1)


def store_nm(masked: MaskedArray, layout: Layout, *, n: int, m: int) -> NMArray:
    """The stored form of a masked array or masked quantized leaf.

    Args:
      masked: Its mask keeps at most `n` of every `m` consecutive inputs. Where it keeps
        fewer, stored zeros take the places that are left.
      layout: How its axes lie in storage.
      n: Elements to keep.
      m: Of so many.

    Raises:
      ValueError: If the mask keeps more (of a traced mask the first are stored).
    """
    kept = layout.to_storage(masked.mask)
    *lead, k = kept.shape
    short = -k % m

    def grouped(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, [(0, 0)] * len(lead) + [(0, short)])
        return a.reshape(*lead, -1, m)

    _check_groups(grouped(kept), n, m)
    first = jnp.argsort(~grouped(kept), axis=-1, stable=True)[..., :n]
    places = jnp.sort(first, axis=-1)

    def chosen(a: jax.Array) -> jax.Array:
        return jnp.take_along_axis(grouped(a), places, axis=-1).reshape(*lead, -1)

    elements, frame = coded.split(masked.inner, layout)
    elements = chosen(elements)
    if frame is None:
        elements = jnp.where(chosen(kept), elements, jnp.zeros_like(elements))
    codes = places.astype(jnp.uint8).reshape(*lead, -1)
    words = packing.pack(codes, bits=place_bits(m))
    return NMArray(
        elements=coded.pack(elements, frame),
        places=words,
        frame=frame,
        layout=layout,
        n=n,
        m=m,
        pad=words.shape[-1] * 8 // place_bits(m) - codes.shape[-1],
        short=short,
        dtype_name=np.dtype(masked.dtype).name,
    )


def _check_groups(kept: jax.Array, n: int, m: int) -> None:
    if isinstance(kept, Tracer):
        return
    most = int(kept.sum(-1, dtype=jnp.int32).max(initial=0))
    if most > n:
        raise ValueError(
            f"prune.nm: a mask to be stored as {n}:{m} must keep at most {n} of every "
            f"{m} inputs; got {most}. Make it by prune.nm, or store it as bits."
        )
