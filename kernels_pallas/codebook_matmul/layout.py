"""A weight whose sub-vectors are sums of codebook entries, and how its codes lie.

``w[n, d s + j] = scale[n] * sum_a codebooks[s B // S, a, code[n, a, s], j]``

for ``S = ceil(K / d)`` sub-vectors of ``d`` inputs, ``A`` codes that are added, and
``B`` blocks of inputs with codebooks of their own. ``A = B = d = 1`` shares single
weights (k-means), ``B > 1`` is product quantization, ``A > 1`` additive.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import layouts
from kernels_pallas.formats import Integer
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight


class CodebookWeight(NamedTuple):
    """The arrays of a weight of ``N`` outputs and ``K`` inputs.

    Attributes:
      words: Codes packed along the sub-vectors: portable ``uint8[N, A, bytes]``
        (`kernels_pallas.packing`); for TPU ``int32[A, S' B / 32, N']``, as
        `kernels_pallas.layouts` has it, in the place of K the sub-vectors.
      codebooks: ``float[B, A, E, d]``, E at most 256.
      scale: ``float[N]`` (for TPU ``float32[N']``), or None.
    """

    words: jax.Array
    codebooks: jax.Array
    scale: jax.Array | None = None


def vectors(weight: CodebookWeight, k: int) -> int:
    """Sub-vectors of `k` inputs; the last may be cut."""
    return -(-k // weight.codebooks.shape[-1])


def repack(weight: CodebookWeight, *, bits: int, k: int, to: Layout) -> CodebookWeight:
    """A portable weight in another layout.

    Args:
      weight: Portable, without stack (else by `jax.vmap`).
      bits: Of a code, 1 to 8. Static.
      k: Inputs. Static.
      to: The layout. Static.

    Returns:
      The weight as `to` reads it, padded by zeros; `unpack` undoes it.
    """
    if to == PORTABLE:
        return weight
    n, count = weight.words.shape[0], vectors(weight, k)
    one = jnp.ones((n, 1), jnp.float32)
    move = lambda words: (
        layouts.repack(Weight(words, one), Integer(bits), n=n, k=count, to=to).words
    )
    words = jax.vmap(move, in_axes=1)(weight.words)
    if weight.scale is None:
        return weight._replace(words=words)
    scale = jnp.pad(weight.scale.astype(jnp.float32), (0, words.shape[-1] - n))
    return weight._replace(words=words, scale=scale)


def unpack(
    weight: CodebookWeight, *, bits: int, n: int, k: int, layout: Layout
) -> CodebookWeight:
    """The portable weight: the inverse of `repack`.

    Args:
      weight: In `layout`, without stack.
      bits: Of a code. Static.
      n: Outputs. Static.
      k: Inputs. Static.
      layout: The layout it is in. Static.
    """
    if layout == PORTABLE:
        return weight
    stored = Stored(Integer(bits), n, vectors(weight, k), 1, layout)
    one = jnp.ones((1, n), jnp.float32)
    move = lambda words: layouts.unpack(Weight(words, one), stored).words
    words = jax.vmap(move, out_axes=1)(weight.words)
    scale = None if weight.scale is None else weight.scale[:n]
    return weight._replace(words=words, scale=scale)
