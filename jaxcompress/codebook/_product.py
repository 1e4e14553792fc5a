"""`product`: each sub-vector of a weight is an entry of a codebook."""

from __future__ import annotations

import jax

from jaxcompress.codebook._codes import Codes
from jaxcompress.codebook._fit import Importance, Search, clustered
from jaxcompress.transform import Transform


def product(
    *,
    dims: int,
    key: jax.Array,
    bits: int = 8,
    blocks: int | None = 1,
    scale: bool = False,
    dtype: str = "float32",
    axes: int | tuple[int, ...] | None = None,
    importance: Importance | None = None,
    iterations: int = 100,
) -> Transform:
    r"""Share sub-vectors by k-means, and train the codebooks.

    .. math:: w_{o, ds+j} = s_o C^{(b(s))}_{c_{os}, j}, \quad
        \min_{C, c} \sum_{o,i} m_{oi} (w_{oi} - \hat w_{oi})^2

    Args:
      dims: d, consecutive inputs of a sub-vector. Static, as all but the key and the
        importance.
      key: Decides the seeds.
      bits: Of a code, 1 to 8: ``bits / dims`` bits a weight.
      blocks: Runs of sub-vectors with codebooks of their own; 1: all share one; None:
        each place has its own.
      scale: Whether outputs are divided by their root mean square, which is kept.
      dtype: Of codebooks and scales.
      axes: Along which sub-vectors lie, if not along the contracting axes: -1 of a
        table of embeddings.
      importance: m, by path, broadcast to the weight's shape: token counts
        ``[vocab, 1]``, second moments of the inputs ``[in, 1]``. None for 1.
      iterations: Of k-means, at most.

    Returns:
      A transform whose ``init`` puts a `CodebookArray` in place of each weight: its
      codes stay, its codebooks (role ``"codebook"``) and scales are trained, each
      entry's gradient the sum over its sub-vectors. What is trained is what is stored.
      A float32 weight without scale that has at most ``2**bits`` different sub-vectors
      comes back bit for bit.

    Raises:
      ValueError: If an option is out of range; from ``init``: if `blocks` does not
        divide, axes are unknown, or importance is missing or of another shape.
      TypeError: From ``init``, if a weight is not real floating.

    Examples:
      >>> import jax.numpy as jnp
      >>> scheme = product(dims=2, bits=1, key=jax.random.key(0))
      >>> w = jnp.array([[1.0, 5.0], [2.0, 6.0], [1.0, 1.0], [2.0, 2.0]])
      >>> params, state = scheme.init({"w": w})
      >>> params["w"], params["w"].codebooks.tolist()
      (CodebookArray(codebook 1 bit d2, float32[4, 2]), [[[[1.0, 2.0], [5.0, 6.0]]]])

    References:
      Jégou et al., `Product Quantization <https://doi.org/10.1109/TPAMI.2010.57>`_,
      2011, section II (``blocks=None``); Stock et al., `And the Bit Goes Down
      <https://arxiv.org/abs/1907.05686>`_, 2020, section 3.1 (weights, and their
      codebooks trained). Differs: seeds by k-means++.
    """
    codes = Codes(
        dims=dims, bits=bits, blocks=blocks, scale=scale, dtype=dtype, axes=axes
    )
    search = Search(iterations=iterations)
    by = f"codebook.product({codes.name})"
    return clustered(codes, search, key=key, importance=importance, by=by)
