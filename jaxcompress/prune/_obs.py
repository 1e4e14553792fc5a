"""Optimal brain surgeon: one weight at a time, each time all others make up for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import factorize
from jaxcompress.prune._nm import NM
from jaxcompress.prune._pattern import Pattern, pruned_count
from jaxcompress.prune._reconstruct import AxesOption, check_target, lay


def obs_weight(
    w: jax.Array,
    sparsity: float | NM,
    stats: Statistics | None,
    *,
    axes: AxesOption = None,
    path: str = "w",
    damping: float = 0.01,
) -> Leaf:
    r"""Prune one weight exactly: in each output the cheapest goes, again and again.

    With :math:`H = X^T X / n + \lambda I` over the inputs that an output still keeps,

    .. math::
        q = \arg\min_q \frac{w_q^2}{2 (H^{-1})_{qq}}, \qquad
        w \leftarrow w - \frac{w_q}{(H^{-1})_{qq}} H^{-1}_{:q}.

    The cost is K^3 for each of the outputs: for small layers, and to judge others by.

    Args:
      w: ``float[*stack, *core]`` weight.
      sparsity: Fraction of every output's weights to prune, in [0, 1); or `nm`. Static.
      stats: Of the rows that entered its matmul, with their gram. None, or a stack
        entry without rows: by magnitude.
      axes: Contracting axes, or `Axes`; as for `magnitude`. Static.
      path: Named in errors. Static.
      damping: As for `sparsegpt_weight`. Static.

    Returns:
      A `BitmaskArray`, or an `NMArray`, of `w`'s shape and dtype. The kept weights have
      the least error that their mask allows.

    Raises:
      ValueError: As `sparsegpt_weight`; or for patterns other than N:M.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])
      >>> w = jnp.array([[1.0], [2.0], [3.0]])
      >>> q = obs_weight(w, 1 / 3, statistics(x, gram=True), damping=1e-4)
      >>> q.materialize()[:, 0].round(2).tolist()
      [0.0, 3.0, 3.0]

    References:
      Hassibi & Stork, `Second Order Derivatives for Network Pruning
      <https://papers.nips.cc/paper/647>`_, 1992, eq. 5; Frantar & Alistarh, `Optimal
      Brain Compression <https://arxiv.org/abs/2208.11580>`_, 2022, Algorithm 1 and
      Lemma 1 (the second moment of a layer's inputs, and its inverse without q).
      Differs: each output gives as many weights.
    """
    who = "prune.obs"
    check_target(sparsity, who)
    if isinstance(sparsity, Pattern) and not isinstance(sparsity, NM):
        raise ValueError(
            f"{who}: sparsity must be a number or prune.nm(n, m); got {sparsity!r}. "
            "Use sparsegpt_weight."
        )
    if not damping >= 0.0:
        raise ValueError(f"{who}: damping must not be negative; got {damping}.")
    laid = lay(w, stats, axes=axes, path=path, who=who)
    k, outputs = laid.w.shape[-2:]
    if isinstance(sparsity, NM):
        whole, rest = divmod(k, sparsity.m)
        spare = sparsity.m - sparsity.n
        count = whole * spare + max(rest - sparsity.n, 0)
        group = (sparsity.n, sparsity.m)
    else:
        count, group = pruned_count(sparsity, k), (0, k)
    values, kept = _solve(laid.w, laid.gram, count, group, damping)
    return laid.leaf(values, kept, sparsity, outputs * (k - count))


@functools.partial(jax.jit, static_argnames=("count", "group", "damping"))
def _solve(
    w: jax.Array, gram: jax.Array, count: int, group: tuple[int, int], damping: float
) -> tuple[jax.Array, jax.Array]:
    """Values and mask ``[S, K, R]``, one output after another."""

    def entry(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w, gram = arrays
        h = factorize(gram, damping).h
        eye = jnp.eye(h.shape[0], dtype=jnp.float32)
        inverse = jax.scipy.linalg.solve(h, eye, assume_a="pos")
        run = lambda column: _one_output(column, inverse, count, group)
        values, kept = jax.lax.map(run, w.T)
        return values.T, kept.T

    return jax.lax.map(entry, (w, gram))


def _one_output(
    w: jax.Array, inverse: jax.Array, count: int, group: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Values and mask ``[K]`` after `count` removals, at least n of each m staying."""
    least, size = group
    k = w.shape[0]
    member = jnp.arange(k) // size
    groups = -(-k // size)

    def remove(
        _: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        w, kept, inverse = state
        left = jnp.zeros(groups, jnp.int32).at[member].add(kept.astype(jnp.int32))
        open_ = kept & (left[member] > least)
        diagonal = jnp.where(kept, jnp.diagonal(inverse), 1.0)
        q = jnp.argmin(jnp.where(open_, jnp.square(w) / diagonal, jnp.inf))
        column = inverse[:, q] / diagonal[q]
        inverse = inverse - column[:, None] * inverse[q][None]
        kept = kept.at[q].set(False)
        return jnp.where(kept, w - w[q] * column, 0.0), kept, inverse

    state = (w, jnp.ones(k, bool), inverse)
    values, kept, _ = jax.lax.fori_loop(0, count, remove, state)
    return values, kept
