"""stories260k: codebooks beside scalar quantization at equal bits a weight.

Mean NLL on stories 1160-1199, where settings were chosen, and 1200-1229; all layers,
calibrated on stories 0-1159 towards the float model's outputs. Bits are of the leaves'
real buffers: codes, codebooks, scales and zero points. The scalar rows are GPTQ with
zero points, and the scales of every group rounded to bfloat16.

    python -m experiments.codebooks.stories_run [--resume]
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training import stories_run
from experiments.post_training.report import Report
from experiments.post_training.stories_run import (
    BATCHES,
    LAYERS,
    LENGTH,
    TEST,
    VALIDATION,
)

HERE = Path(__file__).parent
KEY = jax.random.key(0)
Codes = functools.partial(jc.codebook.Codes, scale=True, dtype="bfloat16")
FORMATS = {
    2: {
        "scalars": Codes(dims=1, bits=2),
        "pairs": Codes(dims=2, bits=4),
        "sums of 2, d4": Codes(dims=4, bits=4, books=2),
    },
    3: {
        "scalars": Codes(dims=1, bits=3),
        "pairs": Codes(dims=2, bits=6),
        "sums of 2, d2": Codes(dims=2, bits=3, books=2),
    },
    4: {
        "scalars": Codes(dims=1, bits=4),
        "sums of 2, d2": Codes(dims=2, bits=4, books=2),
    },
}


def bits_per_weight(packed: Any) -> float:
    """Of all compressed leaves."""
    leaves = [
        x for x in jax.tree.leaves(packed, is_leaf=jc.is_leaf) if isinstance(x, jc.Leaf)
    ]
    return 8 * sum(x.stored_bytes for x in leaves) / sum(x.size for x in leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    batches = stories_run.windows(root, LENGTH, mixed=False)[:BATCHES]
    nll = functools.partial(text.mean_nll, jc.lift(model.apply))
    parts = {"test": data.stories(*TEST, root)}
    validation = data.stories(*VALIDATION, root)
    report = Report("stories", __doc__, folder=HERE, resume=options.resume)

    def add(bits: str, name: str, make: Any) -> None:
        if (bits, name) in report:
            return
        packed = make()
        scores = {k: round(nll(packed, part), 4) for k, part in parts.items()}
        if packed is not params:
            scores["stored"] = round(bits_per_weight(packed), 3)
        report.add(bits, name, "", round(nll(packed, validation), 4), **scores)

    add("float", "", lambda: params)
    inputs = (model.apply, params, batches)
    for bits, formats in FORMATS.items():
        for group in (None, 32):
            rules = stories_run.formats(bits, group)
            rules = {k: f.replace(scale="bfloat16") for k, f in rules.items()}
            gptq = functools.partial(
                jc.quant.gptq, *inputs, rules=rules, reference=True
            )
            add(f"{bits}", "GPTQ" + ("" if group is None else " g32"), gptq)
        for name, codes in formats.items():
            rules = {LAYERS: codes}
            aqlm = functools.partial(
                jc.codebook.aqlm, *inputs, rules=rules, key=KEY, reference=True
            )
            add(f"{bits}", f"codebook, {name}", aqlm)


if __name__ == "__main__":
    main()
