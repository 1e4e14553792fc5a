"""What errors in MiniLM's word table count for, by real sentences."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokenizers")

from experiments.embeddings import table
from experiments.models import minilm, sentences


def test_a_row_counts_as_often_as_its_token_is_seen(data_dir: Path) -> None:
    counts = table.counts(data_dir)
    tokenizer = sentences.tokenizer()
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch(table.texts(data_dir)))
    assert counts.shape == (minilm.VOCABULARY, 1)
    assert counts.sum() == minilm.VOCABULARY + tokens
    guitar, unused = tokenizer.token_to_id("guitar"), tokenizer.token_to_id("[unused9]")
    assert counts[guitar, 0] > counts[unused, 0] == 1.0


def test_features_count_as_much_as_sentence_vectors_follow_them(
    data_dir: Path,
) -> None:
    gains = jnp.array([[4.0, 1.0, 0.0, 2.0]])

    def vectors(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        words = jnp.where(mask[..., None], table.table(params)[ids], 0.0)
        return words.mean(axis=1) * gains

    word = {"embedding": jnp.zeros((minilm.VOCABULARY, 4))}
    params = {"params": {"embeddings": {"word": word}}}
    found = table.sensitivities(SimpleNamespace(apply=vectors), params, data_dir)
    expected = np.square(gains) / np.square(gains).mean()
    np.testing.assert_allclose(found, expected, rtol=0.2)
