"""Sentences through `minilm`: word pieces, batches of few shapes, similarity scores.

pairs = data.sts("stsb_test")
vectors = sentences.encode(model.apply, params, pairs.first + pairs.second)
sentences.spearman(pairs, vectors)  # 82.03
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from scipy.stats import rankdata
from tokenizers import Tokenizer

from experiments.data import Pairs
from experiments.models import minilm

CLS, MAX_LENGTH = 101, 256
BUCKETS = (12, 16, 24, 40, 64, 128, MAX_LENGTH)


@functools.cache
def tokenizer() -> Tokenizer:
    """Text to ids, lower-cased word pieces between [CLS] and [SEP]."""
    result = Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    result.enable_truncation(MAX_LENGTH)
    result.no_padding()
    return result


def batches(
    texts: Sequence[str], *, batch_size: int = 64
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Texts of like length together, padded to one of a few shapes.

    Args:
      texts: What to encode.
      batch_size: Rows of every batch; the last of a length is filled up with [CLS].

    Yields:
      Indices ``[n]`` of the texts in the first `n` rows, ids ``int32[batch_size,
      length]`` and mask ``bool[batch_size, length]``. `length` is one of `BUCKETS`.
    """
    encodings = tokenizer().encode_batch(list(texts))
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    bucket = np.searchsorted(BUCKETS, [len(row) for row in ids])
    for b, length in enumerate(BUCKETS):
        members = np.flatnonzero(bucket == b)
        for start in range(0, len(members), batch_size):
            chosen = members[start : start + batch_size]
            batch = np.zeros((batch_size, length), np.int32)
            mask = np.zeros((batch_size, length), bool)
            batch[:, 0], mask[:, 0] = CLS, True
            for row, i in enumerate(chosen):
                batch[row, : len(ids[i])], mask[row, : len(ids[i])] = ids[i], True
            yield chosen, batch, mask


def encode(
    apply: Callable[..., Any],
    params: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """The vectors of texts, ``float32[n, 384]``, each of length 1.

    Args:
      apply: ``apply(params, ids, mask)``: that of `minilm.MiniLM`, or it lifted. It is
        jitted here, once for each function and bucket.
      params: What `apply` takes first, compressed or not.
      texts: What to encode.
      batch_size: Texts at a time.
    """
    vectors = np.zeros((len(texts), minilm.WIDTH), np.float32)
    run = jax.jit(apply)
    for chosen, ids, mask in batches(texts, batch_size=batch_size):
        vectors[chosen] = np.asarray(run(params, ids, mask))[: len(chosen)]
    return vectors


def spearman(pairs: Pairs, vectors: np.ndarray) -> float:
    """Rank correlation, x100, of cosines with the scores people gave.

    Args:
      pairs: `n` pairs.
      vectors: ``[2 n, 384]`` of length 1: of `pairs.first`, then of `pairs.second`.
    """
    first, second = np.split(vectors, 2)
    cosines = np.einsum("nd,nd->n", first, second)
    ranks = np.stack([rankdata(pairs.scores), rankdata(cosines)])
    return 100.0 * float(np.corrcoef(ranks)[0, 1])
