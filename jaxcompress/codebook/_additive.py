"""`additive`: sub-vectors as sums of entries, codes and codebooks chosen together."""

from __future__ import annotations

import jax

from jaxcompress.codebook._codes import Codes
from jaxcompress.codebook._fit import Importance, Search, clustered
from jaxcompress.transform import Transform


def additive(
    *,
    dims: int,
    books: int,
    key: jax.Array,
    bits: int = 8,
    blocks: int | None = 1,
    scale: bool = False,
    dtype: str = "float32",
    axes: int | tuple[int, ...] | None = None,
    importance: Importance | None = None,
    iterations: int = 25,
    rounds: int = 12,
    width: int = 4,
) -> Transform:
    r"""Share sub-vectors as sums of codebook entries.

    .. math:: \min_{C, c} \sum_{o,s} \Big\| w_{os} - \sum_{a=1}^{A}
        C^{(a)}_{c_{oas}} \Big\|^2

    From the codebooks of `residual`, `rounds` times: each codebook moves to its best
    given the codes and the others; all codes are chosen by `beam_search`.

    Args:
      dims: As for `product`, as what is not said here.
      books: A, codes that are added: ``books * bits / dims`` bits a weight. Static.
      key: Decides the seeds.
      bits: Of a code, 1 to 8.
      blocks: Runs of sub-vectors with codebooks of their own.
      scale: Whether outputs have a scale.
      dtype: Of codebooks and scales.
      axes: Along which sub-vectors lie.
      importance: By path, what squared errors count for.
      iterations: Of k-means at the start, at most.
      rounds: As above. Static.
      width: Sums that the beam search keeps. Static.

    Returns:
      A transform as that of `product`. The (float32) error is at most that of
      `residual` with the same key and iterations.

    Raises:
      ValueError: As `product` does.
      TypeError: As `product` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> scheme = additive(dims=2, books=2, bits=2, key=jax.random.key(0))
      >>> params, state = scheme.init({"w": jnp.zeros((8, 4))})
      >>> params["w"]
      CodebookArray(codebook 2x2 bit d2, float32[8, 4])

    References:
      Babenko & Lempitsky, `Additive Quantization for Extreme Vector Compression
      <https://openaccess.thecvf.com/content_cvpr_2014/html/Babenko_Additive_Quantization_for_2014_CVPR_paper.html>`_,
      2014, section 3; Egiazarian et al., `AQLM <https://arxiv.org/abs/2401.06118>`_,
      2024, section 3. Differs: one codebook after another moves to its least squares,
      so that sums are exact; `aqlm` weighs errors by the inputs' second moment.
    """
    codes = Codes(
        dims=dims,
        bits=bits,
        books=books,
        blocks=blocks,
        scale=scale,
        dtype=dtype,
        axes=axes,
    )
    search = Search(iterations=iterations, rounds=rounds, width=width)
    by = f"codebook.additive({codes.name})"
    return clustered(codes, search, key=key, importance=importance, by=by)
