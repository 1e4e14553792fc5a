"""Pruning and quantization with and without a teacher, on scikit-learn's digits.

A dense net is trained on all 1,197 images and then compressed with 192 of them at
hand: pruned, or quantized to two bits, while it is trained on. Rows of a pair differ in
the loss alone: labels, or softened outputs of the dense net and labels. A seed draws
the net and the batches.

    python -m experiments.distillation.digits_run [--validate] [--resume]

Scores are percent of the 300 test images (`--validate`: the 300 validation images).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.digits import run as digits
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
SEEDS = tuple(range(10))
SETTINGS = digits.Settings(teacher_width=128, student_epochs=60)
IMAGES = 192
TEMPERATURE = 4.0
ALPHA = {"labels": 0.0, "distilled": 0.9}
APPLY: Callable[..., Any] = jc.lift(digits.MLP(SETTINGS.teacher_width).apply)


def pruning(n: int) -> jc.Transform:
    """70 % of all weights, on a cubic schedule."""
    sparsity = jc.schedules.cubic(0.3, 0.7, begin=0, end=n // 2)
    magnitude = jc.prune.magnitude(sparsity=sparsity, scope="global", every=10)
    return jc.select({"**/kernel": magnitude})


def quantization(n: int) -> jc.Transform:
    """Two bits, a step for every output, learned."""
    del n
    return jc.select({"**/kernel": jc.quant.lsq(jc.quant.int2())})


SCHEMES: dict[str, Callable[[int], jc.Transform]] = {
    "pruned": pruning,
    "2 bits": quantization,
}


def accuracy(params: Any, part: digits.Part) -> jax.Array:
    """Percent right."""
    found = APPLY(params, part.x).argmax(-1)
    return 100.0 * (found == part.y).mean()


def compressed(
    scheme: jc.Transform,
    parts: tuple[digits.Part, digits.Part],
    nets: Any,
    keys: jax.Array,
    steps: int,
    alpha: float,
) -> jax.Array:
    """Percent right of the second part after compression on the first, one a seed."""
    tx = jc.optim.attach(digits.optimizer(SETTINGS, steps), scheme)
    settings = dataclasses.replace(SETTINGS, jitter=0.0)
    shown, scored = parts

    def run(net: Any, key: jax.Array) -> jax.Array:
        def loss(params: Any, opt: Any, x: jax.Array, y: Any) -> jax.Array:
            logits = APPLY(scheme.view(params, jc.optim.state(opt)), x)
            labels, said = y
            return jc.distill.mix(
                logits, said, labels, temperature=TEMPERATURE, alpha=alpha
            ).mean()

        params, _ = scheme.init(net)
        lessons = digits.Part(shown.x, (shown.y, APPLY(net, shown.x)))
        params, opt = digits.minimize(loss, tx, params, lessons, key, steps, settings)
        return accuracy(scheme.view(params, jc.optim.state(opt)), scored)

    return jax.jit(jax.vmap(run))(nets, keys)


def main() -> None:
    """The dense nets; then every scheme, with labels and with a teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    name = "digits_validation" if options.validate else "digits"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    train, validation, test = digits.load()
    scored = validation if options.validate else test
    shown = digits.Part(train.x[:IMAGES], train.y[:IMAGES])
    steps = SETTINGS.student_epochs * (IMAGES // SETTINGS.batch)
    keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(jnp.array(SEEDS)))
    fit = functools.partial(digits.train_teacher, SETTINGS, train)
    nets = jax.jit(jax.vmap(fit))(keys[:, 0])

    def add(which: str, method: str, found: jax.Array) -> None:
        for seed, percent in zip(SEEDS, np.asarray(found), strict=True):
            if (which, row := f"{method}, seed {seed}") not in report:
                report.add(which, row, "", round(float(percent), 2))
        report.add_means(which)

    add("dense", "labels", jax.vmap(lambda net: accuracy(net, scored))(nets))
    for which, scheme in SCHEMES.items():
        for method, alpha in ALPHA.items():
            if (which, f"{method}, mean") not in report:
                parts = shown, scored
                found = compressed(scheme(steps), parts, nets, keys[:, 1], steps, alpha)
                add(which, method, found)


if __name__ == "__main__":
    main()
