"""MiniLM's word embeddings at low rank and hashed: STS-B test, Spearman x100.

What a method makes of the trained table, and the same after its factors or buckets,
and nothing else, have been trained to give the float model's sentence vectors (cosine
loss) on the sentences of STS-B train, without labels.

    python -m experiments.embeddings.tuned_run [--resume] [--methods "rank 192"]
        [--steps 400] [--validate]

Settings are chosen on STS-B dev (`--validate`).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.embeddings.codebooks_run import TABLE, scorer
from experiments.models import minilm, sentences
from experiments.post_training.report import Report

HERE = Path(__file__).parent
RATE, BATCH, LONGEST = 5e-4, 64, 24
METHODS = {
    "rank 192": jc.lowrank.svd(rank=192),
    "rank 96": jc.lowrank.svd(rank=96),
    "hashed 2x": jc.hashing.hashed(ratio=2.0, axes=-1),
    "hashed 4x": jc.hashing.hashed(ratio=4.0, axes=-1),
}


def table(params: Any) -> Any:
    """The word table, or the leaf that stands for it."""
    return jc.tree.flatten(params)[0][TABLE]


def with_table(params: Any, leaf: Any) -> Any:
    """The model with another word table."""
    flat, structure = jc.tree.flatten(params)
    return jc.tree.unflatten(structure, flat | {TABLE: leaf})


def lessons(apply: Any, params: Any, root: Path | None) -> list[tuple[Any, ...]]:
    """Batches of ids and mask of short sentences, with the float model's vectors."""
    pairs = data.sts("stsb_train", root)
    run = jax.jit(apply)
    return [
        (ids, mask, np.asarray(run(params, ids, mask)))
        for _, ids, mask in sentences.batches(
            sorted({*pairs.first, *pairs.second}), batch_size=BATCH
        )
        if ids.shape[1] <= LONGEST
    ]


def trained(apply: Any, params: Any, batches: list[Any], steps: int) -> Any:
    """The table after some steps of Adam, at a rate that falls to zero."""
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
    state, order = tx.init(leaf), np.random.default_rng(0)
    for i in range(steps):
        batch = batches[order.integers(len(batches))]
        leaf, state, value = step(leaf, state, *batch)
        if (i + 1) % 50 == 0:
            print(f"  step {i + 1} of {steps}: loss {float(value):.4f}", flush=True)
    return with_table(params, leaf)


def main() -> None:
    """Every method, untrained and trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--validate", action="store_true", help="score STS-B dev")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    model, params = minilm.load(scan=True)
    apply = jc.lift(model.apply)
    name, part = "tuned", "stsb_test"
    if options.validate:
        name, part = "tuned_validation", "stsb_dev"
    score = scorer(model, options.data_dir, part)
    report = Report(name, __doc__, folder=HERE, resume=options.resume)

    def add(model: str, method: str, params: Any) -> None:
        report.add(
            model,
            method,
            "",
            score(params),
            table_bytes=sum(a.nbytes for a in jax.tree.leaves(table(params))),
        )

    if ("float", "") not in report:
        add("float", "", params)
    batches: list[Any] = []
    for name in options.methods:
        start = jc.select({TABLE: METHODS[name]}).init(params)[0]
        if (name, "untrained") not in report:
            add(name, "untrained", start)
        if (name, row := f"{options.steps} steps") not in report:
            batches = batches or lessons(model.apply, params, options.data_dir)
            add(name, row, trained(apply, start, batches, options.steps))


if __name__ == "__main__":
    main()
