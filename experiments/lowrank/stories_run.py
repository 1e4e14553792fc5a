"""stories260k with its matrices at low rank, without fine-tuning.

Mean NLL on stories 1200-1229; calibrated on stories before 1160. Settings are the
defaults. The ratio is of the bytes of the layers' matrices.

    python -m experiments.lowrank.stories_run [--resume]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training import stories_run
from experiments.post_training.report import Report

HERE = Path(__file__).parent
LAYERS = "params/layers/**/kernel"
TEST = (1200, 1230)
LENGTH, BATCHES = 512, 8
RATIOS = (0.9, 0.75, 0.5, 0.35)


def methods(
    fn: Any, params: Any, batches: list[Any], ratio: float
) -> dict[str, Callable[[], Any]]:
    """How to factor, by name."""
    even = {LAYERS: jc.lowrank.by_ratio(ratio)}
    sweep = functools.partial(jc.lowrank.whitened, fn, params, batches)

    def budget() -> dict[str, int]:
        stats = jc.calibrate(fn, params, batches, gram=True)
        axes = jc.trace_axes(fn, params, *batches[0])
        chosen = functools.partial(jc.lowrank.allocate, stats=stats, axes=axes)
        return chosen(params, LAYERS, ratio=ratio)

    return {
        "SVD": lambda: jc.compress(
            params,
            {LAYERS: jc.lowrank.svd(rank=jc.lowrank.by_ratio(ratio))},
            fn=fn,
            example=batches[0],
        ),
        "whitened": lambda: sweep(rules=even),
        "whitened, float targets": lambda: sweep(rules=even, reference=True),
        "whitened, one budget": lambda: sweep(rules=budget()),
        "whitened, one budget, float targets": lambda: sweep(
            rules=budget(), reference=True
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    batches = stories_run.windows(root, LENGTH, mixed=False)[:BATCHES]
    part = data.stories(*TEST, root)
    nll = functools.partial(text.mean_nll, jc.lift(model.apply))
    report = Report("results", __doc__, folder=HERE, resume=options.resume)

    def add(ratio: str, name: str, make: Callable[[], Any]) -> None:
        if (ratio, name) not in report:
            report.add(ratio, name, "", round(nll(make(), part), 4))

    add("float", "", lambda: params)
    ways = {r: methods(model.apply, params, batches, r) for r in RATIOS}
    for name in ways[RATIOS[0]]:
        for ratio, makes in ways.items():
            add(str(ratio), name, makes[name])


if __name__ == "__main__":
    main()
