"""Values that change over training: functions from a step to a float32 scalar.

A schedule is any function of the step count. Those here are pure and traceable, so
that one compiled training step serves every step of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Schedule = Callable[[Any], jax.Array]
"""From a step (int, or traced ``int32[]``) to ``float32[]``."""


def constant(value: float) -> Schedule:
    """The same value at every step.

    Examples:
      >>> float(constant(0.5)(7))
      0.5
    """

    def schedule(step: Any) -> jax.Array:
        del step
        return jnp.float32(value)

    return schedule


def one_shot(value: float, *, at: int) -> Schedule:
    """Zero before step `at`, `value` from then on.

    Examples:
      >>> schedule = one_shot(0.5, at=10)
      >>> float(schedule(9)), float(schedule(10))
      (0.0, 0.5)
    """

    def schedule(step: Any) -> jax.Array:
        return jnp.where(step >= at, jnp.float32(value), jnp.float32(0))

    return schedule


def linear(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    """From `initial` at step `begin` to `final` at step `end`, in a straight line.

    Args:
      initial: Value up to and at step `begin`.
      final: Value at and after step `end`.
      begin: First step of the change.
      end: Last step of the change; above `begin`.

    Returns:
      A schedule that equals both ends exactly.

    Raises:
      ValueError: If `end` is not above `begin`.

    Examples:
      >>> float(linear(0.0, 1.0, begin=10, end=14)(11))
      0.25
    """
    _check_steps("linear", begin, end)

    def schedule(step: Any) -> jax.Array:
        left = _fraction_left(step, begin, end)
        return initial * left + final * (1 - left)

    return schedule


def cubic(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    r"""From `initial` to `final`, fast at first and then ever slower.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{n \Delta t}\right)^3

    Args:
      initial: :math:`s_i`, the value up to and at step `begin`.
      final: :math:`s_f`, the value at and after step `end`.
      begin: :math:`t_0`.
      end: :math:`t_0 + n \Delta t`; above `begin`.

    Returns:
      A schedule that equals both ends exactly, and between them is monotone.

    Raises:
      ValueError: If `end` is not above `begin`.

    Examples:
      >>> schedule = cubic(0.0, 0.8, begin=0, end=100)
      >>> [round(float(schedule(step)), 3) for step in (0, 50, 100, 1000)]
      [0.0, 0.7, 0.8, 0.8]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
      2017, eq. 1. Differs: defined at every step; how often masks follow it
      (:math:`\Delta t`) is ``every=`` of the transform.
    """
    _check_steps("cubic", begin, end)

    def schedule(step: Any) -> jax.Array:
        left = _fraction_left(step, begin, end) ** 3
        return initial * left + final * (1 - left)

    return schedule


def _fraction_left(step: Any, begin: int, end: int) -> jax.Array:
    """1 at `begin`, 0 at `end`; steps are subtracted as integers, so none is lost."""
    done = jnp.clip(jnp.asarray(step, jnp.int32) - begin, 0, end - begin)
    return 1 - done.astype(jnp.float32) / (end - begin)


def _check_steps(who: str, begin: int, end: int) -> None:
    if end <= begin:
        raise ValueError(
            f"{who}: end must be above begin; got begin={begin}, end={end}. For a "
            "change at once use one_shot(value, at=step)."
        )
