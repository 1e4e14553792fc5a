"""Training towards the float model's outputs, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import jaxcompress as jc

Loss = Callable[[Any, Any], jax.Array]
"""``(output, teacher's output) -> scalar``."""


def tune(
    apply: Callable[..., Any],
    params: Any,
    packed: Any,
    batches: Sequence[tuple[Any, ...]],
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
) -> Any:
    """Train norms, biases and other plain arrays of `packed` on what `params` gives.

    Args:
      apply: ``apply(params, *batch)``.
      params: The float parameters: the teacher.
      packed: The compressed ones; codes and scales stay as they are.
      batches: Calibration inputs, used in turn.
      loss: Of the output and the teacher's.
      steps: Steps of Adam, with a cosine schedule.
      learning_rate: The first.

    Returns:
      `packed` with other plain arrays.

    References:
      Li et al., `Norm Tweaking <https://arxiv.org/abs/2309.02784>`_, 2023. Differs: all
      plain arrays, on the model's output.
    """
    lifted = jc.lift(apply)
    free, frozen = jc.partition(packed)

    def objective(free: Any, _: Any, batch: Any) -> jax.Array:
        return loss(lifted(jc.merge(free, frozen), *batch), apply(params, *batch))

    free, _ = _minimize(objective, _adam(steps, learning_rate), free, batches, steps)
    return jc.merge(free, frozen)


def distil(
    apply: Callable[..., Any],
    params: Any,
    scheme: jc.Transform,
    batches: Sequence[tuple[Any, ...]],
    loss: Loss,
    *,
    steps: int,
    learning_rate: float,
) -> Any:
    """Train all parameters through a scheme: quantization-aware distillation.

    Args:
      apply: ``apply(params, *batch)``.
      params: The float parameters: the teacher, and where the student starts.
      scheme: What the student's weights go through.
      batches: As for `tune`, as what follows.
      loss: Of the output and the teacher's.
      steps: Steps of Adam.
      learning_rate: The first.

    Returns:
      The compressed student.
    """
    lifted = jc.lift(apply)

    def objective(student: Any, opt_state: Any, batch: Any) -> jax.Array:
        view = scheme.view(student, jc.optim.state(opt_state))
        return loss(lifted(view, *batch), apply(params, *batch))

    tx = jc.optim.attach(_adam(steps, learning_rate), scheme)
    student = scheme.init(params)[0]
    student, opt_state = _minimize(objective, tx, student, batches, steps)
    return scheme.compress(student, jc.optim.state(opt_state))


def _adam(steps: int, learning_rate: float) -> Any:
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return optax.with_extra_args_support(optax.adam(schedule))


def _minimize(
    objective: Callable[[Any, Any, Any], jax.Array],
    tx: optax.GradientTransformationExtraArgs,
    params: Any,
    batches: Sequence[tuple[Any, ...]],
    steps: int,
) -> tuple[Any, Any]:
    """Parameters and optimizer state after `steps` steps."""

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        grads = jax.grad(objective)(params, opt_state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in itertools.islice(itertools.cycle(batches), steps):
        params, opt_state = step(params, opt_state, batch)
    return params, opt_state
