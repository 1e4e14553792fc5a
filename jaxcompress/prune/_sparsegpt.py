"""SparseGPT: inputs are pruned in turn, and the inputs after make up for the error."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import check_feedback, factorize, matmul
from jaxcompress.prune._least_squares import refit
from jaxcompress.prune._nm import NM, keep_of_groups
from jaxcompress.prune._pattern import Pattern, pruned_count
from jaxcompress.prune._reconstruct import AxesOption, Laid, check_target, lay
from jaxcompress.prune._threshold import lowest, rank


def sparsegpt_weight(
    w: jax.Array,
    sparsity: float | Pattern,
    stats: Statistics | None,
    *,
    axes: AxesOption = None,
    path: str = "w",
    damping: float = 0.01,
    block: int = 128,
    refine: int = 32,
) -> Leaf:
    r"""Prune one weight so that its matmul's output, not the weight, changes least.

    Minimizes :math:`\operatorname{tr}((W - Q)^T H (W - Q))`,
    :math:`H = X^T X / n + \lambda I`, over sparse Q, input by input: with
    :math:`H = (I + U) D (I + U)^T`, U strictly upper triangular,

    .. math::
        Q_k = M_k \Big(W_k + \sum_{j<k} (W_j - Q_j)\, U_{jk}\Big).

    The mask M is chosen at every `block` inputs for them and all outputs together: the
    fraction of smallest :math:`D_{kk} (W_k + \dots)^2` goes. Then `refine` steps of
    conjugate gradients bring the kept weights towards the least error that the mask
    allows.

    Args:
      w: ``float[*stack, *core]`` weight.
      sparsity: Fraction to prune, in [0, 1), of every block of inputs; or `nm`, whose
        groups are chosen as they are reached; or another `Pattern`, which is laid over
        the weight before the first input, by :math:`W_k^2 / (H^{-1})_{kk}`. Static.
      stats: Of the rows that entered its matmul, with their gram. None, or a stack
        entry without rows: by magnitude.
      axes: Contracting axes, or `Axes`; as for `magnitude`. Static.
      path: Named in errors. Static.
      damping: :math:`\lambda`, relative to the mean second moment of the inputs that
        are not always zero. Raised tenfold until the factorization succeeds. Static.
      block: Inputs whose weights are compared. Static.
      refine: Steps after the first pass; 0 leaves the published algorithm. An int.

    Returns:
      A `BitmaskArray`, or what the pattern stores, of `w`'s shape and dtype, with
      exactly the sparsity asked for, to rounding of each block. The damped error of
      each output is at most that without `refine`. Weights of inputs that are always
      zero go first.

    Raises:
      ValueError: If an option is out of range, the weight is not finite, its axes are
        unknown, or the statistics are not of this weight or without gram.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 1.0]])
      >>> w = jnp.array([[1.0], [2.0], [3.0]])
      >>> q = sparsegpt_weight(w, 1 / 3, statistics(x, gram=True), damping=1e-4)
      >>> q.materialize()[:, 0].round(2).tolist()
      [0.0, 3.0, 3.0]

    References:
      Frantar & Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023,
      Algorithm 1 and section 3.3 (N:M), in the form of Chee et al., `QuIP
      <https://arxiv.org/abs/2307.13304>`_, 2023, eq. 2 and Theorem 6, which factors H
      instead of its inverse. Differs: lazy updates are gathered by the block that needs
      them, not sent out; `refine`; one size for blocks of masks and of updates.
    """
    who = "prune.sparsegpt"
    check_target(sparsity, who)
    check_feedback(who, damping, block, refine)
    laid = lay(w, stats, axes=axes, path=path, who=who)
    settings = Settings(block=block, damping=damping)
    fixed = None
    if isinstance(sparsity, NM):
        settings = dataclasses.replace(settings, nm=(sparsity.n, sparsity.m))
    elif isinstance(sparsity, Pattern):
        fixed = _laid_over(laid, sparsity, settings)
    else:
        settings = dataclasses.replace(settings, sparsity=sparsity)
    arrays = (laid.w, laid.gram, fixed)
    values, kept = _solve(arrays, jnp.int32(refine), settings)
    capacity = laid.w.shape[-1] * laid.w.shape[-2]
    capacity -= sum(settings.counts(*laid.w.shape[-2:]))
    return laid.leaf(values, kept, sparsity, capacity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static arguments of a run; how many steps refine is traced.

    Attributes:
      block: Inputs between two matmuls over all inputs before them.
      damping: Relative.
      sparsity: Fraction of every block, unless the mask is fixed or N:M.
      nm: n and m, of N:M.
    """

    block: int
    damping: float
    sparsity: float = 0.0
    nm: tuple[int, int] | None = None

    def sizes(self, k: int) -> tuple[int, int]:
        """Inputs of a block, and of a group whose mask is chosen at once."""
        if self.nm is None:
            return min(self.block, k), min(self.block, k)
        m = self.nm[1]
        return max(min(self.block, k) // m, 1) * m, m

    def counts(self, k: int, outputs: int) -> list[int]:
        """Weights to prune in each block; the last may be smaller."""
        b = self.sizes(k)[0]
        ends = range(0, k, b)
        return [pruned_count(self.sparsity, min(b, k - i) * outputs) for i in ends]


def _laid_over(laid: Laid, pattern: Pattern, settings: Settings) -> jax.Array:
    """The mask of a pattern ``[S, K, R]``, by what removing each weight alone costs."""

    def cost(entry: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, gram = entry
        h = factorize(gram, settings.damping).h
        eye = jnp.eye(h.shape[0], dtype=jnp.float32)
        inverse = jax.scipy.linalg.solve(h, eye, assume_a="pos")
        return jnp.square(w) / jnp.diagonal(inverse)[:, None]

    costs = jax.lax.map(cost, (laid.w, laid.gram))
    return laid.columns(pattern.keep_one(laid.weight(costs), laid.axes))


@functools.partial(jax.jit, static_argnames="settings")
def _solve(
    arrays: tuple[jax.Array, jax.Array, jax.Array | None],
    steps: jax.Array,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """Values and mask ``[S, K, R]``, one stack entry after another."""

    def one(
        entry: tuple[jax.Array, jax.Array, jax.Array | None],
    ) -> tuple[jax.Array, jax.Array]:
        w, gram, fixed = entry
        factor = factorize(gram, settings.damping)
        live = jnp.diagonal(gram) > 0
        weighs = jnp.where(live | ~live.any(), factor.importance, 0.0)
        values, kept = _pruned(w, factor.feedback, weighs, fixed, settings)
        return refit(w, values, kept, factor.h, steps), kept

    return jax.lax.map(one, arrays)


def _pruned(
    w: jax.Array,
    feedback: jax.Array,
    importance: jax.Array,
    fixed: jax.Array | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array]:
    """One pass over all inputs: values and mask ``[K, R]``."""
    k, outputs = w.shape
    b, g = settings.sizes(k)
    extra = -k % b
    pad = lambda a: jnp.pad(a, ((0, extra),) + ((0, 0),) * (a.ndim - 1))
    real = pad(jnp.ones(k, bool))
    base, importance, rows = pad(w), pad(importance), pad(feedback)
    counts = jnp.array(settings.counts(k, outputs), jnp.int32)
    given = None if fixed is None else pad(fixed)

    def choose(at: jax.Array, i: jax.Array, moved: jax.Array) -> jax.Array:
        """Mask of a group of inputs, ``[g, R]``, from `at` on, in block i."""
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, at, g)
        if given is not None:
            return cut(given)
        score = cut(importance)[:, None] * jnp.square(moved)
        if settings.nm is not None:
            # What fills the last group is kept last.
            score = jnp.where(cut(real)[:, None], score, -1.0)
            return keep_of_groups(score.T, *settings.nm).T
        score = jnp.where(cut(real)[:, None], score, jnp.inf)
        return ~lowest([rank(score)], counts[i])[0]

    def one_block(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        error, kept = carry
        mine = jax.lax.dynamic_slice_in_dim(rows, i * b, b)
        start = jax.lax.dynamic_slice_in_dim(base, i * b, b)
        target = start + matmul(mine, error)
        among = jax.lax.dynamic_slice_in_dim(
            jnp.pad(mine, ((0, 0), (0, extra))), i * b, b, axis=1
        )

        def one_group(j: jax.Array, carry: tuple[jax.Array, jax.Array]):
            change, kept = carry
            cut = lambda a: jax.lax.dynamic_slice_in_dim(a, j * g, g)
            aim = cut(target) + matmul(cut(among), change)
            # The group where its inputs make up for all errors before it.
            moved = cut(start) + jax.lax.linalg.triangular_solve(
                jax.lax.dynamic_slice_in_dim(cut(among), j * g, g, axis=1),
                aim - cut(start),
                left_side=True,
                lower=True,
                unit_diagonal=True,
            )
            mask = choose(i * b + j * g, i, moved)

            def one_input(n: jax.Array, change: jax.Array) -> jax.Array:
                at = j * g + n
                value = target[at] + matmul(among[at], change)
                value = jnp.where(mask[n], value, 0.0)
                return change.at[at].set(start[at] - value)

            change = jax.lax.fori_loop(0, g, one_input, change)
            put = jax.lax.dynamic_update_slice_in_dim
            return change, put(kept, mask, j * g, axis=0)

        fresh = jnp.zeros_like(start), jnp.zeros(start.shape, bool)
        change, mask = jax.lax.fori_loop(0, b // g, one_group, fresh)
        put = jax.lax.dynamic_update_slice_in_dim
        # Columns of the feedback end where the inputs do: so do the errors.
        errors = put(pad(error), change, i * b, axis=0)[:k]
        return errors, put(kept, mask, i * b, axis=0)

    empty = jnp.zeros_like(w), jnp.zeros(base.shape, bool)
    error, kept = jax.lax.fori_loop(0, (k + extra) // b, one_block, empty)
    kept = kept[:k]
    return jnp.where(kept, w - error, 0.0), kept
