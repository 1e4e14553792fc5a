"""How far a compressed language model's outputs are from the original's."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kl_divergence(
    logits: jax.Array, logits_q: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Mean divergence of the compressed model's distribution from the original's.

    .. math:: \frac1n \sum_t \mathrm{KL}\big(\sigma(z_t) \,\|\, \sigma(z^q_t)\big)

    Args:
      logits: ``float[..., vocabulary]`` of the original model.
      logits_q: Of the compressed model, of the same shape.
      mask: ``bool[...]`` tokens to count; all if None.

    Returns:
      ``float32`` nats a token, zero where the logits agree up to a constant, and
      zero if no token counts. A token that the original excludes (minus infinity)
      adds nothing; one that only the compressed model excludes makes it infinite.

    Raises:
      ValueError: If shapes do not agree.

    Examples:
      >>> z = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> round(float(kl_divergence(z, jnp.log(jnp.array([[0.25, 0.75]])))), 4)
      0.1438
    """
    _same("kl_divergence", logits, logits_q)
    p, q = _log_softmax(logits), _log_softmax(logits_q)
    possible = p > -jnp.inf
    gap = jnp.where(possible, p, 0.0) - jnp.where(possible, q, 0.0)
    # Not below zero, which rounding may miss.
    each = jnp.maximum((jnp.exp(p) * gap).sum(-1), 0.0)
    return _mean("kl_divergence", each, mask)


def top1_agreement(
    logits: jax.Array, logits_q: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Fraction of tokens for which both models rank the same one first.

    Args:
      logits: ``float[..., vocabulary]`` of the original model.
      logits_q: Of the compressed model, of the same shape.
      mask: ``bool[...]`` tokens to count; all if None.

    Returns:
      ``float32`` in [0, 1]; zero if no token counts. Of equal logits the first counts.

    Raises:
      ValueError: If shapes do not agree.

    Examples:
      >>> z = jnp.array([[1.0, 2.0], [2.0, 1.0]])
      >>> float(top1_agreement(z, jnp.array([[0.0, 1.0], [0.0, 1.0]])))
      0.5
    """
    _same("top1_agreement", logits, logits_q)
    same = logits.argmax(-1) == logits_q.argmax(-1)
    return _mean("top1_agreement", same.astype(jnp.float32), mask)


def mean_nll(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    r"""Mean negative log likelihood of the right tokens, in nats a token.

    .. math:: -\frac1n \sum_t \log \sigma(z_t)_{y_t}

    Means of batches are to be weighted by their tokens before `jnp.exp` makes a
    perplexity of them.

    Args:
      logits: ``float[..., vocabulary]``, of the token that comes next.
      labels: ``int[...]`` tokens that came, each within the vocabulary where counted.
      mask: ``bool[...]`` tokens to count; all if None.

    Returns:
      ``float32``; zero if no token counts.

    Raises:
      ValueError: If shapes do not agree, or labels are not integers.

    Examples:
      >>> round(float(mean_nll(jnp.zeros((3, 8)), jnp.array([0, 5, 7]))), 4)
      2.0794
    """
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(
        labels.dtype, jnp.integer
    ):
        raise ValueError(
            f"mean_nll: labels must be integers of shape {logits.shape[:-1]}; got "
            f"{labels.dtype}{list(labels.shape)}."
        )
    if mask is not None and mask.shape == labels.shape:
        labels = jnp.where(mask, labels, jnp.zeros_like(labels))
    right = jnp.take_along_axis(_log_softmax(logits), labels[..., None], axis=-1)
    return _mean("mean_nll", -right[..., 0], mask)


def perplexity(
    logits: jax.Array, labels: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """``exp`` of `mean_nll`, of one batch.

    Args:
      logits: As for `mean_nll`.
      labels: As for `mean_nll`.
      mask: As for `mean_nll`.

    Returns:
      ``float32``, at least one.

    Examples:
      >>> round(float(perplexity(jnp.zeros((3, 8)), jnp.array([0, 5, 7]))), 4)
      8.0
    """
    return jnp.exp(mean_nll(logits, labels, mask=mask))


def _log_softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def _same(who: str, logits: jax.Array, logits_q: jax.Array) -> None:
    if logits.shape != logits_q.shape:
        raise ValueError(
            f"{who}: both models must have logits of one shape; got {logits.shape} and "
            f"{logits_q.shape}."
        )


def _mean(who: str, each: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean over the tokens that count; what others hold is not looked at."""
    if mask is None:
        return each.mean(dtype=jnp.float32)
    if mask.shape != each.shape:
        raise ValueError(
            f"{who}: mask must have the shape {each.shape} of the tokens; got "
            f"{mask.shape}."
        )
    counted = jnp.where(mask, each, 0.0).sum(dtype=jnp.float32)
    return counted / jnp.maximum(mask.astype(jnp.float32).sum(), 1.0)
