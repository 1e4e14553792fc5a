"""Running statistics of batch norms, estimated again after compression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.lift import lift


def recalibrate_batch_norm(
    apply: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    collection: str = "batch_stats",
) -> Any:
    r"""Replace running statistics by the mean over some batches.

    A norm updates :math:`r' = m r + (1 - m) b` with the statistics `b` of a batch. Runs
    from :math:`r = 0` and :math:`r = 1` give `m` and `b` of each entry, so that no
    momentum needs to be known and the result is the plain mean of `b`.

    Args:
      apply: ``apply(variables, *batch) -> (outputs, updates)``, with norms in training
        mode: ``lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])``.
        It is lifted: variables may hold compressed leaves.
      variables: A mapping of collections, one of which is `collection`.
      batches: Inputs, distributed as in training (augmented if they were then): tuples
        of arguments, or single arguments.
      collection: Name of the collection of running statistics.

    Returns:
      `variables` with that collection replaced; all else is the same objects. Of
      equal weight for every batch: means are exact for batches of equal size,
      variances are those within a batch, averaged.

    Raises:
      ValueError: If there are no batches or no such collection, or a statistic does
        not change (a norm in evaluation mode).

    References:
      Nagel et al., `Overcoming Oscillations in Quantization-Aware Training
      <https://arxiv.org/abs/2203.11086>`_, 2022, section 3.2 (re-estimation); Wu &
      Johnson, `Rethinking "Batch" in BatchNorm <https://arxiv.org/abs/2105.07576>`_,
      2021, section 3.2 (averages without momentum).
    """
    if collection not in variables:
        raise ValueError(
            f"recalibrate_batch_norm: variables must have the collection "
            f"{collection!r}; got {sorted(variables)}."
        )
    run = lift(apply)

    @jax.jit
    def estimate(variables: Any, batch: tuple[Any, ...]) -> tuple[Any, Any]:
        """Statistics of a batch, and the momentum."""

        def after(value: float) -> Any:
            start = jax.tree.map(
                lambda a: jnp.full_like(a, value), variables[collection]
            )
            _, updates = run({**variables, collection: start}, *batch)
            return updates[collection]

        zeros, ones = after(0.0), after(1.0)
        momentum = jax.tree.map(_momentum, zeros, ones)
        found = jax.tree.map(
            lambda b, m: b.astype(jnp.float32) / jnp.where(m < 1, 1 - m, 1.0),
            zeros,
            momentum,
        )
        return found, momentum

    total: Any = None
    number = 0
    for number, item in enumerate(batches, start=1):
        batch = item if isinstance(item, tuple) else (item,)
        found, momentum = estimate(variables, batch)
        if number == 1:
            _check_momentum(momentum, collection)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if not number:
        raise ValueError(
            "recalibrate_batch_norm: batches is empty; pass at least one batch."
        )
    mean = jax.tree.map(
        lambda t, a: (t / number).astype(a.dtype), total, variables[collection]
    )
    return {**variables, collection: mean}


def _momentum(zeros: jax.Array, ones: jax.Array) -> jax.Array:
    """Momentum of a norm, read where its statistics round it least."""
    zeros, ones = (a.astype(jnp.float32).reshape(-1) for a in (zeros, ones))
    i = jnp.argmin(jnp.abs(zeros))
    return ones[i] - zeros[i]


def _check_momentum(momentum: Any, collection: str) -> None:
    for path, m in jax.tree_util.tree_flatten_with_path(momentum)[0]:
        if isinstance(m, Tracer):
            return
        if not float(m) < 1.0 - 1e-6:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"recalibrate_batch_norm: {collection}/{name} does not change; apply "
                "must run its norms in training mode (train=True, mutable="
                f"[{collection!r}])."
            )
