"""The kept weights of an N:M pattern, and where in their group of M they stood.

Of every ``m`` consecutive inputs ``n`` weights are stored, in ascending order of their
places, and each place as a code of ``log2 m`` bits. K is filled up to a multiple of
``m``. A weight ``[N, K]`` has ``G = ceil(K / m)`` groups of an output.

The kept weights are floats, or codes of few bits: a `kernels_pallas.layouts.Weight` of
``[N, G n]``, whose scale groups are so many consecutive kept weights.

Two layouts hold them (`Layout` of `kernels_pallas.layouts`):

``portable``: ``values[N, G n]``, ``indices uint8[N, ceil(G n b / 8)]``, the bit stream
    of `kernels_pallas.packing`.
``tpu``: by planes; plane ``i`` has the ``i``-th kept weight of every group.
    ``values[n, G', N']``; codes are in words as the TPU layout of `layouts` has them,
    ``int32[n, G' B / 32, N']``, the places in those of 2 or 4 bits. There is one
    ``scale[S', N']`` for all planes. Expanding a plane moves no data: input ``j`` of
    all groups is a dense ``[G', N']`` of selects.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import layouts, packing
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format, Integer
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight
from kernels_pallas.values import dense_values

M_SIZES = (4, 8, 16)


class NMSparse(NamedTuple):
    """The arrays of an N:M-sparse weight.

    ``w[r, g m + index[r, g n + i]] = values[r, g n + i]``, and zero elsewhere.

    Attributes:
      values: ``float[*stack, N, G n]``, or a `Weight` of them; in the layout of the TPU
        as the module says.
      indices: ``uint8[*stack, N, ceil(G n b / 8)]`` with ``b = log2 m``, or
        ``int32[*stack, n, G' B / 32, N']`` in the layout of the TPU. Those of a group
        ascend.
    """

    values: jax.Array | Weight
    indices: jax.Array


def index_format(m: int) -> Integer:
    """What the places in a group of `m` are stored as."""
    return Integer((m - 1).bit_length(), signed=False)


def groups_of(k: int, m: int) -> int:
    """Groups of `m` that `k` inputs fill, the last perhaps in part."""
    return -(-k // m)


def check_pattern(who: str, n: int, m: int) -> None:
    """Raise if no code or kernel knows the pattern."""
    if m not in M_SIZES:
        refuse(who, "m", f"be one of {M_SIZES}", m, "2:4 is what hardware knows.")
    if not 1 <= n <= m:
        refuse(who, "n", f"be from 1 to m = {m}", n, "It is what is kept of m.")


def pack(dense: jax.Array, *, n: int, m: int) -> NMSparse:
    """Keep the `n` weights of largest magnitude of every `m`.

    Args:
      dense: ``float[*stack, N, K]``.
      n: Weights to keep. Static.
      m: Of so many: 4, 8 or 16. Static.

    Returns:
      The portable layout; of equal magnitudes the first are kept, and what fills up K
      last. `unpack` undoes it exactly where no more than `n` of `m` were not zero.

    Raises:
      ValueError: If the pattern is out of range, or `dense` is no matrix.

    Examples:
      >>> packed = pack(jnp.array([[1.0, -4.0, 0.0, 3.0]]), n=2, m=4)
      >>> packed.values.tolist(), packed.indices.tolist()  # 1 and 3: 0b1101
      ([[-4.0, 3.0]], [[13]])
    """
    check_pattern("nm_sparse_matmul.pack", n, m)
    if dense.ndim < 2:
        refuse(
            "nm_sparse_matmul.pack",
            "dense",
            "be [*stack, N, K]",
            dense.shape,
            "A vector is a matrix of one output: dense[None].",
        )
    *lead, k = dense.shape
    grouped = lambda a: a.reshape(*lead, -1, m)
    edge = [(0, 0)] * len(lead) + [(0, -k % m)]
    strength = jnp.pad(jnp.abs(dense), edge, constant_values=-1)
    order = jnp.argsort(grouped(strength), axis=-1, descending=True, stable=True)
    places = jnp.sort(order[..., :n], axis=-1)
    values = jnp.take_along_axis(grouped(jnp.pad(dense, edge)), places, axis=-1)
    codes = places.astype(jnp.uint8).reshape(*lead, -1)
    words = packing.pack(codes, bits=index_format(m).bits)
    return NMSparse(values.reshape(*lead, -1), words)


def unpack(
    weight: NMSparse, fmt: Format | None = None, *, n: int, m: int, k: int
) -> jax.Array:
    """The dense weight.

    Args:
      weight: In the portable layout.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many. Static.
      k: Inputs. Static.

    Returns:
      ``[*stack, N, k]``, in the dtype of floating values, else float32.
    """
    values = dense_values(weight.values, fmt, groups_of(k, m) * n)
    *lead, count = values.shape
    codes = packing.unpack(weight.indices, bits=index_format(m).bits, count=count)
    grouped = lambda a: a.reshape(*lead, -1, n)
    place = jax.lax.broadcasted_iota(jnp.uint8, (*lead, count // n, m), len(lead) + 1)
    dense = jnp.zeros(place.shape, values.dtype)
    for i in range(n):
        chosen = grouped(codes)[..., i : i + 1] == place
        dense = jnp.where(chosen, grouped(values)[..., i : i + 1], dense)
    return dense.reshape(*lead, -1)[..., :k]


def repack(
    weight: NMSparse, fmt: Format | None = None, *, n: int, m: int, k: int, to: Layout
) -> NMSparse:
    """A portable weight in another layout.

    Args:
      weight: Of ``[N, K]``; of a stack, by `jax.vmap`.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many. Static.
      k: Inputs. Static.
      to: `layouts.TPU`. Static.

    Returns:
      The weight as `to` reads it; `restore` undoes it bit for bit.
    """
    if to == PORTABLE:
        return weight
    values, groups = weight.values, groups_of(k, m)
    scale = values.scale if isinstance(values, Weight) else jnp.ones((len(values), 1))

    def planes(words: jax.Array, fmt: Format, zero: jax.Array | None) -> list[Weight]:
        codes = packing.unpack(words, bits=fmt.bits, count=groups * n)
        streams = packing.pack(_by_plane(codes, n), bits=fmt.bits)
        one = lambda s: Weight(s, scale, zero)
        return [
            layouts.repack(one(s), fmt, n=len(scale), k=groups, to=to) for s in streams
        ]

    places = [p.words for p in planes(weight.indices, index_format(m), None)]
    if isinstance(values, Weight):
        assert fmt is not None
        parts = planes(values.words, fmt, values.zero)
        stored = parts[0]._replace(words=jnp.stack([p.words for p in parts]))
    else:
        columns, rows = to.padded(len(values), groups, 1)
        edge = ((0, 0), (0, rows - groups), (0, columns - len(values)))
        stored = jnp.pad(_by_plane(values, n).swapaxes(1, 2), edge)
    return NMSparse(stored, jnp.stack(places))


def restore(
    weight: NMSparse,
    fmt: Format | None = None,
    *,
    n: int,
    m: int,
    k: int,
    outputs: int,
    scales: int = 1,
    layout: Layout,
) -> NMSparse:
    """The portable weight: the inverse of `repack`.

    Args:
      weight: In `layout`; of a stack, by `jax.vmap`.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many. Static.
      k: Inputs. Static.
      outputs: N. Static.
      scales: Scales of an output. Static.
      layout: The layout it is in. Static.
    """
    if layout == PORTABLE:
        return weight
    values, groups = weight.values, groups_of(k, m)
    lies = lambda fmt, scales: Stored(fmt, outputs, groups, scales, layout)

    def stream(planes: jax.Array, fmt: Format) -> jax.Array:
        side = jnp.ones((1, outputs))
        one = lambda words: layouts.unpack(Weight(words, side), lies(fmt, 1)).words
        codes = [packing.unpack(one(p), bits=fmt.bits, count=groups) for p in planes]
        return packing.pack(_in_order(jnp.stack(codes)), bits=fmt.bits)

    if isinstance(values, Weight):
        assert fmt is not None
        first = values._replace(words=values.words[0])
        kept = layouts.unpack(first, lies(fmt, scales))
        kept = kept._replace(words=stream(values.words, fmt))
    else:
        kept = _in_order(values[:, :groups, :outputs].swapaxes(1, 2))
    return NMSparse(kept, stream(weight.indices, index_format(m)))


def _by_plane(kept: jax.Array, n: int) -> jax.Array:
    """``[n, N, G]`` of ``[N, G n]``."""
    return jnp.moveaxis(kept.reshape(len(kept), -1, n), -1, 0)


def _in_order(planes: jax.Array) -> jax.Array:
    """The inverse of `_by_plane`."""
    return jnp.moveaxis(planes, 0, -1).reshape(planes.shape[1], -1)
