"""`aqlm`: codes and codebooks that change a matmul's output least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.codebook._codes import Codes, lay, output_scale
from jaxcompress.codebook._fit import Search, fit_vectors, fit_weight
from jaxcompress.codebook._hessian import (
    Coded,
    feeding_forward,
    given_all_others,
    refit_books,
    refit_scale,
    sweep,
)
from jaxcompress.leaf import Leaf
from jaxcompress.lift import Algorithm, Statistics
from jaxcompress.lift import sweep as sweep_model
from jaxcompress.lift._algorithm import core_name
from jaxcompress.lift._second_moment import check_feedback, factorize, mean_gram

_BASELINE = Search(iterations=10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static arguments of a run."""

    codes: Codes
    damping: float
    rounds: int
    width: int
    steps: int


def aqlm_weight(
    w: jax.Array,
    codes: Codes,
    stats: Statistics | None,
    *,
    key: jax.Array,
    axes: Any = None,
    path: str = "w",
    damping: float = 0.01,
    iterations: int = 25,
    rounds: int = 6,
    width: int = 4,
    steps: int = 24,
) -> CodebookArray:
    r"""Choose codes and codebooks so that a matmul's output changes least.

    Minimizes :math:`\operatorname{tr}((W - \hat W)^T H (W - \hat W))`,
    :math:`H = X^T X / n + \lambda I`, over sums of codebook entries: codebooks start
    by k-means of residuals, weighted by what errors in each input cost; codes are
    chosen sub-vector by sub-vector, each making up for the errors before it. Then
    `rounds` times: codebooks move to their least squares, scales to theirs, and each
    sub-vector's codes are chosen again by beam search, given all others.

    Args:
      w: ``float[*stack, *core]`` weight.
      codes: The format. Static.
      stats: Of the rows that entered its matmul, with their gram. None: as `additive`
        does without data.
      key: Decides the seeds.
      axes: Roles of its axes, or its contracting axes. Static.
      path: Named in errors. Static.
      damping: :math:`\lambda`, relative to the mean second moment of the inputs that
        are not always zero. Raised tenfold until the factorization succeeds. Static.
      iterations: Of k-means at the start, at most. Static.
      rounds: As above; 0 leaves the first codes (GPTVQ). Static.
      width: Sums of entries that a beam search keeps. Static.
      steps: Of conjugate gradients, for the codebooks. Static.

    Returns:
      A leaf of `w`'s shape and dtype. No round raises the damped error, but for the
      rounding of codebooks and scales to their dtype.

    Raises:
      ValueError: If the format does not fit, an option is out of range, or the
        statistics are not of this weight or without gram.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.01]])
      >>> w = jnp.array([[1.0], [3.0]])
      >>> stats = statistics(x, gram=True)
      >>> one_value = Codes(dims=1, bits=1)
      >>> leaf = aqlm_weight(w, one_value, stats, key=jax.random.key(0))
      >>> leaf.materialize()[:, 0].round(1).tolist()
      [1.0, 3.0]

    References:
      Egiazarian et al., `AQLM <https://arxiv.org/abs/2401.06118>`_, 2024, sections 3.1
      and 3.2; van Baalen et al., `GPTVQ <https://arxiv.org/abs/2402.15319>`_, 2024,
      section 3 (the first codes). Differs: the first codes by error feedback; codebooks
      by conjugate gradients in place of Adam; sub-vectors are chosen in order, all
      outputs at once.
    """
    who = f"codebook.aqlm to {codes.name}"
    search = Search(iterations=iterations, rounds=rounds, width=width)
    search.check(who)
    check_feedback(who, damping, 1, steps)
    if stats is None:
        return fit_weight(w, codes, search, key=key, axes=axes, path=path, who=who)
    laid = lay(w, codes, axes=axes, path=path, who=who)
    gram = mean_gram(stats, laid.stack, laid.inputs, who=who, path=path)
    extra = laid.real.size - laid.inputs
    gram = jnp.pad(gram, ((0, 0), (0, extra), (0, extra)))
    scale = jnp.ones(laid.vectors.shape[:2], jnp.float32)
    if codes.scale:
        scale = output_scale(laid.vectors, laid.real, codes)
    settings = Settings(
        codes=codes, damping=damping, rounds=rounds, width=width, steps=steps
    )
    importance = jax.lax.map(lambda g: factorize(g, damping).importance, gram)
    counts = importance.reshape(importance.shape[0], 1, *laid.real.shape)
    counts = jnp.broadcast_to(counts, laid.vectors.shape)
    start = Search(iterations=iterations, width=width)
    found, books = fit_vectors(laid, counts, scale, key, start)
    real = jnp.asarray(laid.real, jnp.float32)
    data = (laid.vectors, gram, Coded(found, books, scale))
    coded = _solve(data, real, settings)
    return laid.leaf(coded.codes, coded.books, coded.scale if codes.scale else None)


