"""MiniLM by bits and algorithm: every linear and embedding weight.

Spearman correlation x100, and the mean cosine between the compressed and the float
vectors; the score is the cosine on STS-B dev, where settings were chosen. Rows that end
an algorithm's line are also scored on STS-B test and STS13-15. Calibrated on STS-B's
training sentences.

    python -m experiments.post_training.minilm_run [--validate]
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
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
from experiments.post_training.tuning import tune

BATCHES, ROWS = 10, 64
TUNING_STEPS, TUNING_RATE = 200, 1e-3
PARTS = ["stsb_dev", "stsb_test", "sts13", "sts14", "sts15"]
ALL = len(PARTS)
KERNELS = "params/**/kernel"
EMBEDDINGS = "params/**/embedding"
AFTER_GELU = "params/layers/output/kernel"
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


class Table:
    """Scores of compressed parameters beside the float vectors, row by row."""

    def __init__(
        self,
        model: Any,
        params: Any,
        parts: dict[str, Any],
        report: Report,
        *,
        entropy: Any = None,
    ) -> None:
        """A table; every part is encoded once in float, files as `io.save` does."""
        self.apply: Any = jc.lift(model.apply)
        self.entropy = entropy
        self.parts, self.report = parts, report
        self.dense = jc.io.file_bytes(params)
        self.float = functools.cache(
            functools.partial(self._encode, model.apply, params)
        )

    def add(
        self, grid: str, method: str, make: Callable[[], Any], *, parts: int = 1
    ) -> None:
        """One row, unless it is there: correlations and cosines of the first parts."""
        if (grid, method) in self.report:
            return
        packed = make()
        scores: dict[str, Any] = {}
        for name in list(self.parts)[:parts]:
            vectors = self._encode(self.apply, packed, name)
            cosine = float((vectors * self.float(name)).sum(-1).mean())
            spearman = sentences.spearman(self.parts[name], vectors)
            scores |= {name: round(spearman, 2), f"{name}_cosine": round(cosine, 4)}
        size = jc.io.file_bytes(packed, entropy=self.entropy)
        scores |= {"bytes": size, "percent": round(100 * size / self.dense, 1)}
        first = scores.pop(f"{next(iter(self.parts))}_cosine")
        self.report.add(grid, method, "", first, **scores)

    def _encode(self, apply: Any, params: Any, name: str) -> np.ndarray:
        pairs = self.parts[name]
        return sentences.encode(apply, params, pairs.first + pairs.second)


def eight_bits(table: Table, model: Any, params: Any, batches: Any) -> None:
    """Weights and activations at 8 bits, embeddings as weights only."""
    embeddings = {EMBEDDINGS: jc.presets.W8A16}
    compress = functools.partial(
        jc.compress, params, fn=model.apply, example=batches[0]
    )
    for name, fmt in {
        "W8A16": jc.presets.W8A16,
        "W8A8": jc.presets.W8A8,
        "FP8 dynamic": jc.presets.FP8_DYNAMIC,
    }.items():
        make = functools.partial(compress, {KERNELS: fmt, **embeddings})
        table.add(name, "rounding", make, parts=ALL)
    smooth = functools.partial(jc.quant.smoothquant, model.apply, params, batches)
    static = jc.quant.int8(activations=jc.quant.static(jc.quant.Integer(bits=8)))
    for name, fmt in {
        "W8A8": jc.presets.W8A8,
        "W8A8 static": static,
        "FP8 static": jc.presets.FP8,
    }.items():
        make = functools.partial(smooth, rules={KERNELS: fmt, **embeddings})
        table.add(name, "SmoothQuant", make, parts=ALL)

    def calibrated(packed: Any, rule: Any) -> Any:
        """Static ranges of least squared error, with a zero point."""
        element = jc.quant.Integer(bits=8, symmetric=False, narrow=False)
        fmt = jc.quant.int8(activations=jc.quant.static(element))
        stats = jc.calibrate(model.apply, params, batches, where=rule, histogram=True)
        found = jc.quant.calibrated(fmt, stats, method=jc.quant.mse())
        return jc.compress(packed, {rule: found}, fn=model.apply, example=batches[0])

    def mixed() -> Any:
        # GELU leaves a few outputs that are far larger than all others.
        rules = {jc.where(KERNELS, exclude=[AFTER_GELU]): static, **embeddings}
        return calibrated(smooth(rules=rules), AFTER_GELU)

    plain = functools.partial(jc.compress, params, embeddings)
    table.add("W8A8 static", "MSE range", lambda: calibrated(plain(), KERNELS), parts=2)
    table.add("W8A8 static", "SmoothQuant, MSE range", mixed, parts=ALL)


def weights_only(
    table: Table, model: Any, params: Any, batches: Any, bits: int
) -> None:
    """Rounding, and at fewer than 8 bits every algorithm."""
    rules, grid = formats(bits), f"W{bits} g32"
    compress = functools.partial(
        jc.compress, params, fn=model.apply, example=batches[0]
    )
    plain = {k: f.replace(search=None) for k, f in rules.items()}
    table.add(grid, "rounding", lambda: compress(plain), parts=2)
    table.add(grid, "rounding, MSE range", lambda: compress(rules), parts=2)
    if bits == 8:
        return
    inputs = (model.apply, params, batches)
    gptq = functools.partial(jc.quant.gptq, *inputs, rules=rules)
    towards = functools.cache(functools.partial(gptq, reference=True))
    table.add(grid, "AWQ", lambda: jc.quant.awq(*inputs, rules=rules))
    table.add(grid, "GPTQ", gptq)
    table.add(grid, "GPTQ, float targets", towards)

    def tuned() -> Any:
        return tune(
            model.apply,
            params,
            towards(),
            batches,
            distance,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )

    table.add(grid, "GPTQ, float targets, tuned", tuned, parts=ALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="on dev, not on tests")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = minilm.load(scan=True)
    names = ["stsb_dev"] if options.validate else PARTS
    name = "minilm_validation" if options.validate else "minilm"
    report = Report(name, __doc__, resume=options.resume)
    parts = {name: data.sts(name, root) for name in names}
    table = Table(model, params, parts, report)
    table.add("float", "", lambda: params, parts=ALL)
    batches = calibration(root)
    if 8 in options.bits:
        eight_bits(table, model, params, batches)
    for bits in options.bits:
        weights_only(table, model, params, batches, bits)


if __name__ == "__main__":
    main()
