"""Pruning after training, without fine-tuning: magnitude, Wanda and SparseGPT.

stories260k: mean NLL on stories 1160-1199, where settings were chosen, and 1200-1229;
calibrated on stories before them. MiniLM: Spearman correlation x100 on STS-B test and
the mean cosine to the float vectors, calibrated on STS-B's training sentences.

    python -m experiments.pruning_after_training.run [--resume] [--models stories]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences, stories, text
from experiments.post_training import minilm_run, stories_run
from experiments.post_training.report import Report

HERE = Path(__file__).parent
VALIDATION, TEST = (1160, 1200), (1200, 1230)
LENGTH, BATCHES = 512, 8
STORIES = "params/layers/**/kernel"
MINILM = "params/**/kernel"
PATTERNS = {"50%": 0.5, "2:4": jc.prune.nm(2, 4)}
Make = Callable[[], Any]


def per_output(w: jax.Array, second_moment: jax.Array, *, axes: jc.Axes) -> jax.Array:
    """The score that makes Wanda magnitude pruning, output by output."""
    del second_moment, axes
    return jc.prune.scores.magnitude(w)


def methods(
    fn: Any, params: Any, batches: list[Any], rule: str, sparsity: Any
) -> dict[str, Make]:
    """How to prune, by name."""
    inputs = (fn, params, batches)
    rules = {rule: sparsity}
    sparsegpt = functools.partial(jc.prune.sparsegpt, *inputs, rules=rules)
    scheme = jc.prune.magnitude(sparsity=sparsity)
    found: dict[str, Make] = {}
    if isinstance(sparsity, float):
        found["magnitude, each matrix"] = lambda: jc.compress(
            params, {rule: scheme}, fn=fn, example=batches[0]
        )
    found["magnitude, each output"] = lambda: jc.prune.wanda(
        fn, params, batches[:1], rules=rules, score=per_output
    )
    found["Wanda"] = lambda: jc.prune.wanda(*inputs, rules=rules)
    found["SparseGPT as published"] = lambda: sparsegpt(refine=0)
    found["SparseGPT"] = sparsegpt
    found["SparseGPT, float targets"] = lambda: sparsegpt(reference=True)
    return found


def rows(
    report: Report,
    model: str,
    found: Mapping[str, Make],
    score: Callable[[Any], dict[str, float]],
) -> None:
    """A row for each method that has none yet."""
    for name, make in found.items():
        if (model, name) not in report:
            first, *others = score(make()).items()
            report.add(model, name, "", first[1], **dict(others))


def of_stories(
    report: Report,
    root: Path | None,
    *,
    batches: int = BATCHES,
    parts: Mapping[str, tuple[int, int]] | None = None,
    patterns: Mapping[str, Any] = PATTERNS,
) -> None:
    """The rows of stories260k."""
    model, params = stories.load(root=root)
    calibration = stories_run.windows(root, LENGTH, mixed=False)[:batches]
    parts = {"test": TEST, "validation": VALIDATION} if parts is None else parts
    texts = {name: data.stories(*part, root) for name, part in parts.items()}
    nll = functools.partial(text.mean_nll, jc.lift(model.apply))
    score = lambda p: {name: round(nll(p, part), 4) for name, part in texts.items()}
    rows(report, "stories float", {"": lambda: params}, score)
    for name, sparsity in patterns.items():
        found = methods(model.apply, params, calibration, STORIES, sparsity)
        rows(report, f"stories {name}", found, score)


def of_minilm(report: Report, root: Path | None) -> None:
    """The rows of MiniLM."""
    model, params = minilm.load(scan=True)
    calibration = minilm_run.calibration(root)[:BATCHES]
    pairs = data.sts("stsb_test", root)
    apply = jc.lift(model.apply)
    encode = lambda p: sentences.encode(apply, p, pairs.first + pairs.second)
    float_vectors = encode(params)

    def score(p: Any) -> dict[str, float]:
        vectors = encode(p)
        cosine = float((vectors * float_vectors).sum(-1).mean())
        spearman = sentences.spearman(pairs, vectors)
        return {"test": round(spearman, 2), "cosine": round(cosine, 4)}

    rows(report, "MiniLM float", {"": lambda: params}, score)
    for name, sparsity in PATTERNS.items():
        found = methods(model.apply, params, calibration, MINILM, sparsity)
        del found["SparseGPT, float targets"]
        rows(report, f"MiniLM {name}", found, score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--models", nargs="+", default=["stories", "minilm"])
    options = parser.parse_args()
    report = Report("results", __doc__, folder=HERE, resume=options.resume)
    if "stories" in options.models:
        of_stories(report, options.data_dir)
    if "minilm" in options.models:
        of_minilm(report, options.data_dir)


if __name__ == "__main__":
    main()
