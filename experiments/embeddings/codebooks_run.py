"""MiniLM's table of word embeddings alone at 2, 1 and 0.5 bits a weight.

Spearman correlation x100 on STS-B dev, where settings were chosen, and on STS-B test of
the setting chosen for each number of bits. Errors count alike in all entries, or by the
root of how often the row's token is in the sentences of STS-B train ("frequent"), or by
how often it is and how much sentence vectors follow the feature ("sensitive"). Bits are
of the leaf's real buffers, codebooks included.

    python -m experiments.embeddings.codebooks_run [--resume] [--bits 2 1]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.embeddings.table import TABLE, counts, scorer, sensitivities, table
from experiments.models import minilm
from experiments.post_training.report import Report

HERE = Path(__file__).parent
KEY = jax.random.key(0)
OPTIONS: dict[str, Any] = {"axes": -1, "dtype": "bfloat16", "key": KEY}
SIZES = {"2": 4, "1": 8, "0.5": 16}
"""Weights a code of 8 bits, by bits a weight."""
Importances = Mapping[str, jax.Array | None]


def importances(model: Any, params: Any, root: Path | None) -> Importances:
    """What an error in each entry counts for, by the end of a method's name."""
    often = jnp.asarray(counts(root))
    return {
        "": None,
        ", frequent": jnp.sqrt(often),
        ", sensitive": often * sensitivities(model, params, root),
    }


def methods(dims: int, importances: Importances) -> dict[str, jc.Transform]:
    """How to compress to ``8 / dims`` bits a weight, by name."""
    product = functools.partial(
        jc.codebook.product, dims=dims, iterations=25, **OPTIONS
    )
    additive = functools.partial(
        jc.codebook.additive, dims=2 * dims, books=2, rounds=8, width=2, **OPTIONS
    )
    found = {"product, one codebook": product()}
    for name, entries in importances.items():
        own = None if entries is None else {TABLE: entries}
        found |= {
            f"product, a codebook a place{name}": product(blocks=None, importance=own),
            f"additive, 6 codebooks{name}": additive(blocks=6, importance=own),
        }
    return found


def compressed(params: Any, method: jc.Transform) -> tuple[Any, float, float]:
    """The model, the table's bits a weight, and its relative squared error."""
    packed = jax.jit(lambda p: jc.compress(p, {TABLE: method}))(params)
    leaf, w = table(packed), table(params)
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
    counted = importances(model, params, options.data_dir)
    if ("float", "") not in report:
        report.add("float", "", "", dev(params), test=test(params))
    for bits in options.bits:
        found = methods(SIZES[bits], counted)
        for name, method in found.items():
            if (bits, name) not in report:
                packed, stored, error = compressed(params, method)
                numbers = {"stored": round(stored, 3), "error": round(error, 4)}
                report.add(bits, name, "", dev(packed), **numbers)
        scores = {r["method"]: r["score"] for r in report.rows if r["model"] == bits}
        best = max(found, key=scores.__getitem__)
        if (bits, chosen := f"chosen: {best}") not in report:
            packed, stored, _ = compressed(params, found[best])
            score = {"stored": round(stored, 3), "test": test(packed)}
            report.add(bits, chosen, "", dev(packed), **score)


if __name__ == "__main__":
    main()
