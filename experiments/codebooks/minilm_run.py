"""MiniLM smaller than scalars make it: codebooks for its word table and its linears.

`linears` compresses every linear weight to about two bits and nothing else: GPTQ on a
grid of four levels, and sums of codebook entries (AQLM). `whole` compresses all of the
model: words by product quantization, linears by GPTQ, other embeddings to 8 bits. Both
then train biases, norms and codebooks towards the float model's vectors, without
labels.

Spearman correlation x100, and the mean cosine between the compressed and the float
vectors; the score is the cosine on STS-B dev. Sizes are of whole files, entropy-coded.

    python -m experiments.codebooks.minilm_run [--resume] [--tables linears whole]
        [--validate]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments import data
from experiments.embeddings.codebooks_run import SIZES, importances, methods
from experiments.embeddings.table import TABLE
from experiments.models import minilm
from experiments.post_training.minilm_run import (
    EMBEDDINGS,
    FOUR_LEVELS,
    KERNELS,
    PARTS,
    SEARCH,
    TUNING_RATE,
    TUNING_STEPS,
    Table,
    calibration,
    distance,
)
from experiments.post_training.report import Report
from experiments.post_training.tuning import tune

HERE = Path(__file__).parent
KEY = jax.random.key(0)


def searched(fmt: jc.quant.NumberFormat) -> jc.quant.NumberFormat:
    """Ranges searched, scales in two bytes."""
    return fmt.replace(search=SEARCH, scale="bfloat16")


TWO_BITS = searched(jc.quant.table(FOUR_LEVELS, name="lloyd2", group_size=32))
THREE_BITS = searched(jc.quant.int3(symmetric=False, group_size=64))
FOUR_BITS = searched(jc.quant.int4(symmetric=False, group_size=64))
SUMS = jc.codebook.Codes(dims=8, bits=8, books=2, scale=True, dtype="bfloat16")
OTHERS = jc.where(EMBEDDINGS, exclude=TABLE)
WHOLE = {
    "words 2 bits, linears 4": ("2", FOUR_BITS),
    "words 1 bit, linears 4": ("1", FOUR_BITS),
    "words 1 bit, linears 3": ("1", THREE_BITS),
}
"""Bits a weight of the word table, and the format of linears."""


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="on dev, not on tests")
    parser.add_argument("--tables", nargs="+", default=["linears", "whole"])
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = minilm.load(scan=True)
    names = PARTS[:1] if options.validate else PARTS
    report = Report(
        "minilm_validation" if options.validate else "minilm",
        __doc__,
        folder=HERE,
        resume=options.resume,
    )
    parts = {name: data.sts(name, root) for name in names}
    table = Table(model, params, parts, report, entropy="rans")
    batches = calibration(root)
    inputs = (model.apply, params, batches)

    def tuned(make: Callable[[], Any]) -> Any:
        return tune(
            model.apply,
            params,
            make(),
            batches,
            distance,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )

    def linears(fmt: Any) -> Any:
        return jc.quant.gptq(*inputs, rules={KERNELS: fmt}, reference=True)

    def sums() -> Any:
        return jc.codebook.aqlm(*inputs, rules={KERNELS: SUMS}, key=KEY, reference=True)

    counted = functools.cache(lambda: importances(model, params, root))

    def whole(bits: str, fmt: Any) -> Any:
        found = methods(SIZES[bits], counted())
        words = found["product, a codebook a place, sensitive"]
        rules = {TABLE: words, OTHERS: jc.quant.int8(axes=-1)}
        return jc.compress(linears(fmt), rules)

    if "linears" in options.tables:
        for name, make in {
            "GPTQ, four levels, g32": functools.partial(linears, TWO_BITS),
            "AQLM, sums of 2, d8": sums,
        }.items():
            kept = functools.cache(make)
            table.add("linears", name, kept, parts=2)
            table.add(
                "linears", f"{name}, tuned", functools.partial(tuned, kept), parts=2
            )
    if "whole" in options.tables:
        for name, (bits, fmt) in WHOLE.items():
            kept = functools.cache(functools.partial(whole, bits, fmt))
            table.add("whole", name, kept)
            table.add(
                "whole",
                f"{name}, tuned",
                functools.partial(tuned, kept),
                parts=len(parts),
            )


if __name__ == "__main__":
    main()
