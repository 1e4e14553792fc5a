"""MiniLM's table of word embeddings alone at 2, 1 and 0.5 bits a weight.

Spearman correlation x100 on STS-B dev, where settings were chosen, and on STS-B test of
the setting chosen for each number of bits. Rows count by how often their token occurs
in STS-B's training sentences ("frequent"), or all alike. Bits are of the leaf's real
buffers, codebooks included.

    python -m experiments.embeddings.codebooks_run [--resume] [--bits 2 1]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences
from experiments.post_training.report import Report

HERE = Path(__file__).parent
TABLE = "params/embeddings/word/embedding"
KEY = jax.random.key(0)
OPTIONS: dict[str, Any] = {"axes": -1, "dtype": "bfloat16", "key": KEY}
SIZES = {"2": 4, "1": 8, "0.5": 16}
"""Weights a code of 8 bits, by bits a weight."""


def frequencies(root: Path | None) -> np.ndarray:
    """What each row counts for, ``float32[vocabulary, 1]``: 1 and its tokens' count."""
    pairs = data.sts("stsb_train", root)
    texts = sorted({*pairs.first, *pairs.second})
    ids = np.concatenate([e.ids for e in sentences.tokenizer().encode_batch(texts)])
    counts = np.bincount(ids, minlength=minilm.VOCABULARY)
    # A square root: the commonest tokens are in nearly every sentence.
    return np.sqrt(1.0 + counts).astype(np.float32)[:, None]


def methods(dims: int, importance: Any) -> dict[str, jc.Transform]:
    """How to compress to ``8 / dims`` bits a weight, by name."""
    frequent = {"importance": {TABLE: importance}}
    product = functools.partial(jc.codebook.product, dims=dims, **OPTIONS)
    additive = functools.partial(
        jc.codebook.additive, dims=2 * dims, books=2, rounds=8, width=2, **OPTIONS
    )
    return {
        "product, one codebook": product(iterations=25),
        "product, a codebook a place": product(iterations=25, blocks=None),
        "product, a codebook a place, frequent": product(
            iterations=25, blocks=None, **frequent
        ),
        "additive, 6 codebooks": additive(blocks=6),
        "additive, 6 codebooks, frequent": additive(blocks=6, **frequent),
    }


def scorer(model: Any, root: Path | None, part: str) -> Callable[[Any], float]:
    """Spearman correlation of a part of STS-B."""
    pairs = data.sts(part, root)
    apply = jc.lift(model.apply)

    def score(params: Any) -> float:
        vectors = sentences.encode(apply, params, pairs.first + pairs.second)
        return round(sentences.spearman(pairs, vectors), 2)

    return score


def compressed(params: Any, method: jc.Transform) -> tuple[Any, float, float]:
    """The model, the table's bits a weight, and its relative squared error."""
    packed = jax.jit(lambda p: jc.compress(p, {TABLE: method}))(params)
    leaf = jc.tree.flatten(packed)[0][TABLE]
    w = jc.tree.flatten(params)[0][TABLE]
    error = jnp.square(w - leaf.materialize()).sum() / jnp.square(w).sum()
    return packed, 8 * leaf.stored_bytes / leaf.size, float(error)


def main() -> None:
    """Every number of bits and method; the best of each, on the test part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--bits", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    model, params = minilm.load(scan=True)
    report = Report("codebooks", __doc__, folder=HERE, resume=options.resume)
    dev = scorer(model, options.data_dir, "stsb_dev")
    test = scorer(model, options.data_dir, "stsb_test")
    importance = jnp.asarray(frequencies(options.data_dir))
    if ("float", "") not in report:
        report.add("float", "", "", dev(params), test=test(params))
    for bits in options.bits:
        found = methods(SIZES[bits], importance)
        for name, method in found.items():
            if (bits, name) not in report:
                packed, stored, error = compressed(params, method)
                numbers = {"stored": round(stored, 3), "error": round(error, 4)}
                report.add(bits, name, "", dev(packed), **numbers)
        if (bits, "chosen") not in report:
            rows = [r for r in report.rows if r["model"] == bits]
            best = max(rows, key=lambda r: r["score"])["method"]
            packed, stored, _ = compressed(params, found[best])
            score = {"stored": round(stored, 3), "test": test(packed)}
            report.add(bits, "chosen", best, dev(packed), **score)


if __name__ == "__main__":
    main()
