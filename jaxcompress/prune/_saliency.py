"""Scores from the gradients of a loss, to prune before training or at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.progress import track
from jaxcompress.prune import scores as score
from jaxcompress.tree import merge, partition

Kind = Literal["snip", "grasp", "taylor"]


def saliency(
    kind: Kind, loss: Callable[..., jax.Array], params: Any, batches: Iterable[Any]
) -> Any:
    r"""Scores of all weights from the gradients of a loss, to prune before training.

    ``"snip"``: :math:`|\bar g w|`; ``"grasp"``: :math:`w (\bar H \bar g)`, with
    Hessian-vector products; ``"taylor"``: the mean of :math:`(g w)^2`. A bar is the
    mean over the batches.

    Args:
      kind: Which of `jaxcompress.prune.scores`.
      loss: ``loss(params, *batch) -> float[]``, the mean over the batch; traced once
        for each shape of batch.
      params: Parameter pytree. Its floating arrays are scored.
      batches: Tuples of arguments, or single arguments; they count alike. GraSP goes
        through them twice.

    Returns:
      ``float32`` scores in the structure of `params`, with None for what is not
      trained; for `by_scores`.

    Raises:
      ValueError: If `kind` is unknown or there are no batches.

    Examples:
      >>> loss = lambda p, x: (x @ p["w"]).sum()
      >>> saliency("snip", loss, {"w": jnp.array([1.0, -2.0])},
      ...          [jnp.array([[3.0, 1.0]])])["w"].tolist()
      [3.0, 2.0]

    References:
      Lee et al., `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019, Algorithm 1; Wang et
      al., `GraSP <https://arxiv.org/abs/2002.07376>`_, 2020, Algorithm 2; Molchanov et
      al., 2019, section 3.1. Differs: gradient and Hessian of GraSP over all batches.
    """
    if kind not in ("snip", "grasp", "taylor"):
        raise ValueError(
            f"prune.saliency: kind must be 'snip', 'grasp' or 'taylor'; got {kind!r}."
        )
    weights, rest = partition(params)

    def value(weights: Any, rest: Any, batch: tuple[Any, ...]) -> jax.Array:
        return loss(merge(weights, rest), *batch)

    gradient = jax.grad(value)

    def squares(weights: Any, rest: Any, batch: tuple[Any, ...]) -> Any:
        return jax.tree.map(score.taylor, weights, gradient(weights, rest, batch))

    def hessian_vector(weights: Any, v: Any, rest: Any, batch: tuple[Any, ...]) -> Any:
        along = lambda w: gradient(w, rest, batch)
        return jax.jvp(along, (weights,), (v,))[1]

    if kind == "taylor":
        return _mean(squares, batches, kind, weights, rest)
    batches = list(batches) if kind == "grasp" else batches
    grads = _mean(gradient, batches, kind, weights, rest)
    if kind == "snip":
        return jax.tree.map(score.snip, weights, grads)
    cast = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, weights)
    products = _mean(hessian_vector, batches, kind, weights, cast, rest)
    return jax.tree.map(score.grasp, weights, products)


def _mean(
    f: Callable[..., Any], batches: Iterable[Any], kind: str, weights: Any, *args: Any
) -> Any:
    """The mean over batches of ``f(weights, *args, batch)``, in float32."""

    @jax.jit
    def add(total: Any, args: Any, batch: tuple[Any, ...]) -> Any:
        one = f(*args, batch)
        return jax.tree.map(lambda t, a: t + a.astype(jnp.float32), total, one)

    total = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)
    count = 0
    for batch in track(batches, f"prune.saliency {kind}"):
        batch = batch if isinstance(batch, tuple) else (batch,)
        total = add(total, (weights, *args), batch)
        count += 1
    if not count:
        raise ValueError("prune.saliency: batches is empty; pass at least one batch.")
    return jax.tree.map(lambda a: a / count, total)
