"""Partition specs of a codebook weight's components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax.sharding import PartitionSpec

from jaxcompress.leaf import Leaf
from kernels_pallas import packing

if TYPE_CHECKING:
    from jaxcompress.codebook._array import CodebookArray


def component_specs(
    leaf: CodebookArray, spec: Sequence[Any], sizes: dict[Any, int]
) -> dict[str, Any]:
    """Specs by name: codes and scales are cut like the weight.

    Args:
      leaf: The weight.
      spec: One entry a logical axis.
      sizes: Of each mesh axis.

    Raises:
      ValueError: If a cut is not of whole words and runs of sub-vectors.
    """
    full = leaf.layout.absorb_stack(len(leaf.shape) - len(leaf.layout.order))
    out = [spec[a] for a in full.out]
    major, *minor = (spec[a] for a in full.contract)
    if any(m is not None for m in minor):
        raise ValueError(
            f"{leaf.method}: of the contracting axes {full.contract} only the "
            f"first may be sharded; got {tuple(spec)}."
        )
    _check_cut(leaf, full.contract[0], _parts(major, sizes))
    blocks = leaf.codebooks.shape[-4]
    entries = (*out[: leaf.own], major if blocks > 1 else None)
    books: Any = PartitionSpec(*entries)
    if isinstance(leaf.codebooks, Leaf):
        books = leaf.codebooks.component_specs((*entries, None, None, None), sizes)
    return {
        "words": PartitionSpec(*out, None, major),
        "codebooks": books,
        "scale": None if leaf.scale is None else PartitionSpec(*out),
    }


def _check_cut(leaf: CodebookArray, axis: int, parts: int) -> None:
    if parts == 1:
        return
    size = leaf.shape[axis]
    k = math.prod(leaf.shape[a] for a in leaf.layout.contract)
    blocks, _, _, d = leaf.codebooks.shape[-4:]
    whole = d * (packing.period(leaf.bits) if leaf.packed else 1)
    able = [
        n
        for n in range(2, size + 1)
        if size % n == 0 and (k // n) % whole == 0 and (blocks == 1 or blocks % n == 0)
    ]
    if parts not in able:
        raise ValueError(
            f"{leaf.method}: axis {axis} of size {size} cannot be cut in {parts} "
            f"parts inside words or runs of sub-vectors; it can be cut in {able}."
        )


def _parts(entry: Any, sizes: dict[Any, int]) -> int:
    if entry is None:
        return 1
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(sizes[name] for name in names)
