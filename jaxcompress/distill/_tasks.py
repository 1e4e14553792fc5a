"""Losses of several heads in one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ._logits import check_where, kept


def multi_task(
    losses: Mapping[str, jax.Array],
    *,
    weights: Mapping[str, float | jax.Array] | None = None,
    log_variances: Mapping[str, jax.Array] | None = None,
    where: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    r"""The losses of several tasks, added with given or learned weights.

    .. math:: \sum_t w_t \big( e^{-s_t} L_t + \tfrac{1}{2} s_t \big)

    Args:
      losses: By task, ``float[...]`` per example, all of one shape.
      weights: Of each task; 1 where None or a task is not named.
      log_variances: By task, a scalar ``s_t = log sigma_t^2`` that is trained with
        the student's params, 0 at the start; every task must have one. Losses are
        then cross entropies or divergences, or half a squared error. Without it ``s``
        is zero, and the losses are only weighted.
      where: By task, ``bool[...]`` examples that have it; others, which may be NaN,
        count for nothing. All of them for a task that is not named.

    Returns:
      ``float32[...]``, a loss an example. With ``log_variances`` a task's weight
      settles at one by its mean loss: ``e^s = 2 mean(L)``.

    Raises:
      ValueError: If shapes differ, or a task is unknown or lacks a variance.

    Examples:
      >>> losses = {"digits": jnp.array([1.0]), "parity": jnp.array([2.0])}
      >>> multi_task(losses, weights={"parity": 0.5}).tolist()
      [2.0]

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses
      <https://arxiv.org/abs/1705.07115>`_, 2018, eq. 7 (half a squared error) and
      eq. 10 (cross entropy), in the logarithm of the variance. Differs: weights.
    """
    weights, where = dict(weights or {}), dict(where or {})
    _check(losses, weights, log_variances, where)
    total = []
    for task, loss in losses.items():
        part = kept(jnp.asarray(loss).astype(jnp.float32), where.get(task))
        if log_variances is not None:
            s = jnp.asarray(log_variances[task]).astype(jnp.float32)
            part = kept(jnp.exp(-s) * part + 0.5 * s, where.get(task))
        total.append(jnp.asarray(weights.get(task, 1.0), jnp.float32) * part)
    return jnp.stack(total).sum(0)


def _check(
    losses: Mapping[str, jax.Array],
    weights: Mapping[str, float | jax.Array],
    log_variances: Mapping[str, jax.Array] | None,
    where: Mapping[str, jax.Array],
) -> None:
    who = "distill.multi_task"
    if not losses:
        raise ValueError(f"{who}: losses must hold one task or more; got none.")
    first, shape = next((task, jnp.shape(loss)) for task, loss in losses.items())
    for task, loss in losses.items():
        if jnp.shape(loss) != shape:
            raise ValueError(
                f"{who}: losses must have one shape, a loss an example; got {shape} "
                f"for {first!r} and {jnp.shape(loss)} for {task!r}. Sum or average "
                "the positions of each."
            )
        if log_variances is not None and task not in log_variances:
            raise ValueError(
                f"{who}: log_variances must have every task; {task!r} is not in it. "
                "Add jnp.float32(0.0) for it to the student's params."
            )
        check_where(f"{who}, {task!r}", where.get(task), shape)
    options = {"weights": weights, "log_variances": log_variances or {}, "where": where}
    for name, given in options.items():
        for task in given.keys() - losses.keys():
            near = difflib.get_close_matches(task, losses) or list(losses)
            raise ValueError(
                f"{who}: {name} names the task {task!r}, which has no loss; the "
                f"nearest are {near}."
            )
