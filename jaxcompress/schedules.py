"""Schedules, from step to value: of sparsities, temperatures, loss weights."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]
"""``int32 step -> float32 value``; traceable."""


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: jnp.full(jnp.shape(step), value, jnp.float32)


def one_shot(value: float, *, at: int, before: float = 0.0) -> Schedule:
    """`before` until step `at`, then `value`.

    Examples:
      >>> [float(one_shot(0.5, at=2)(jnp.array(s))) for s in (1, 2, 3)]
      [0.0, 0.5, 0.5]
    """
    return lambda step: jnp.where(step >= at, value, before).astype(jnp.float32)


def linear(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    """A straight line between two steps, constant outside.

    Examples:
      >>> [float(linear(0.0, 1.0, begin=0, end=4)(jnp.array(s))) for s in (0, 1, 9)]
      [0.0, 0.25, 1.0]
    """
    return _power(initial, final, begin, end, 1)


def cubic(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    r"""Fast at first, slow at the end.

    .. math:: s_t = s_f + (s_i - s_f)\left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Args:
      initial: Value up to step `begin`.
      final: Value from step `end` on.
      begin: First step of the ramp.
      end: Last step of the ramp.

    Raises:
      ValueError: If `end` is not after `begin`.

    Examples:
      >>> [float(cubic(0.0, 0.8, begin=0, end=2)(jnp.array(s))) for s in (0, 1, 2)]
      [0.0, 0.699999..., 0.800000...]

    References:
      Zhu & Gupta, `To Prune, or Not to Prune <https://arxiv.org/abs/1710.01878>`_,
      2017, eq. 1. Differs: every step; how often masks change belongs to the
      transform (``every=``).
    """
    return _power(initial, final, begin, end, 3)


def cosine(initial: float, final: float, *, begin: int, end: int) -> Schedule:
    r"""Slow at both ends.

    .. math:: s_t = s_f + \frac{s_i - s_f}{2}
       \left(1 + \cos \frac{\pi (t - t_0)}{t_1 - t_0}\right)

    Args:
      initial: Value up to step `begin`.
      final: Value from step `end` on.
      begin: First step of the ramp.
      end: Last step of the ramp.

    Raises:
      ValueError: If `end` is not after `begin`.

    Examples:
      >>> [float(cosine(0.5, 0.0, begin=0, end=2)(jnp.array(s))) for s in (0, 1, 2)]
      [0.5, 0.24999..., 0.0]

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020,
      section 3 (from alpha to 0, as the fraction of weights that is dropped).
    """

    def left(done: jax.Array) -> jax.Array:
        return jnp.where(done < 1.0, 0.5 * (1.0 + jnp.cos(jnp.pi * done)), 0.0)

    return _ramp(initial, final, begin, end, left)


def _power(initial: float, final: float, begin: int, end: int, power: int) -> Schedule:
    return _ramp(initial, final, begin, end, lambda done: (1.0 - done) ** power)


def _ramp(
    initial: float,
    final: float,
    begin: int,
    end: int,
    left: Callable[[jax.Array], jax.Array],
) -> Schedule:
    if end <= begin:
        raise ValueError(
            f"schedule: end must be after begin; got begin={begin}, end={end}. For a "
            "jump use one_shot(value, at=step)."
        )

    def schedule(step: jax.Array) -> jax.Array:
        done = jnp.clip((step - begin) / (end - begin), 0.0, 1.0).astype(jnp.float32)
        return jnp.float32(final) + jnp.float32(initial - final) * left(done)

    return schedule
