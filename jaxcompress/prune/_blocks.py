"""The pattern that prunes whole blocks of the storage matrix."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import Leaf
from jaxcompress.prune._allocation import check_sparsity
from jaxcompress.prune._block_array import in_blocks, store_blocks
from jaxcompress.prune._masked import MaskedArray
from jaxcompress.prune._pattern import ByPath, Pattern, pruned_count
from jaxcompress.prune._threshold import lowest, rank
from jaxcompress.schedules import Schedule

BlockScope = Literal["row", "layer", "global"]


class Blocks(Pattern):
    """Whole blocks; by `blocks`."""

    def __init__(
        self, sparsity: float | Schedule, shape: tuple[int, int], scope: BlockScope
    ) -> None:
        """Check the options."""
        check_sparsity(sparsity, "prune.blocks")
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(
                "prune.blocks: shape must be the outputs and inputs of a block, at "
                f"least 1 each; got {shape}."
            )
        if scope not in ("row", "layer", "global"):
            raise ValueError(
                "prune.blocks: scope must be 'row', 'layer' or 'global'; got "
                f"{scope!r}."
            )
        self.sparsity, self.scope = sparsity, scope
        self.shape = (shape[0], shape[1])
        self.scheduled = callable(sparsity)

    def __repr__(self) -> str:
        """As it is written."""
        return f"blocks({self.sparsity}, shape={self.shape}, scope={self.scope!r})"

    def keep(
        self, scores: ByPath, roles: ByPath, step: jax.Array
    ) -> dict[str, tuple[jax.Array, ...]]:
        """The blocks of highest score, of each row of blocks, each layer or of all."""
        s = self.sparsity(step) if callable(self.sparsity) else self.sparsity
        ranks = {
            path: tuple(map(self._ranks, values, roles[path]))
            for path, values in scores.items()
        }
        flat, structure = jax.tree.flatten(ranks)
        if self.scope == "global":
            total = sum(r.size for r in flat)
            low = lowest(flat, pruned_count(s, total)) if flat else []
        else:
            apart = 1 if self.scope == "row" else 2
            low = [_lowest_behind(r, r.ndim - apart, s) for r in flat]
        kept = jax.tree.unflatten(structure, [~m for m in low])
        return {
            path: tuple(map(self._spread, kept[path], values, roles[path]))
            for path, values in scores.items()
        }

    def _ranks(self, score: jax.Array, axes: Axes) -> jax.Array:
        """``uint32[*stack, R, B]`` in the order of the blocks' sums."""
        layout = Layout.of(score.shape, axes)
        cut = in_blocks(layout.to_storage(score), layout, self.shape)
        return rank(cut.sum((-2, -1)))

    def _spread(self, kept: jax.Array, score: jax.Array, axes: Axes) -> jax.Array:
        """The mask of a weight from that of its blocks."""
        layout = Layout.of(score.shape, axes)
        storage = jax.eval_shape(layout.to_storage, score).shape
        for axis, size in ((-2, self.shape[0]), (-1, self.shape[1])):
            kept = jnp.repeat(kept, size, axis=axis)
        outputs, k = math.prod(storage[axes.stack : -1]), storage[-1]
        return layout.from_storage(kept[..., :outputs, :k].reshape(storage))

    def store(self, leaf: MaskedArray, axes: Axes) -> Leaf:
        """Kept blocks and their columns."""
        layout, capacity = Layout.of(leaf.shape, axes), None
        if self.scope == "row" and not callable(self.sparsity):
            k = jax.eval_shape(layout.to_storage, leaf.mask).shape[-1]
            columns = -(-k // self.shape[1])
            capacity = columns - pruned_count(self.sparsity, columns)
        return store_blocks(leaf, layout, block=self.shape, capacity=capacity)


def blocks(
    *,
    sparsity: float | Schedule,
    shape: tuple[int, int] = (16, 16),
    scope: BlockScope = "layer",
) -> Blocks:
    """Prune the blocks whose scores have the smallest sums.

    Args:
      sparsity: Fraction of the blocks pruned, in [0, 1); or a schedule of it.
      shape: Outputs and inputs of a block of the storage matrix (outputs flattened by
        inputs flattened); at its edges blocks are smaller. Kernels of TPUs want
        multiples of 128.
      scope: ``"layer"``: of every weight (of every layer of a scanned stack);
        ``"row"``: of every row of blocks, so that all rows keep as many, no room is
        left empty, and compress runs under jit and in sweeps; ``"global"``: of all
        weights given to the transform together.

    Returns:
      A `Pattern`, for any ``sparsity=``; it is stored as `BlockSparseArray`. Ties are
      pruned in order of position.

    Raises:
      ValueError: If an option is out of range.

    Examples:
      >>> import jaxcompress as jc
      >>> scheme = jc.prune.magnitude(sparsity=blocks(sparsity=0.5, shape=(1, 2)))
      >>> w = jnp.array([[1.0], [4.0], [3.0], [3.0]])
      >>> leaf = scheme.compress(*scheme.init({"w": w}))["w"]
      >>> leaf.columns.tolist(), leaf.materialize().ravel().tolist()
      ([[1]], [0.0, 0.0, 3.0, 3.0])

    References:
      Gray et al., `GPU Kernels for Block-Sparse Weights
      <https://cdn.openai.com/blocksparse/blocksparsepaper.pdf>`_, 2017; Narang et al.,
      `Block-Sparse Recurrent Neural Networks <https://arxiv.org/abs/1711.02782>`_,
      2017. Differs: sums of scores, not the largest magnitude.
    """
    return Blocks(sparsity, shape, scope)


def _lowest_behind(ranks: jax.Array, stack: int, sparsity: Any) -> jax.Array:
    """The fraction of lowest rank of each entry behind `stack` axes."""
    n = math.prod(ranks.shape[stack:])
    return lowest([ranks], pruned_count(sparsity, n), stack=stack)[0]
