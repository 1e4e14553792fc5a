"""Distillation of encoders: from embeddings, and from the scores of pairs of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distill._logits import kept
from jaxcompress.distill._paired import (
    check_leading,
    check_same,
    check_where,
    cosine,
    pair,
)


def cosine_embedding(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""How far the directions of two embeddings are apart.

    .. math:: 1 - \frac{s \cdot t}{\|s\| \|t\|}

    Args:
      student: ``float[..., features]`` embeddings or hidden states.
      teacher: Those of the same shape; no gradient flows to them.
      where: ``bool[...]`` vectors to count; the loss of others is zero.

    Returns:
      ``float32[...]`` in [0, 2], whatever the lengths. A zero vector is at right
      angles to all others (loss 1) and gets no gradient.

    Raises:
      ValueError: If the shapes differ, or `where` is no mask of the leading axes.

    Examples:
      >>> s, t = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.array([[0.0, 2.0]] * 2)
      >>> cosine_embedding(s, t).tolist()
      [1.0, 0.0]

    References:
      Sanh et al., `DistilBERT <https://arxiv.org/abs/1910.01108>`_, 2019, section 2
      (the loss of hidden states).
    """
    who = "distill.cosine_embedding"
    check_same(who, student, teacher)
    check_where(who, where, jnp.shape(student)[:-1])
    s, t = pair(who, student, teacher, where)
    return kept(1.0 - cosine(s, t), where)


def embedding_mse(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Mean squared difference of embeddings.

    .. math:: \frac{1}{d} \sum_{c=1}^{d} (s_c - t_c)^2

    Unlike `cosine_embedding` it also matches the lengths, so the student can stand in
    for the teacher where embeddings are stored.

    Args:
      student: ``float[..., features]`` embeddings, of a projector where sizes differ.
      teacher: Those of the same shape; no gradient flows to them.
      where: ``bool[...]`` embeddings to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss an embedding, as of `hint`.

    Raises:
      ValueError: If the shapes differ, or `where` is no mask of the leading axes.

    Examples:
      >>> embedding_mse(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 2.0]])).tolist()
      [2.0]

    References:
      Reimers & Gurevych, `Making Monolingual Sentence Embeddings Multilingual
      <https://arxiv.org/abs/2004.09813>`_, 2020, eq. 1. Differs: the mean over
      features instead of the sum; one term, for one sentence.
    """
    who = "distill.embedding_mse"
    check_same(who, student, teacher)
    check_where(who, where, jnp.shape(student)[:-1])
    s, t = pair(who, student, teacher, where)
    return jnp.square(s - t).mean(-1)


def pair_cosine(
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Squared difference of the scores that two encoders give to a pair of sentences.

    .. math:: (\cos(s_a, s_b) - \cos(t_a, t_b))^2

    Args:
      student: Two ``float[..., features]``, the embeddings of both sentences.
      teacher: The same of the teacher, of any number of features; no gradient flows
        to them.
      where: ``bool[...]`` pairs to count; the loss of others is zero.

    Returns:
      ``float32[...]``, a loss a pair, in [0, 4]; zero vectors have the score 0.

    Raises:
      ValueError: If the leading axes differ, or `where` is no mask of them.

    Examples:
      >>> x, y = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
      >>> pair_cosine((x, x), (x, y)).tolist(), pair_cosine((y, y), (x, x)).tolist()
      ([1.0], [0.0])

    References:
      Reimers & Gurevych, `Sentence-BERT <https://arxiv.org/abs/1908.10084>`_, 2019,
      section 3 (regression objective). Differs: the target is the teacher's score.
    """
    who = "distill.pair_cosine"
    check_same(f"{who}, student", *student)
    check_same(f"{who}, teacher", *teacher)
    check_leading(who, student[0], teacher[0])
    check_where(who, where, jnp.shape(student[0])[:-1])
    (s_a, t_a), (s_b, t_b) = (
        pair(who, s, t, where) for s, t in zip(student, teacher, strict=True)
    )
    return kept(jnp.square(cosine(s_a, s_b) - cosine(t_a, t_b)), where)
