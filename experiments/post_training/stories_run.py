"""stories260k by bits and algorithm: mean NLL on stories 1200-1229.

Calibrated, tuned and distilled on stories 0-1159; settings were chosen on stories
1160-1199.

    python -m experiments.post_training.stories_run
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training.report import Report
from experiments.post_training.tuning import distil, tune

LAYERS = "params/layers/**/kernel"
CALIBRATION, VALIDATION, TEST = (0, 1160), (1160, 1200), (1200, 1230)
BATCHES, ROWS, LENGTH = 16, 8, 512
TRAINING_LENGTH = 256
TUNING_STEPS, TUNING_RATE = 200, 3e-3
DISTILLING_STEPS, DISTILLING_RATE = 226, 1e-3
SEARCH = jc.quant.mse()
GRIDS = [(8, None), (6, None), (5, None), (4, None), (3, None), (2, None)]
GRIDS += [(4, 32), (3, 32), (2, 32)]


def formats(bits: int, group_size: int | None, *, search: Any = SEARCH) -> Any:
    """All layers at `bits`; w2, whose 172 inputs are no multiple of 32, in 43s."""
    options = {"symmetric": bits > 4, "search": search, "axes": -2}
    if group_size is None:
        return {LAYERS: jc.quant.integer(bits, **options)}
    return {
        jc.where(LAYERS, exclude=["**/w2/kernel"]): jc.quant.integer(
            bits, group_size=group_size, **options
        ),
        "**/w2/kernel": jc.quant.integer(bits, group_size=43, **options),
    }


def windows(root: Path | None, length: int, *, mixed: bool) -> list[tuple[jax.Array]]:
    """Batches of windows of the stories, one after another or `mixed`."""
    ids = np.concatenate(data.stories(*CALIBRATION, root))
    rows = ids[: len(ids) // length * length].reshape(-1, length)
    if mixed:
        rows = np.random.default_rng(0).permutation(rows)
    parts = rows[: len(rows) // ROWS * ROWS].reshape(-1, ROWS, length)
    return [(jnp.asarray(part, jnp.int32),) for part in parts]


def divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """KL divergence from the float model, a token."""
    return jc.distill.soft_targets(logits, target, temperature=1.0).mean()


def student(bits: int, group_size: int | None) -> jc.Transform:
    """LSQ at 2 bits; above, straight-through on the grid of the range."""
    if bits > 2:
        rules = formats(bits, group_size, search=None)
        return jc.select({k: jc.quant.weights(f) for k, f in rules.items()})
    even = jc.quant.Integer(bits=2, narrow=False)
    rules = formats(bits, group_size)
    return jc.select(
        {
            k: jc.quant.lsq(f.replace(element=even), initial="range")
            for k, f in rules.items()
        }
    )


def compressed(
    model: Any, params: Any, root: Path | None, bits: int, group_size: int | None
) -> dict[str, Callable[[], Any]]:
    """How to compress, by algorithm."""
    batches = windows(root, LENGTH, mixed=False)[:BATCHES]
    rules = formats(bits, group_size)
    hqq = {k: f.replace(search=jc.quant.hqq()) for k, f in rules.items()}
    compress = functools.partial(jc.compress, params)
    sweep = functools.partial(jc.quant.gptq, model.apply, params, batches, rules=rules)
    towards = functools.cache(lambda: sweep(reference=True))
    training = functools.partial(windows, root, TRAINING_LENGTH, mixed=True)
    found: dict[str, Callable[[], Any]] = {
        "rounding": lambda: compress(formats(bits, group_size, search=None)),
        "rounding, MSE range": lambda: compress(rules),
    }
    if bits <= 4:
        found["rounding, HQQ range"] = lambda: compress(hqq)
        found["AWQ"] = lambda: jc.quant.awq(model.apply, params, batches, rules=rules)
    found |= {"GPTQ": sweep, "GPTQ, float targets": towards}
    if bits <= 4:
        found["GPTQ, float targets, tuned"] = lambda: tune(
            model.apply,
            params,
            towards(),
            training(),
            divergence,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )
        found["quantization-aware distillation"] = lambda: distil(
            model.apply,
            params,
            student(bits, group_size),
            training(),
            divergence,
            steps=DISTILLING_STEPS,
            learning_rate=DISTILLING_RATE,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    parts = {"validation": data.stories(*VALIDATION, root)}
    if not options.validate:
        parts["test"] = data.stories(*TEST, root)
    nll = functools.partial(text.mean_nll, jc.lift(model.apply))
    name = "stories_validation" if options.validate else "stories"
    report = Report(name, __doc__, resume=options.resume)

    def add(grid: str, name: str, weights: Any) -> None:
        scores = {k: round(nll(weights, part), 4) for k, part in parts.items()}
        *others, (_, score) = scores.items()
        report.add(grid, name, "", score, **dict(others))

    if ("float", "") not in report:
        add("float", "", params)
    for bits, group in GRIDS:
        grid = f"W{bits}" + ("" if group is None else f" g{group}")
        for name, make in compressed(model, params, root, bits, group).items():
            if (grid, name) not in report:
                add(grid, name, make())


if __name__ == "__main__":
    main()
