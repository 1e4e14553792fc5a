"""What the distillation experiments share: a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxcompress as jc

SEEDS = (0, 1, 2)


class Seen(NamedTuple):
    """What a loss may compare, for a batch.

    Attributes:
      student: Logits or embeddings of the student.
      teacher: Of the teacher.
      labels: What the data say.
      student_taps: Values inside the student, by name, where the loss needs them.
      teacher_taps: Values inside the teacher.
      projectors: Params of the method's projectors.
    """

    student: Any
    teacher: Any
    labels: Any
    student_taps: Any = None
    teacher_taps: Any = None
    projectors: Any = None


def train(
    params: Any,
    loss: Callable[..., tuple[jax.Array, Any]],
    batches: Iterable[Any],
    tx: optax.GradientTransformation,
    *,
    steps: int,
    aux: Any = None,
    scheme: jc.Transform | None = None,
) -> tuple[Any, Any]:
    """Params after training, stored, and what the loss carries from batch to batch.

    Args:
      params: What is trained.
      loss: ``(params, aux, batch, step) -> (loss, aux)``, of the scheme's view.
      batches: At least `steps` pytrees of arrays, alike in shape.
      tx: The optimizer.
      steps: How many batches.
      aux: What is not trained: batch statistics, memories.
      scheme: How params are compressed while they are trained.
    """

    scheme = jc.identity() if scheme is None else scheme
    params, _ = scheme.init(params)
    tx = jc.optim.attach(tx, scheme)

    @jax.jit
    def step(params: Any, aux: Any, opt: Any, batch: Any, i: jax.Array) -> Any:
        def viewed(params: Any) -> tuple[jax.Array, Any]:
            return loss(scheme.view(params, jc.optim.state(opt)), aux, batch, i)

        (value, aux), grads = jax.value_and_grad(viewed, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), aux, opt, value

    opt, losses = tx.init(params), []
    for i, batch in zip(range(steps), batches, strict=False):
        params, aux, opt, value = step(params, aux, opt, batch, np.int32(i))
        losses.append(value)
        if (i + 1) % max(1, steps // 4) == 0:
            recent = float(np.mean([float(v) for v in losses[-50:]]))
            print(f"  step {i + 1} of {steps}: loss {recent:.4f}", flush=True)
    return scheme.compress(params, jc.optim.state(opt)), aux
