"""AdaRound: which of its two neighbours each weight is rounded to is learned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.layout import Axes
from jaxcompress.lift import Statistics
from jaxcompress.lift._second_moment import matmul, unit_moment
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._reconstruct import finish, lay
from jaxcompress.quant._rounding import divisor
from jaxcompress.quant._steps import Problem, Steps, static_steps

_ZETA, _GAMMA = 1.1, -0.1
_FIRST_POWER, _LAST_POWER = 20.0, 2.0
_FREE = 0.2  # The part of the iterations without the regularizer.
_BETAS = (0.9, 0.999)


def adaround_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Axes | int | tuple[int, ...] | None = None,
    path: str = "w",
    iterations: int = 1000,
    learning_rate: float = 0.02,
    regularization: float = 0.02,
    candidates: int = 16,
) -> QuantizedArray:
    r"""Quantize one weight, learning for each entry whether to round it up or down.

    With the neighbours :math:`l \le w \le u` of each weight on the grid,
    :math:`Q = l + (u - l)\, h(V)` and :math:`H = X^T X`, minimizes by Adam over V

    .. math::
        \operatorname{tr}((W - Q)^T H (W - Q)) + \lambda \sum 1 - |2 h(V) - 1|^\beta,
        \quad h(V) = \operatorname{clip}(1.2\, \sigma(V) - 0.1, 0, 1),

    where :math:`\beta` falls from 20 to 2, so that each h ends at 0 or 1.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format, of any kind; its own ``search`` is not used. Static.
      stats: Of the rows that entered its matmul, with their gram. None, or a stack
        entry without rows: rounding to the searched scales.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      iterations: Of Adam. Static.
      learning_rate: Of Adam. Static.
      regularization: :math:`\lambda`, with errors in units of the grid's spacing and H
        relative to the mean of its diagonal. Static.
      candidates: Clipping ranges tried for each scale, by the error weighted with H's
        diagonal; 1 takes the largest weight's. Static.

    Returns:
      A leaf of `w`'s shape and dtype, packed. Every value is one of the two grid
      points next to the weight (or the last, where the range is clipped). The output
      error of each output is at most that of rounding to the same scales.

    Raises:
      ValueError: As `quantize` does; or if the statistics are not of this weight or
        without gram, the format rounds other than to nearest, or an option is out of
        range.
      TypeError: If `w` is not real floating.

    Examples:
      >>> from jaxcompress.lift import statistics
      >>> from jaxcompress.quant import int4
      >>> x = jnp.array([[0.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
      >>> w = jnp.array([[7.0], [3.4], [0.4]])
      >>> stats = statistics(x, gram=True)
      >>> q = adaround_weight(w, int4(), stats, candidates=1).materialize()[:, 0]
      >>> q.tolist() in ([7.0, 3.0, 1.0], [7.0, 4.0, 0.0])
      True

    References:
      Nagel et al., `Up or Down? Adaptive Rounding for Post-Training Quantization
      <https://arxiv.org/abs/2004.10568>`_, 2020, eq. 21-25. Differs: the error is of
      eq. 21's form, from the second moment instead of samples, in units of the grid, so
      that one lambda serves all layers; outputs that rounding serves better keep it.
    """
    who = f"adaround to {fmt.name}"
    if iterations < 1:
        raise ValueError(f"{who}: iterations must be positive; got {iterations}.")
    if not learning_rate > 0.0:
        raise ValueError(f"{who}: learning_rate must be positive; got {learning_rate}.")
    if not regularization >= 0.0:
        raise ValueError(
            f"{who}: regularization must not be negative; got {regularization}."
        )
    laid = lay(w, fmt, stats, axes=axes, path=path, candidates=candidates, who=who)
    settings = Settings(
        problem=laid.problem,
        iterations=iterations,
        learning_rate=learning_rate,
        regularization=regularization,
    )
    codes, steps = _solve((laid.w, laid.gram, laid.steps, laid.tensor), settings)
    return finish(laid, codes, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static arguments of a run."""

    problem: Problem
    iterations: int
    learning_rate: float
    regularization: float


class Neighbours(NamedTuple):
    """The two grid points of each weight, all ``[K, R]``.

    Attributes:
      below: Code of the lower.
      above: Code of the upper.
      value: Of the lower.
      gap: From the lower to the upper.
      part: Where the weight lies between them, 0 to 1.
    """

    below: jax.Array
    above: jax.Array
    value: jax.Array
    gap: jax.Array
    part: jax.Array


@functools.partial(jax.jit, static_argnames="settings")
def _solve(arrays: tuple[Any, ...], settings: Settings) -> tuple[jax.Array, Steps]:
    """Codes ``[S, K, R]`` and scales, one stack entry after another."""
    return jax.lax.map(lambda entry: _one(entry, settings), arrays)


def _one(arrays: tuple[Any, ...], settings: Settings) -> tuple[jax.Array, Steps]:
    """Codes ``[K, R]`` and scales ``[groups, blocks]`` of one weight."""
    w, gram, fixed, tensor = arrays
    problem = settings.problem
    h = unit_moment(gram)
    steps = fixed
    if steps is None:
        steps = static_steps(w, jnp.diagonal(h), tensor, problem)
    each = w.shape[0] // problem.groups
    full = jax.tree.map(lambda s: jnp.repeat(problem.spread(s), each, axis=0), steps)
    near = neighbours(w, full, problem)
    up = _learn(w, h, near, settings) >= 0.5
    learned = jnp.where(up, near.above, near.below)
    rounded = problem.encode(w, full)

    def error(codes: jax.Array) -> jax.Array:
        e = w - problem.decode(codes, full)
        return (e * matmul(h, e)).sum(0, keepdims=True)

    better = error(learned) <= error(rounded)
    return jnp.where(better, learned, rounded), steps


def neighbours(w: jax.Array, steps: Steps, problem: Problem) -> Neighbours:
    """The grid points next to each weight; the last two beyond the grid."""
    codes, values = _grid(problem)
    table = jnp.asarray(values)
    x = w / divisor(steps.scale)
    if steps.zero is not None:
        x = x + steps.zero
    low = jnp.searchsorted(table[1:-1], x, side="right")
    below, above = table[low], table[low + 1]
    value = below if steps.zero is None else below - steps.zero
    table = jnp.asarray(codes)
    return Neighbours(
        below=table[low],
        above=table[low + 1],
        value=value * steps.scale,
        gap=(above - below) * steps.scale,
        part=jnp.clip((x - below) / (above - below), 0.0, 1.0),
    )


def _grid(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """All codes of a format by ascending value, and their values; the zero point in."""
    element = problem.fmt.element
    codes = np.arange(2**element.bits, dtype=np.uint8)
    with jax.ensure_compile_time_eval():
        values = np.asarray(element.decode(jnp.asarray(codes)))
    low, high = element.range
    fits = np.isfinite(values) & (values >= low) & (values <= high)
    _, first = np.unique(values[fits], return_index=True)  # Of two zeros, the first.
    return codes[fits][first], values[fits][first]


def _learn(
    w: jax.Array, h: jax.Array, near: Neighbours, settings: Settings
) -> jax.Array:
    """h(V) ``[K, R]`` after all iterations; eq. 21 to 25."""
    n = settings.iterations
    unit = jnp.square(near.gap).mean()
    unit = jnp.where(unit > 0, unit, 1.0)

    def soft(v: jax.Array) -> jax.Array:
        return jnp.clip(jax.nn.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA, 0.0, 1.0)

    def slope(v: jax.Array, i: jax.Array) -> jax.Array:
        done = jnp.clip((i / n - _FREE) / (1.0 - _FREE), 0.0, 1.0)
        power = _FIRST_POWER + (_LAST_POWER - _FIRST_POWER) * done
        weight = jnp.where(i < _FREE * n, 0.0, settings.regularization)
        up, pull = jax.vjp(soft, v)
        e = w - near.value - near.gap * up
        signed = 2.0 * up - 1.0
        apart = -2.0 * power * jnp.sign(signed) * jnp.abs(signed) ** (power - 1.0)
        return pull(-2.0 * near.gap * matmul(h, e) / unit + weight * apart)[0]

    def step(
        carry: tuple[jax.Array, ...], i: jax.Array
    ) -> tuple[tuple[jax.Array, ...], None]:
        v, first, second = carry
        g = slope(v, i)
        first = _BETAS[0] * first + (1 - _BETAS[0]) * g
        second = _BETAS[1] * second + (1 - _BETAS[1]) * jnp.square(g)
        one = first / (1 - _BETAS[0] ** (i + 1.0))
        two = second / (1 - _BETAS[1] ** (i + 1.0))
        v = v - settings.learning_rate * one / (jnp.sqrt(two) + 1e-8)
        return (v, first, second), None

    inside = (near.part - _GAMMA) / (_ZETA - _GAMMA)
    start = jnp.log(inside) - jnp.log1p(-inside)
    zeros = jnp.zeros_like(start)
    count = jnp.arange(n, dtype=jnp.float32)
    return soft(jax.lax.scan(step, (start, zeros, zeros), count)[0][0])
