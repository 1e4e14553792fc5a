"""Batches that the student wrote among those of the data."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.core import Tracer

from ._sampling import Sampled


def on_policy_or_data(
    sampler: Callable[[jax.Array], Sampled],
    data: Sampled,
    key: jax.Array,
    *,
    fraction: float | jax.Array,
) -> Sampled:
    r"""A batch that the student wrote, with probability `fraction`, or one of the data.

    .. math:: u \sim U(0, 1); \quad u < \lambda \;\Rightarrow\; \text{the student's}

    Args:
      sampler: From a key to the student's sequences, of the shapes of `data`; only
        run if its turn comes (not so under `vmap`).
      data: A batch of the data, its answers marked as written.
      key: Consumed. The same key chooses and samples the same.
      fraction: In [0, 1]; traced or not, so it may follow a schedule.

    Returns:
      One of the two, whole.

    Raises:
      ValueError: If `fraction` is out of range, or shapes or dtypes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> data = Sampled(jnp.array([[1, 2]]), jnp.array([[False, True]]))
      >>> mine = lambda key: data._replace(tokens=jnp.array([[1, 3]]))
      >>> on_policy_or_data(mine, data, jax.random.key(0), fraction=1.0).tokens.tolist()
      [[1, 3]]

    References:
      Agarwal et al., `On-Policy Distillation of Language Models
      <https://arxiv.org/abs/2306.13649>`_, 2024, Algorithm 1. The loss it then takes
      is `jensen_shannon`, or a divergence of either direction.
    """
    who = "distill.on_policy_or_data"
    if not isinstance(fraction, Tracer) and not 0.0 <= float(fraction) <= 1.0:
        raise ValueError(f"{who}: fraction must be in [0, 1]; got {fraction}.")
    choose, write = jax.random.split(key)
    form = lambda s: [(a.shape, a.dtype.name) for a in s]
    ours, theirs = form(jax.eval_shape(sampler, write)), form(data)
    if ours != theirs:
        raise ValueError(
            f"{who}: sampler must give tokens and written of the data's shapes and "
            f"dtypes, {theirs}; got {ours}. Pad the data, or choose another length."
        )
    mine = jax.random.uniform(choose) < fraction
    return jax.lax.cond(mine, sampler, lambda key: data, write)
