"""`lora`: trainable low-rank adapters beside a frozen quantized weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.leaf import is_leaf
from jaxcompress.quant._corrected import CorrectedArray
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Frame
from jaxcompress.quant._quantize import quantize
from jaxcompress.transform import Transform, identity
from jaxcompress.tree import flatten, trainable_mask, unflatten
from jaxcompress.values import Site, leaf_key, replace_weights


def lora(
    fmt: NumberFormat,
    *,
    rank: int,
    key: jax.Array,
    alpha: float | None = None,
    dtype: Any = jnp.float32,
) -> Transform:
    r"""Freeze each weight in a number format and train a low-rank product beside it.

    .. math:: y = x Q + \frac{\alpha}{r} (x A) B

    Args:
      fmt: The number format of the frozen weight.
      rank: Columns of ``A``.
      key: Decides ``A``, normal with variance ``1 / K``; ``B`` starts at zero.
      alpha: The product is scaled by ``alpha / rank``; by default it is not.
      dtype: Of the adapters.

    Returns:
      A transform whose ``init`` replaces each weight by a `CorrectedArray`, its codes
      packed; what is trained is what is stored. In each such leaf, `partition` and
      `weight_decay_mask` choose the adapters alone; of a whole tree, `adapters` does.
      `merge_lora` folds them into the weights.

    Raises:
      ValueError: If `rank` is not positive or `fmt` rounds stochastically; from
        ``init``: weights that `quantize` refuses, or that have fewer inputs or outputs
        than `rank`.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = lora(jc.quant.nf4(group_size=32), rank=2, key=jax.random.key(0))
      >>> params, state = jax.jit(scheme.init)({"w": jnp.ones((64, 8))})
      >>> params["w"]
      CorrectedArray(nf4 g32 + rank 2, float32[64, 8])
      >>> [a.shape for a in jax.tree.leaves(jc.partition(params)[0])]
      [(1, 2, 64), (8, 2)]

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, eq. 3; Dettmers et
      al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, eq. 5. Differs: scales of
      the frozen weight are not quantized a second time.
    """
    by = f"quant.lora({fmt.name})"
    if rank < 1:
        raise ValueError(f"{by}: rank must be positive; got {rank}.")
    if fmt.rounding == "stochastic":
        raise ValueError(f"{by}: the frozen weight is rounded once; use 'nearest'.")
    scaling = 1.0 if alpha is None else float(alpha) / rank

    def adapted(w: jax.Array, site: Site) -> CorrectedArray:
        frame = Frame.of(w, fmt, axes=site.axes, path=site.path, who=by)
        frame.check_rank(rank, site.path, by)
        inner = quantize(w, fmt, axes=frame.roles, path=site.path)
        down = jax.random.normal(
            leaf_key(key, site), (*frame.stack, rank, frame.inputs), jnp.float32
        )
        return CorrectedArray(
            inner=inner,
            down=frame.shared(down * frame.inputs**-0.5, trailing=2).astype(dtype),
            up=jnp.zeros((*frame.stack, *frame.outputs, rank), dtype),
            scaling=scaling,
            layout=frame.layout,
        )

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, CorrectedArray)
        return replace_weights(adapted, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def adapters(params: Any) -> tuple[Any, Any]:
    """Split a tree into the factors of its `CorrectedArray` leaves and the rest.

    Args:
      params: Any pytree.

    Returns:
      ``(adapters, rest)``; `merge` undoes it. Unlike `partition`, the other arrays of
      the tree (biases, embeddings) are in the rest.

    Examples:
      >>> import jaxcompress as jc
      >>> adapters({"bias": jnp.zeros(2)})
      ({'bias': None}, {'bias': Array([0., 0.], dtype=float32)})
    """

    def mark(x: Any) -> Any:
        chosen = isinstance(x, CorrectedArray)
        return jax.tree.map(lambda t: t and chosen, trainable_mask(x))

    mask = jax.tree.map(mark, params, is_leaf=is_leaf)
    keep = jax.tree.map(lambda x, m: x if m else None, params, mask)
    rest = jax.tree.map(lambda x, m: None if m else x, params, mask)
    return keep, rest


def merge_lora(params: Any, fmt: NumberFormat | None = None) -> Any:
    """Fold adapters into their weights.

    Args:
      params: Any pytree.
      fmt: Number format of the merged weights, which are rounded anew; None leaves
        them dense. Static.

    Returns:
      The tree with a dense array, or a `QuantizedArray`, for each `CorrectedArray`;
      other leaves are the same objects.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = lora(jc.quant.int4(), rank=1, key=jax.random.key(0))
      >>> params, _ = jax.jit(scheme.init)({"w": jnp.ones((8, 4))})
      >>> merge = jax.jit(merge_lora, static_argnames="fmt")
      >>> merge(params, fmt=jc.quant.int8())["w"]
      QuantizedArray(int8, float32[8, 4])
    """

    def merged(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, CorrectedArray):
            return leaf
        w = leaf.materialize()
        if fmt is None:
            return w
        stack = leaf.ndim - len(leaf.layout.order)
        axes = Axes(contract=leaf.layout.contract, stack=stack)
        return quantize(w, fmt, axes=axes, path=path)

    flat, structure = flatten(params)
    return unflatten(structure, {path: merged(path, x) for path, x in flat.items()})
