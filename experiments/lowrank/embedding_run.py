"""MiniLM's word embeddings, half of its weights, at low rank: STS-B, Spearman x100.

Factors by SVD, untrained and then trained to give the float model's sentence vectors
(cosine loss) on the sentences of STS-B train. Only the factors are trained.

    python -m experiments.lowrank.embedding_run [--ranks 192 96] [--steps 400]
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences
from experiments.post_training.report import Report

HERE = Path(__file__).parent
TABLE = "params/embeddings/word/embedding"
RATE, BATCH = 5e-4, 64


def factored(params: Any, rank: int) -> Any:
    scheme = jc.select({TABLE: jc.lowrank.svd(rank=rank)})
    return scheme.init(params)[0]


def table(params: Any) -> Any:
    return params["params"]["embeddings"]["word"]["embedding"]


def with_table(params: Any, leaf: Any) -> Any:
    """The model with another word table."""
    inner = params["params"]
    words = inner["embeddings"] | {"word": {"embedding": leaf}}
    return {"params": inner | {"embeddings": words}}


def trained(apply: Any, params: Any, teacher: Any, root: Any, steps: int) -> Any:
    """Factors after some steps of Adam, at a rate that falls to zero."""
    pairs = data.sts("stsb_train", root)
    texts = pairs.first + pairs.second
    targets = sentences.encode(apply, teacher, texts, batch_size=BATCH)
    batches = list(sentences.batches(texts, batch_size=BATCH))
    tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(leaf: Any, ids: jax.Array, mask: jax.Array, target: jax.Array) -> Any:
        vectors = apply(with_table(params, leaf), ids, mask)
        return jc.distill.cosine_embedding(vectors, target).mean()

    @jax.jit
    def step(leaf: Any, state: Any, *batch: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(leaf, *batch)
        updates, state = tx.update(grads, state, leaf)
        return optax.apply_updates(leaf, updates), state, value

    leaf = table(params)
    state = tx.init(leaf)
    order = np.random.default_rng(0)
    for i in range(steps):
        chosen, ids, mask = batches[order.integers(len(batches))]
        target = np.zeros((BATCH, targets.shape[1]), np.float32)
        target[: len(chosen)] = targets[chosen]
        target[len(chosen) :] = targets[chosen[0]]
        ids[len(chosen) :], mask[len(chosen) :] = ids[0], mask[0]
        leaf, state, value = step(leaf, state, ids, mask, jnp.asarray(target))
        if i % 50 == 0:
            print(f"  step {i}: loss {float(value):.4f}", flush=True)
    return with_table(params, leaf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[192, 96])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    model, params = minilm.load(scan=True)
    apply = jc.lift(model.apply)
    pairs = data.sts("stsb_test", options.data_dir)
    report = Report("embedding", __doc__, folder=HERE, resume=options.resume)

    def add(name: str, method: str, p: Any) -> None:
        vectors = sentences.encode(apply, p, pairs.first + pairs.second)
        score = round(sentences.spearman(pairs, vectors), 2)
        size = sum(a.nbytes for a in jax.tree.leaves(table(p)))
        report.add(name, method, "", score, table_bytes=size)

    add("float", "", params)
    train = functools.partial(trained, apply, teacher=params, root=options.data_dir)
    for rank in options.ranks:
        start = factored(params, rank)
        add(f"rank {rank}", "SVD", start)
        after = train(start, steps=options.steps)
        add(f"rank {rank}", f"SVD, {options.steps} steps", after)


if __name__ == "__main__":
    main()
