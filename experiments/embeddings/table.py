"""MiniLM's table of word embeddings, and what its entries count for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences

TABLE = "params/embeddings/word/embedding"
BATCH, LONGEST, SAMPLES = 64, 24, 24
"""Sentences at once, tokens of those in lessons, and batches for `sensitivities`."""


def table(params: Any) -> Any:
    """The word table, or the leaf that stands for it."""
    return jc.tree.flatten(params)[0][TABLE]


def with_table(params: Any, leaf: Any) -> Any:
    """The model with another word table."""
    flat, structure = jc.tree.flatten(params)
    return jc.tree.unflatten(structure, flat | {TABLE: leaf})


def scorer(model: Any, root: Path | None, part: str) -> Callable[[Any], float]:
    """Spearman correlation of a part of STS-B, x100."""
    pairs = data.sts(part, root)
    apply = jc.lift(model.apply)

    def score(params: Any) -> float:
        vectors = sentences.encode(apply, params, pairs.first + pairs.second)
        return round(sentences.spearman(pairs, vectors), 2)

    return score


def texts(root: Path | None) -> list[str]:
    """The sentences of STS-B train."""
    pairs = data.sts("stsb_train", root)
    return sorted({*pairs.first, *pairs.second})


def lessons(root: Path | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of ids and mask of the shorter sentences of STS-B train."""
    for _, ids, mask in sentences.batches(texts(root), batch_size=BATCH):
        if ids.shape[1] <= LONGEST:
            yield ids, mask


def counts(root: Path | None) -> np.ndarray:
    """How often a token is in STS-B train, and 1: ``float32[vocabulary, 1]``."""
    found = sentences.tokenizer().encode_batch(texts(root))
    ids = np.concatenate([e.ids for e in found])
    return 1.0 + np.bincount(ids, minlength=minilm.VOCABULARY)[:, None].astype("f4")


def sensitivities(model: Any, params: Any, root: Path | None) -> np.ndarray:
    """How much the sentence vectors follow each feature of words: ``float32[1, 384]``.

    Squares of the gradients of random projections of the vectors, by feature, over
    some batches of sentences.
    """

    @jax.jit
    def squares(word: jax.Array, ids: Any, mask: Any, key: jax.Array) -> jax.Array:
        encode = lambda word: model.apply(with_table(params, word), ids, mask)
        vectors, pull = jax.vjp(encode, word)
        (gradient,) = pull(jax.random.normal(key, vectors.shape))
        return jnp.square(gradient).sum(0, keepdims=True)

    found = list(lessons(root))
    order = np.random.default_rng(0).permutation(len(found))[:SAMPLES]
    word = table(params)
    parts = [squares(word, *found[i], jax.random.key(i)) for i in order]
    total = np.asarray(sum(parts))
    return total / total.mean()
