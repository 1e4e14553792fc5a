"""MiniLM by bits and algorithm: every linear and embedding weight.

Spearman correlation x100 on STS-B and STS13-15, and the mean cosine between the
compressed and the float vectors of the STS-B part. Calibrated on STS-B's training
sentences; settings were chosen on its dev part.

    python -m experiments.post_training.minilm_run [--validate]
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import minilm, sentences
from experiments.post_training.report import Report
from experiments.post_training.tuning import tune

BATCHES, ROWS = 10, 64
TUNING_STEPS, TUNING_RATE = 200, 1e-3
KERNELS = "params/**/kernel"
EMBEDDINGS = "params/**/embedding"
SEARCH = jc.quant.mse()
# Lloyd-Max levels of a normal distribution, an even number of them (Max, 1960).
FOUR_LEVELS = (-1.0, -0.29982, 0.29982, 1.0)


def formats(bits: int) -> dict[Any, Any]:
    """Groups of 32 throughout."""
    match bits:
        case 8:
            fmt = jc.quant.int8(group_size=32)
        case 2:
            fmt = jc.quant.table(FOUR_LEVELS, name="lloyd2", group_size=32)
        case _:
            fmt = jc.quant.integer(bits, symmetric=False, group_size=32)
    fmt = fmt.replace(search=SEARCH, scale="bfloat16")
    return {KERNELS: fmt, EMBEDDINGS: fmt}


def calibration(root: Path | None) -> list[tuple[jax.Array, jax.Array]]:
    """Training sentences of the one most frequent length, so that none is padded."""
    pairs = data.sts("stsb_train", root)
    texts = sorted({*pairs.first, *pairs.second})
    ids = [e.ids for e in sentences.tokenizer().encode_batch(texts)]
    counts = Counter(map(len, ids))
    length = max((n for n in counts if n >= 12), key=lambda n: counts[n] * n)
    rows = np.array([row for row in ids if len(row) == length], np.int32)
    n = min(BATCHES, len(rows) // ROWS)
    parts = rows[: n * ROWS].reshape(n, ROWS, length)
    return [(jnp.asarray(p), jnp.ones(p.shape, bool)) for p in parts]


def distance(vectors: jax.Array, target: jax.Array) -> jax.Array:
    """One minus the mean cosine."""
    return 1.0 - jnp.sum(vectors * target, -1).mean()


class Scores:
    """Scores of compressed parameters, beside the float vectors."""

    def __init__(self, model: Any, params: Any, sets: list[Any]) -> None:
        """Encode every set once in float."""
        self.apply: Any = jc.lift(model.apply)
        self.sets = sets
        self.float = [self._encode(model.apply, params, pairs) for pairs in sets]

    def __call__(self, packed: Any, *, everything: bool) -> tuple[float, list[float]]:
        """Mean cosine on the first set, and Spearman on it, or on all of them."""
        cosine, scores = 0.0, []
        for pairs, target in zip(self.sets, self.float, strict=True):
            vectors = self._encode(self.apply, packed, pairs)
            scores.append(sentences.spearman(pairs, vectors))
            if len(scores) == 1:
                cosine = float((vectors * target).sum(-1).mean())
                if not everything:
                    break
        return cosine, scores

    def _encode(self, apply: Any, params: Any, pairs: Any) -> np.ndarray:
        return sentences.encode(apply, params, pairs.first + pairs.second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="on dev, not on tests")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    options = parser.parse_args()
    root = options.data_dir
    model, params = minilm.load(scan=True)
    names = (
        ["stsb_dev"] if options.validate else ["stsb_test", "sts13", "sts14", "sts15"]
    )
    score = Scores(model, params, [data.sts(name, root) for name in names])
    batches = calibration(root)
    report = Report("minilm_validation" if options.validate else "minilm", __doc__)

    def add(grid: str, method: str, packed: Any, *, everything: bool = False) -> None:
        cosine, scores = score(packed, everything=everything)
        more = {n: round(s, 2) for n, s in zip(names, scores, strict=False)}
        size = jc.report.size(packed)
        dense = jc.report.size(params).disk_bytes
        report.add(
            grid,
            method,
            "",
            cosine,
            **more,
            bytes=size.disk_bytes,
            percent=round(100 * size.disk_bytes / dense, 1),
        )

    add("float", "", params, everything=True)
    compress = functools.partial(
        jc.compress, params, fn=model.apply, example=batches[0]
    )
    static = {
        KERNELS: jc.quant.int8(activations=jc.quant.static(jc.quant.Integer(bits=8)))
    }
    for name, rules in {
        "W8A16": {KERNELS: jc.presets.W8A16, EMBEDDINGS: jc.presets.W8A16},
        "W8A8": {KERNELS: jc.presets.W8A8, EMBEDDINGS: jc.presets.W8A16},
        "FP8 dynamic": {KERNELS: jc.presets.FP8_DYNAMIC},
    }.items():
        if 8 in options.bits:
            add(name, "rounding", compress(rules), everything=True)
    if 8 in options.bits:
        smooth = functools.partial(jc.quant.smoothquant, model.apply, params, batches)
        add("W8A8", "SmoothQuant", smooth(rules={KERNELS: jc.presets.W8A8}))
        add("W8A8 static", "SmoothQuant", smooth(rules=static))
        add("FP8 static", "SmoothQuant", smooth(rules={KERNELS: jc.presets.FP8}))
    for bits in options.bits:
        rules = formats(bits)
        grid = f"W{bits} g32"
        plain = {k: f.replace(search=None) for k, f in rules.items()}
        add(grid, "rounding", compress(plain))
        add(grid, "rounding, MSE range", compress(rules))
        if bits == 8:
            continue
        sweep = functools.partial(jc.quant.gptq, model.apply, params, batches)
        add(grid, "AWQ", jc.quant.awq(model.apply, params, batches, rules=rules))
        add(grid, "GPTQ", sweep(rules=rules))
        packed = sweep(rules=rules, reference=True)
        add(grid, "GPTQ, float targets", packed)
        packed = tune(
            model.apply,
            params,
            packed,
            batches,
            distance,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )
        add(grid, "GPTQ, float targets, tuned", packed, everything=True)


if __name__ == "__main__":
    main()
