"""`size`: how large a tree is, by path and in total."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.io import file_bytes
from jaxcompress.leaf import Leaf, materialize, nbytes
from jaxcompress.lift._explain import table

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeRow:
    """Size of one array or leaf.

    Attributes:
      path: Key path.
      method: What was done to it, ``"dense"`` if nothing.
      shape: Logical shape.
      weights: Logical elements.
      memory_bytes: Bytes of its buffers.
      disk_bytes: Bytes it adds to a file, its entry in the manifest included.
    """

    path: str
    method: str
    shape: tuple[int, ...]
    weights: int
    memory_bytes: int
    disk_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of its buffers for each logical element."""
        return 8.0 * self.memory_bytes / max(self.weights, 1)


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """Size of a tree; prints as a table.

    Attributes:
      rows: One an array or leaf.
      disk_bytes: The whole file, as `jaxcompress.io.save` writes it.
    """

    rows: tuple[SizeRow, ...]
    disk_bytes: int

    @property
    def weights(self) -> int:
        """Logical elements."""
        return sum(r.weights for r in self.rows)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(r.memory_bytes for r in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tree in dense float32."""
        return _FLOAT32_BYTES * self.weights

    @property
    def bits_per_weight(self) -> float:
        """Bits of all buffers for each logical element."""
        return 8.0 * self.memory_bytes / max(self.weights, 1)

    @property
    def ratio(self) -> float:
        """Dense float32 bytes for each byte on disk."""
        return self.dense_bytes / max(self.disk_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return {
            "rows": [
                {**dataclasses.asdict(r), "bits_per_weight": r.bits_per_weight}
                for r in self.rows
            ],
            "weights": self.weights,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "dense_bytes": self.dense_bytes,
            "bits_per_weight": self.bits_per_weight,
            "ratio": self.ratio,
        }

    def __str__(self) -> str:
        """One line a leaf, and the total with the file around it."""
        header = ("weight", "shape", "method", "bits/weight", "memory", "disk", "ratio")
        rows = [
            (
                r.path,
                "x".join(map(str, r.shape)),
                r.method,
                f"{r.bits_per_weight:.2f}",
                f"{r.memory_bytes:,}",
                f"{r.disk_bytes:,}",
                f"{_FLOAT32_BYTES * r.weights / max(r.disk_bytes, 1):.1f}x",
            )
            for r in self.rows
        ]
        total = (
            "total",
            f"{self.weights:,}",
            "",
            f"{self.bits_per_weight:.2f}",
            f"{self.memory_bytes:,}",
            f"{self.disk_bytes:,}",
            f"{self.ratio:.1f}x",
        )
        return table(header, [*rows, total])


def size(params: Any) -> SizeReport:
    """Size of every array and leaf of a tree, in memory and on disk.

    Args:
      params: Parameter pytree, compressed or not, concrete or abstract.

    Returns:
      By path and in total: method, bits a weight, bytes in memory (of the real
      buffers), bytes on disk, and the ratio to dense float32.

    Examples:
      >>> import jaxcompress as jc
      >>> params = {"w": jnp.ones((256, 256))}
      >>> report = size(jc.compress(params, {"w": jc.quant.int4()}))
      >>> report.rows[0].method, report.rows[0].memory_bytes
      ('int4', 33792)
    """
    flat, _ = tree.flatten(params)
    empty = file_bytes({})
    rows = tuple(
        SizeRow(
            path=path,
            method=leaf.method if isinstance(leaf, Leaf) else "dense",
            shape=tuple(jnp.shape(leaf)) if not isinstance(leaf, Leaf) else leaf.shape,
            weights=math.prod(
                np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
            ),
            memory_bytes=_memory(leaf),
            disk_bytes=file_bytes({path: leaf}) - empty,
        )
        for path, leaf in flat.items()
    )
    return SizeReport(rows, file_bytes(params))


def _memory(leaf: Any) -> int:
    if isinstance(leaf, Leaf):
        return leaf.stored_bytes
    return nbytes(leaf) if hasattr(leaf, "dtype") else 0


def sparsity(params: Any) -> dict[str, float]:
    """Fraction of exact zeros of every array and leaf, by path.

    Args:
      params: Parameter pytree, compressed or not.

    Examples:
      >>> sparsity({"w": jnp.array([0.0, 1.0])})
      {'w': 0.5}
    """
    flat, _ = tree.flatten(params)
    return {
        path: float((jnp.asarray(materialize(x)) == 0).mean(dtype=jnp.float32))
        for path, x in flat.items()
        if _is_numbers(x)
    }


def _is_numbers(x: Any) -> bool:
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return False
    return x.size > 0
