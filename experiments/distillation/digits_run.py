"""Pruning and quantization with and without a teacher, on scikit-learn's digits.

Every row trains the same small MLP for the same steps on the same batches; rows of a
pair differ in the loss alone: labels, or softened outputs of a dense teacher and
labels. A seed draws the teacher, the student and the batches.

    python -m experiments.distillation.digits_run [--validate] [--resume]

Scores are percent of the 300 test images (`--validate`: the 300 validation images).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.digits import run as digits
from experiments.distillation.training import add_means
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
SEEDS = tuple(range(10))
SETTINGS = digits.Settings(student_width=64, student_epochs=60)
TEMPERATURE = 4.0
ALPHA = {"labels": 0.0, "distilled": 0.9}


def pruning(n: int) -> jc.Transform:
    """95 % of all weights, on a cubic schedule."""
    sparsity = jc.schedules.cubic(0.0, 0.95, begin=n // 10, end=7 * n // 10)
    magnitude = jc.prune.magnitude(sparsity=sparsity, scope="global", every=20)
    return jc.select({"**/kernel": magnitude})


def quantization(n: int) -> jc.Transform:
    """Two bits, a step for every output, learned."""
    del n
    return jc.select({"**/kernel": jc.quant.lsq(jc.quant.int2())})


def nothing(n: int) -> jc.Transform:
    """The dense student."""
    del n
    return jc.identity()


SCHEMES: dict[str, Callable[[int], jc.Transform]] = {
    "dense": nothing,
    "pruned": pruning,
    "2 bits": quantization,
}


def accuracies(
    scheme: jc.Transform,
    parts: tuple[digits.Part, digits.Part],
    teachers: Any,
    keys: jax.Array,
    alpha: float,
) -> jax.Array:
    """Percent right of the second part after training on the first, one a seed."""
    model = digits.MLP(SETTINGS.student_width)
    apply: Callable[..., Any] = jc.lift(model.apply)
    teach: Callable[..., Any] = digits.MLP(SETTINGS.teacher_width).apply
    n = SETTINGS.steps(SETTINGS.student_epochs)
    tx = jc.optim.attach(digits.optimizer(SETTINGS, n), scheme)
    train, scored = parts

    def run(teacher: Any, key: jax.Array) -> jax.Array:
        def loss(params: Any, opt: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            logits = apply(scheme.view(params, jc.optim.state(opt)), x)
            return jc.distill.mix(
                logits, teach(teacher, x), y, temperature=TEMPERATURE, alpha=alpha
            ).mean()

        params, _ = scheme.init(model.init(key, train.x[:1]))
        params, opt = digits.minimize(loss, tx, params, train, key, n, SETTINGS)
        logits = apply(scheme.view(params, jc.optim.state(opt)), scored.x)
        return 100.0 * (logits.argmax(-1) == scored.y).mean()

    return jax.jit(jax.vmap(run))(teachers, keys)


def main() -> None:
    """Every scheme, with labels and with a teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    name = "digits_validation" if options.validate else "digits"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    train, validation, test = digits.load()
    scored = validation if options.validate else test
    n = SETTINGS.steps(SETTINGS.student_epochs)
    keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.key)(jnp.array(SEEDS)))
    teach = functools.partial(digits.train_teacher, SETTINGS, train)
    teachers = jax.jit(jax.vmap(teach))(keys[:, 0])
    for which, scheme in SCHEMES.items():
        for method, alpha in ALPHA.items():
            if (which, f"{method}, seed {SEEDS[-1]}") in report:
                continue
            found = accuracies(scheme(n), (train, scored), teachers, keys[:, 1], alpha)
            for seed, percent in zip(SEEDS, found, strict=True):
                report.add(which, f"{method}, seed {seed}", "", float(percent))
        add_means(report, which, ALPHA)


if __name__ == "__main__":
    main()
