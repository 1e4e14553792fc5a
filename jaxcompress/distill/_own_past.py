"""Teachers made of the student's own params over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.schedules import Schedule

Params = Any


class Teacher(NamedTuple):
    """A teacher made of the student's own params over time.

    Attributes:
      init: ``params -> state``.
      update: ``(params, state) -> (teacher's params, state)``, once a step; pure, and
        may be jitted.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any], tuple[Params, Any]]


class EmaState(NamedTuple):
    """State of `ema_teacher`.

    Attributes:
      step: ``int32``, updates so far.
      forgotten: ``float32``, the product of all decays: the weight still missing.
      average: The params' floats in float32, `None` elsewhere.
    """

    step: jax.Array
    forgotten: jax.Array
    average: Any


def ema_teacher(decay: float | Schedule) -> Teacher:
    r"""The mean teacher: an exponential moving average of the student's params.

    .. math::
        \theta'_t = \theta'_{t-1} +
        \frac{1 - \alpha_t}{1 - \prod_{s \le t} \alpha_s} (\theta_t - \theta'_{t-1})

    which is the average of all params seen by `update`, with weights that fall by
    :math:`\alpha` a step and sum to one: the correction of Adam's bias. The first
    teacher is the student itself.

    Args:
      decay: In [0, 1), or a schedule of it. While it is 1 from the start on, the
        teacher is the student.

    Returns:
      A `Teacher`. The average is kept in float32, so that it moves in bfloat16 too,
      and given in the params' dtypes. Integers and frozen components are the
      student's. Average before ``compress``: stored codes cannot be averaged.

    Raises:
      ValueError: If `decay` is out of range.

    Examples:
      >>> teacher = ema_teacher(0.5)
      >>> state = teacher.init({"w": jnp.array(0.0)})
      >>> for w in (1.0, 4.0):
      ...     params, state = teacher.update({"w": jnp.array(w)}, state)
      >>> float(params["w"])
      3.0

    References:
      Tarvainen & Valpola, `Mean teachers are better role models
      <https://arxiv.org/abs/1703.01780>`_, 2017, eq. 1. Differs: corrected for the
      start. ``optax.ema`` does the same for updates, in trees of floats.
    """
    if not callable(decay) and not 0.0 <= decay < 1.0:
        raise ValueError(
            f"distill.ema_teacher: decay must be in [0, 1); got {decay}. 0.999 is "
            "usual."
        )

    def init(params: Params) -> EmaState:
        zeros = jax.tree.map(
            lambda a: jnp.zeros(jnp.shape(a), jnp.float32), tree.partition(params)[0]
        )
        return EmaState(jnp.int32(0), jnp.float32(1.0), zeros)

    def update(params: Params, state: EmaState) -> tuple[Params, EmaState]:
        d = decay(state.step) if callable(decay) else jnp.float32(decay)
        forgotten = state.forgotten * d
        seen = forgotten < 1.0
        rate = jnp.where(seen, (1.0 - d) / jnp.where(seen, 1.0 - forgotten, 1.0), 1.0)
        floats, rest = tree.partition(params)
        average = jax.tree.map(
            lambda m, a: m + rate * (a.astype(jnp.float32) - m), state.average, floats
        )
        teacher = jax.tree.map(lambda m, a: m.astype(a.dtype), average, floats)
        state = EmaState(state.step + 1, forgotten, average)
        return jax.lax.stop_gradient(tree.merge(teacher, rest)), state

    return Teacher(init, update)


class SnapshotState(NamedTuple):
    """State of `snapshot_teacher`.

    Attributes:
      step: ``int32``, updates so far.
      params: The teacher's.
    """

    step: jax.Array
    params: Params


def snapshot_teacher(*, every: int) -> Teacher:
    """The student as it was at its last snapshot: with an epoch's steps, a generation.

    Args:
      every: Steps between snapshots. The first is the params given to `init`, the
        next those of the update number `every`, counted from 1.

    Returns:
      A `Teacher`.

    Raises:
      ValueError: If `every` is not positive.

    References:
      Furlanello et al., `Born-Again Neural Networks
      <https://arxiv.org/abs/1805.04770>`_, 2018, section 3; with an epoch as a
      generation, Kim et al., `Self-Knowledge Distillation with Progressive
      Refinement <https://arxiv.org/abs/2006.12000>`_, 2021, section 3. Differs: the
      student goes on from its weights.
    """
    if every < 1:
        raise ValueError(
            f"distill.snapshot_teacher: every must be at least 1 step; got {every}."
        )

    def init(params: Params) -> SnapshotState:
        return SnapshotState(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(params: Params, state: SnapshotState) -> tuple[Params, SnapshotState]:
        now = (state.step + 1) % every == 0
        teacher = jax.tree.map(
            lambda new, old: jnp.where(now, new, old), params, state.params
        )
        teacher = jax.lax.stop_gradient(teacher)
        return teacher, SnapshotState(state.step + 1, teacher)

    return Teacher(init, update)
