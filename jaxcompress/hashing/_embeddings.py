"""Embedding tables of fewer rows than there are words: `HashEmbedding`, `Composed`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxcompress.layout import Axes
from jaxcompress.leaf import GATE, WEIGHT, Leaf, component, leaf_type, map_value, static
from kernels_pallas.hashing import bucket, xxhash32

Combine = Literal["multiply", "add", "concatenate"]
COMBINES: tuple[Combine, ...] = get_args(Combine)


class _Table(Leaf):
    """A table ``[*stack, words, width]``, of whose rows some can be made alone."""

    def _tables(self) -> tuple[Any, ...]:
        """The trained tables, each ``[*stack, rows, width]``."""
        raise NotImplementedError

    def _replaced(self, tables: Sequence[Any]) -> Leaf:
        raise NotImplementedError

    def _rows(self, word: jax.Array) -> jax.Array:
        """``float32[*stack, words, width]`` of ``int32[words]``."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """Logical dtype."""
        return self._tables()[0].dtype

    @property
    def _stack(self) -> int:
        return self._tables()[0].ndim - 2

    def materialize(self) -> jax.Array:
        """Every row."""
        words = jnp.arange(self.shape[-2], dtype=jnp.int32)
        return self._rows(words).astype(self.dtype)

    def take(self, index: jax.Array) -> jax.Array:
        """The rows of some words."""
        if self._stack:
            return NotImplemented
        rows = self._rows(index.astype(jnp.int32).reshape(-1)).astype(self.dtype)
        return rows.reshape(*index.shape, -1)

    def stacked(self, ndim: int) -> Leaf:
        """As it is, where the first axes are stacks."""
        return self if self._stack >= ndim else NotImplemented

    def values(self) -> tuple[Any, ...]:
        """The tables."""
        return tuple(
            v
            for t in self._tables()
            for v in (t.values() if isinstance(t, Leaf) else (t,))
        )

    def value_axes(self) -> tuple[Any, ...]:
        """Of a table that is looked up, each row is contracted."""
        return (Axes(contract=(-1,), stack=self._stack),) * len(self.values())

    def map_values(self, f: Callable[[jax.Array], jax.Array | Leaf]) -> Leaf:
        """Act on the tables."""
        return self._replaced([map_value(f, t) for t in self._tables()])

    def component_specs(self, spec: Sequence[Any], sizes: dict[Any, int]) -> Any:
        """Stacks can be cut; rows are read by all."""
        stack = self._stack
        if any(entry is not None for entry in spec[stack:]):
            raise ValueError(
                f"{self.method}: every row is read for words anywhere in the "
                f"vocabulary, so it cannot be cut; got {tuple(spec)}. Replicate it, as "
                "with PartitionSpec()."
            )
        return jax.tree.map(lambda a: PartitionSpec(*spec[:stack]), self)


@leaf_type
class HashEmbedding(_Table):
    r"""Rows of a small table, several for each word, in a learned combination.

    .. math:: e_v = \sum_j p_{vj}\, T_{h_j(v)}, \quad h_j(v) =
        \operatorname{xxh32}(v, j) \bmod R

    the key being word and number of the hash, each as a little-endian uint32.

    Attributes:
      table: ``float[*stack, R, width]``, or a leaf.
      importance: ``float32[*stack, words, hashes]``.
      seed: Of the hashes.
    """

    table: Any = component(role=WEIGHT)
    importance: jax.Array = component(role=GATE)
    seed: int = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return (*self.importance.shape[:-1], self.table.shape[-1])

    @property
    def method(self) -> str:
        """``"2 hashes to 64 rows"``."""
        return f"{self.importance.shape[-1]} hashes to {self.table.shape[-2]} rows"

    def _tables(self) -> tuple[Any, ...]:
        return (self.table,)

    def _replaced(self, tables: Sequence[Any]) -> Leaf:
        return self.replace(table=tables[0])

    def _rows(self, word: jax.Array) -> jax.Array:
        number = jnp.arange(self.importance.shape[-1], dtype=jnp.uint32)
        h = xxhash32(word[:, None].astype(jnp.uint32), number[None], seed=self.seed)
        row = bucket(h, self.table.shape[-2])
        parts = _dense(self.table)[..., row, :]
        return (parts * self.importance[..., word, :, None]).sum(-2)


@leaf_type
class ComposedEmbedding(_Table):
    r"""A row of each of several tables, in a combination that no other word has.

    A word is written in mixed radix, its digits being rows of the tables, the first the
    fastest: for two tables, remainder and quotient.

    .. math:: e_v = \odot_j T^{(j)}_{d_j(v)}, \quad
        d_j(v) = \lfloor v / (R_1 \cdots R_{j-1}) \rfloor \bmod R_j

    Attributes:
      tables: ``float[*stack, R_j, width_j]`` each, or leaves.
      words: Rows of the whole; at most the product of those of the tables.
      combine: How: elementwise product or sum, or side by side.
    """

    tables: tuple[Any, ...] = component(role=WEIGHT)
    words: int = static()
    combine: Combine = static()

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        widths = [t.shape[-1] for t in self.tables]
        width = sum(widths) if self.combine == "concatenate" else widths[0]
        return (*self.tables[0].shape[:-2], self.words, width)

    @property
    def method(self) -> str:
        """``"multiply of 8 x 16 rows"``."""
        rows = " x ".join(str(t.shape[-2]) for t in self.tables)
        return f"{self.combine} of {rows} rows"

    def _tables(self) -> tuple[Any, ...]:
        return self.tables

    def _replaced(self, tables: Sequence[Any]) -> Leaf:
        return self.replace(tables=tuple(tables))

    def _rows(self, word: jax.Array) -> jax.Array:
        parts = []
        for table in self.tables:
            size = np.int32(table.shape[-2])
            parts.append(_dense(table)[..., word % size, :])
            word = word // size
        if self.combine == "concatenate":
            return jnp.concatenate(parts, -1)
        op = jnp.multiply if self.combine == "multiply" else jnp.add
        return functools.reduce(op, parts)


def _dense(table: Any) -> jax.Array:
    table = table.materialize() if isinstance(table, Leaf) else table
    return table.astype(jnp.float32)


def hash_embedding(
    words: int,
    width: int,
    *,
    rows: int,
    key: jax.Array,
    hashes: int = 2,
    seed: int = 0,
    stddev: float = 0.02,
) -> HashEmbedding:
    """An embedding table whose words share rows, several each, in learned proportions.

    Args:
      words: Size of the vocabulary. Static.
      width: Of an embedding. Static.
      rows: Of the table that is trained. Static.
      key: Decides its first entries, normal.
      hashes: Rows for each word. Static.
      seed: Of the hashes. Static.
      stddev: Of the entries of an embedding. Static.

    Returns:
      A leaf ``float32[words, width]`` to stand in the params; a look-up reads the rows
      of its words alone. Proportions start equal.

    Raises:
      ValueError: If a size is not positive.

    Examples:
      >>> hash_embedding(1000, 8, rows=50, key=jax.random.key(0))
      HashEmbedding(2 hashes to 50 rows, float32[1000, 8])

    References:
      Svenstrup et al., `Hash Embeddings for Efficient Word Representations
      <https://arxiv.org/abs/1709.03933>`_, 2017, section 3. Differs: importance is per
      word, not per bucket of words, and is not appended to the embedding.
    """
    _check_sizes("hash_embedding", words=words, width=width, rows=rows, hashes=hashes)
    table = stddev * jax.random.normal(key, (rows, width), jnp.float32)
    importance = jnp.full((words, hashes), hashes**-0.5, jnp.float32)
    return HashEmbedding(table=table, importance=importance, seed=seed)


def compositional_embedding(
    words: int,
    width: int,
    *,
    rows: Sequence[int],
    key: jax.Array,
    combine: Combine = "multiply",
    stddev: float = 0.02,
) -> ComposedEmbedding:
    """An embedding table made of several small ones: every word its own combination.

    Args:
      words: Size of the vocabulary. Static.
      width: Of an embedding; of ``"concatenate"``, a multiple of the tables. Static.
      rows: Of each table, the fastest digit first; their product covers the vocabulary.
        Static.
      key: Decides the first entries, normal.
      combine: ``"multiply"``, ``"add"`` or ``"concatenate"``. Static.
      stddev: Of the entries of an embedding. Static.

    Returns:
      A leaf ``float32[words, width]`` to stand in the params; a look-up reads the rows
      of its words alone.

    Raises:
      ValueError: If a size is not positive, `combine` is another word, or two words
        would be the same.

    Examples:
      >>> compositional_embedding(1000, 8, rows=(10, 10, 10), key=jax.random.key(0))
      ComposedEmbedding(multiply of 10 x 10 x 10 rows, float32[1000, 8])

    References:
      Shi et al., `Compositional Embeddings Using Complementary Partitions
      <https://arxiv.org/abs/1909.02107>`_, 2020, section 3, the generalized
      quotient-remainder partitions.
    """
    who = "compositional_embedding"
    _check_sizes(who, words=words, width=width, tables=len(rows))
    _check_sizes(who, rows=min(rows))
    if combine not in COMBINES:
        raise ValueError(f"{who}: combine must be one of {COMBINES}; got {combine!r}.")
    if math.prod(rows) < words:
        raise ValueError(
            f"{who}: the tables' rows must combine to {words} words; "
            f"{tuple(rows)} make {math.prod(rows)}."
        )
    count, own = len(rows), width
    spread = {"multiply": stddev ** (1 / count), "add": stddev * count**-0.5}
    if combine == "concatenate":
        if width % count:
            raise ValueError(
                f"{who}: width must be a multiple of the {count} tables; got {width}."
            )
        own = width // count
    keys = jax.random.split(key, count)
    tables = tuple(
        spread.get(combine, stddev) * jax.random.normal(k, (n, own), jnp.float32)
        for k, n in zip(keys, rows, strict=True)
    )
    return ComposedEmbedding(tables=tables, words=words, combine=combine)


def quotient_remainder_embedding(
    words: int,
    width: int,
    *,
    remainders: int,
    key: jax.Array,
    combine: Combine = "multiply",
    stddev: float = 0.02,
) -> ComposedEmbedding:
    """An embedding table made of one of remainders and one of quotients.

    Args:
      words: As for `compositional_embedding`.
      width: As there.
      remainders: Rows of the first table; the other has one for each quotient. Static.
      key: As there.
      combine: As there.
      stddev: As there.

    Returns:
      As `compositional_embedding`.

    Raises:
      ValueError: As there.

    Examples:
      >>> quotient_remainder_embedding(1000, 8, remainders=32, key=jax.random.key(0))
      ComposedEmbedding(multiply of 32 x 32 rows, float32[1000, 8])

    References:
      Shi et al., 2020, algorithm 1.
    """
    _check_sizes("quotient_remainder_embedding", words=words, remainders=remainders)
    return compositional_embedding(
        words,
        width,
        rows=(remainders, -(-words // remainders)),
        key=key,
        combine=combine,
        stddev=stddev,
    )


def _check_sizes(who: str, **sizes: int) -> None:
    if bad := [name for name, n in sizes.items() if n < 1]:
        raise ValueError(f"{who}: {bad[0]} must be positive; got {sizes[bad[0]]}.")
