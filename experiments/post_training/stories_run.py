"""stories260k by bits and algorithm: mean NLL on stories 1200-1229.

Calibrated on stories 0-1159; settings were chosen on stories 1160-1199.

    python -m experiments.post_training.stories_run
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training.report import Report
from experiments.post_training.tuning import tune

LAYERS = "params/layers/**/kernel"
CALIBRATION, VALIDATION, TEST = (0, 1160), (1160, 1200), (1200, 1230)
BATCHES, ROWS, LENGTH = 16, 8, 512
TUNING_STEPS, TUNING_RATE = 300, 1e-3


def formats(bits: int, group_size: int | None) -> dict[Any, Any]:
    """All layers at `bits`; w2, whose 172 inputs are no multiple of 32, in 43s."""
    if group_size is None:
        return {LAYERS: jc.quant.integer(bits, symmetric=bits > 4, search=SEARCH)}
    options = {"symmetric": False, "search": SEARCH}
    return {
        jc.where(LAYERS, exclude=["**/w2/kernel"]): jc.quant.integer(
            bits, group_size=group_size, **options
        ),
        "**/w2/kernel": jc.quant.integer(bits, group_size=43, **options),
    }


SEARCH = jc.quant.mse()


def calibration(root: Path | None) -> list[tuple[jax.Array]]:
    """Windows of the stories, one after another."""
    ids = np.concatenate(data.stories(*CALIBRATION, root))
    windows = ids[: BATCHES * ROWS * LENGTH].reshape(BATCHES, ROWS, LENGTH)
    return [(jnp.asarray(w, jnp.int32),) for w in windows]


def divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """KL divergence from the float model, a token."""
    return jc.distill.soft_targets(logits, target, temperature=1.0).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    batches = calibration(root)
    part = data.stories(*(VALIDATION if options.validate else TEST), root)
    apply: Any = jc.lift(model.apply)
    nll = functools.partial(text.mean_nll, apply)
    report = Report("stories_validation" if options.validate else "stories", __doc__)
    report.add("float", "", "", nll(params, part))
    for bits, group in [(8, None), (6, None), (5, None), (4, None), (3, None)] + [
        (2, None),
        (4, 32),
        (3, 32),
    ]:
        rules = formats(bits, group)
        grid = f"W{bits}" + ("" if group is None else f" g{group}")
        plain = {k: f.replace(search=None) for k, f in rules.items()}
        compress = functools.partial(jc.compress, fn=model.apply, example=batches[0])
        report.add(grid, "rounding", "", nll(compress(params, plain), part))
        report.add(grid, "rounding, MSE range", "", nll(compress(params, rules), part))
        gptq = functools.partial(jc.quant.gptq, model.apply, params, batches)
        report.add(grid, "GPTQ", "", nll(gptq(rules=rules), part))
        packed = gptq(rules=rules, reference=True)
        report.add(grid, "GPTQ, float targets", "", nll(packed, part))
        if bits > 4:
            continue
        packed = tune(
            model.apply,
            params,
            packed,
            batches,
            divergence,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )
        report.add(grid, "GPTQ, float targets, tuned", "", nll(packed, part))
    report.save()


if __name__ == "__main__":
    main()
