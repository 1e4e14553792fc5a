"""MiniLM's word embeddings after short training: STS-B test, Spearman x100.

What a method makes of the trained table, and the same after its factors, buckets or
codebooks, and nothing else, have been trained to give the float model's sentence
vectors (cosine loss) on the sentences of STS-B train, without labels. Codes of vectors
stay as `codebooks_run` finds them, with a codebook for each place.

    python -m experiments.embeddings.tuned_run [--resume] [--methods "rank 192"]
        [--steps 400] [--validate]

Settings are chosen on STS-B dev (`--validate`).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments.embeddings.codebooks_run import (
    SIZES,
    Importances,
    importances,
    methods,
)
from experiments.embeddings.table import TABLE, lessons, scorer, table, with_table
from experiments.models import minilm
from experiments.post_training.report import Report

HERE = Path(__file__).parent
RATE = 5e-4
CODES = {"product, 2 bits": "2", "product, 1 bit": "1"}
METHODS = ("rank 192", "rank 96", "hashed 2x", "hashed 4x", *CODES)


def start(name: str, params: Any, counted: Callable[[], Importances]) -> Any:
    """The params as one of the methods makes them of the trained table."""
    if name in CODES:
        found = methods(SIZES[CODES[name]], counted())
        method = found["product, a codebook a place, sensitive"]
    else:
        kind, size = name.split()
        if kind == "rank":
            method = jc.lowrank.svd(rank=int(size))
        else:
            method = jc.hashing.hashed(ratio=float(size[:-1]), axes=-1)
    return jax.jit(jc.select({TABLE: method}).init)(params)[0]


def trained(apply: Any, params: Any, batches: Sequence[Any], steps: int) -> Any:
    """The params after some steps of Adam on the table, at a rate that falls to zero.

    Args:
      apply: Of params, ids and mask.
      params: With a compressed table.
      batches: Ids, mask and the vectors to be found.
      steps: How many.
    """
    tx = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss(leaf: Any, ids: jax.Array, mask: jax.Array, target: jax.Array) -> Any:
        vectors = apply(with_table(params, leaf), ids, mask)
        return jc.distill.cosine_embedding(vectors, target).mean()

    free, frozen = jc.partition(table(params))

    @jax.jit
    def step(free: Any, state: Any, *batch: jax.Array) -> Any:
        own = lambda free: loss(jc.merge(free, frozen), *batch)
        value, grads = jax.value_and_grad(own)(free)
        updates, state = tx.update(grads, state, free)
        return optax.apply_updates(free, updates), state, value

    state, order = tx.init(free), np.random.default_rng(0)
    for i in range(steps):
        batch = batches[int(order.integers(len(batches)))]
        free, state, value = step(free, state, *batch)
        if (i + 1) % 50 == 0:
            print(f"  step {i + 1} of {steps}: loss {float(value):.4f}", flush=True)
    return with_table(params, jc.merge(free, frozen))


def main() -> None:
    """Every method, untrained and trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
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
    root, teacher = options.data_dir, jax.jit(model.apply)
    counted = functools.cache(lambda: importances(model, params, root))
    taught = lambda ids, mask: (ids, mask, np.asarray(teacher(params, ids, mask)))
    batches = functools.cache(lambda: [taught(*batch) for batch in lessons(root)])
    for name in options.methods:
        row = f"{options.steps} steps"
        if (name, "untrained") in report and (name, row) in report:
            continue
        first = start(name, params, counted)
        if (name, "untrained") not in report:
            add(name, "untrained", first)
        if (name, row) not in report:
            add(name, row, trained(apply, first, batches(), options.steps))


if __name__ == "__main__":
    main()
