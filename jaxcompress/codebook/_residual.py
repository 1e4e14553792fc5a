"""`residual`: codebooks one after another, each of what those before it leave."""

from __future__ import annotations

import jax

from jaxcompress.codebook._codes import Codes
from jaxcompress.codebook._fit import Importance, Search, clustered
from jaxcompress.transform import Transform


def residual(
    *,
    dims: int,
    stages: int,
    key: jax.Array,
    bits: int = 8,
    blocks: int | None = 1,
    scale: bool = False,
    dtype: str = "float32",
    axes: int | tuple[int, ...] | None = None,
    importance: Importance | None = None,
    iterations: int = 100,
) -> Transform:
    r"""Share sub-vectors in stages: each clusters what the stages before it leave.

    .. math:: w^{(0)} = w, \quad w^{(a)} = w^{(a-1)} - C^{(a)}_{c_a}, \quad
        \hat w = \sum_a C^{(a)}_{c_a}

    Args:
      dims: As for `product`, as all but the next.
      stages: Codebooks, and codes of a sub-vector that are added:
        ``stages * bits / dims`` bits a weight. Static.
      key: Decides the seeds.
      bits: Of a code, 1 to 8.
      blocks: Runs of sub-vectors with codebooks of their own.
      scale: Whether outputs have a scale.
      dtype: Of codebooks and scales.
      axes: Along which sub-vectors lie.
      importance: By path, what squared errors count for.
      iterations: Of k-means, at most, for each stage.

    Returns:
      A transform as that of `product`. No stage has a larger error than the one before
      it.

    Raises:
      ValueError: As `product` does.
      TypeError: As `product` does.

    Examples:
      >>> import jax.numpy as jnp
      >>> scheme = residual(dims=1, stages=2, bits=1, key=jax.random.key(0))
      >>> w = jnp.array([[0.0], [1.0], [10.0], [11.0]])
      >>> params, state = scheme.init({"w": w})
      >>> params["w"].materialize()[:, 0].tolist()
      [0.0, 1.0, 10.0, 11.0]

    References:
      Juang & Gray, `Multiple Stage Vector Quantization for Speech Coding
      <https://doi.org/10.1109/ICASSP.1982.1171604>`_, 1982; Chen et al., `Approximate
      Nearest Neighbor Search by Residual Vector Quantization
      <https://doi.org/10.3390/s101211259>`_, 2010.
    """
    codes = Codes(
        dims=dims,
        bits=bits,
        books=stages,
        blocks=blocks,
        scale=scale,
        dtype=dtype,
        axes=axes,
    )
    search = Search(iterations=iterations)
    by = f"codebook.residual({codes.name})"
    return clustered(codes, search, key=key, importance=importance, by=by)
