"""What is left in float after quantization, tuned to the float model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import jaxcompress as jc


def tune(
    apply: Callable[..., Any],
    params: Any,
    packed: Any,
    batches: Sequence[tuple[Any, ...]],
    loss: Callable[[Any, Any], jax.Array],
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
      loss: ``(output, teacher's output) -> scalar``.
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
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(free: Any, opt_state: Any, batch: Any, target: Any) -> Any:
        grads = jax.grad(lambda f: loss(lifted(jc.merge(f, frozen), *batch), target))(
            free
        )
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(free, updates), opt_state

    targets = [jax.jit(apply)(params, *batch) for batch in batches]
    opt_state = tx.init(free)
    for i in range(steps):
        n = i % len(batches)
        free, opt_state = step(free, opt_state, batches[n], targets[n])
    return jc.merge(free, frozen)