@functools.partial(jax.jit, static_argnames="settings")
def _solve(data: Any, real: jax.Array, settings: Settings) -> Coded:
    """Every stack entry after another."""

    def one(entry: tuple[jax.Array, jax.Array, Coded]) -> Coded:
        w, gram, coded = entry
        return _one(w, gram, coded, real, settings)

    return jax.lax.map(one, data)


def _one(
    w: jax.Array, gram: jax.Array, coded: Coded, real: jax.Array, settings: Settings
) -> Coded:
    codes, d = settings.codes, w.shape[-1]
    factor = factorize(gram, settings.damping)
    forward, among = feeding_forward(factor, d), given_all_others(factor.h, d)

    def fitted(coded: Coded) -> Coded:
        coded = refit_books(w, real, coded, factor.h, settings.steps)
        return refit_scale(w, real, coded, factor.h) if codes.scale else coded

    def stored(coded: Coded) -> Coded:
        scale = codes.rounded(coded.scale)
        scale = jnp.where(scale > 0, scale, coded.scale)
        return coded._replace(books=codes.rounded(coded.books), scale=scale)

    def one_round(i: jax.Array, coded: Coded) -> Coded:
        # The last codes are chosen for what will be stored.
        coded = jax.lax.cond(i == settings.rounds, stored, lambda c: c, coded)
        metric = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), forward, among)
        found = sweep(w, real, coded, metric, settings.width, i > 0)
        coded = coded._replace(codes=found)
        return jax.lax.cond(i < settings.rounds, fitted, lambda c: c, coded)

    return jax.lax.fori_loop(0, settings.rounds + 1, one_round, coded)


def aqlm(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    rules: Mapping[Any, Codes],
    key: jax.Array,
    damping: float = 0.01,
    iterations: int = 25,
    rounds: int = 6,
    width: int = 4,
    steps: int = 24,
    **options: Any,
) -> Any:
    """Compress a model by `aqlm_weight`, weight by weight in the order it runs.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: Parameter pytree.
      batches: Calibration inputs, alike in shape.
      rules: As for `compress`, to `Codes`.
      key: Decides the seeds.
      damping: As for `aqlm_weight`, as what follows.
      iterations: Of k-means at the start.
      rounds: Of codebooks and codes.
      width: Of the beam.
      steps: Of conjugate gradients.
      **options: As for `jaxcompress.lift.sweep`; ``reference=True`` makes up for the
        errors of earlier weights too.

    Returns:
      `params` with compressed leaves where the rules chose. Weights that are only
      looked up have no statistics: they get what `additive` finds.

    Raises:
      ValueError: As `aqlm_weight` and `jaxcompress.lift.sweep` do, before any work.
      LiftError: As `jaxcompress.lift.sweep` does.

    Examples:
      >>> import jaxcompress as jc
      >>> key = jax.random.key(0)
      >>> params = {"w": jax.random.normal(key, (32, 8))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 32))
      >>> rules = {"w": Codes(dims=2, bits=2, books=2)}
      >>> aqlm(lambda p, x: x @ p["w"], params, [x], rules=rules, key=key)
      {'w': CodebookArray(codebook 2x2 bit d2, float32[32, 8])}

    References:
      As for `aqlm_weight`.
    """
    core = functools.partial(
        aqlm_weight,
        key=key,
        damping=damping,
        iterations=iterations,
        rounds=rounds,
        width=width,
        steps=steps,
    )
    algorithms = {rule: _algorithm(core, codes, key) for rule, codes in rules.items()}
    return sweep_model(fn, params, batches, algorithms, **options)


def _algorithm(core: Any, codes: Codes, key: jax.Array) -> Algorithm:
    def run(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        return core(w, codes, stats, axes=axes, path=path)

    def baseline(w: Any, stats: Any, *, axes: Any, path: str) -> Leaf:
        del stats
        who = f"codebook.aqlm to {codes.name}"
        return fit_weight(w, codes, _BASELINE, key=key, axes=axes, path=path, who=who)

    return Algorithm(run=run, baseline=baseline, name=f"{core_name(core)} {codes!r}")
