"""CIFAR-10 ResNet-20 with weights and activations of 4, 3 and 2 bits, trained so.

Every net learns the float net's logits on randomly shifted and mirrored training
images (no label is used), the first and last layer at 8 bits. First LSQ from 4 to 2
bits, each from the weights of the one before; then the estimators on equal budgets.
Settings are first guesses, never searched; `--validate` scores training images held
out, whose labels the float net knows, instead of the test images.

    python -m experiments.resnets.training [--validate] [--resume] [--only lsq]
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.models import resnet
from experiments.post_training.report import Report
from experiments.resnets.post_training import (
    RESULTS,
    VALIDATION,
    Net,
    augmented,
    batches,
)

TEMPERATURE = 4.0
BATCH = 50
CALIBRATION, RECALIBRATION = slice(0, 250), slice(0, 2000)
CLIP_PENALTY = 1e-4
SEARCH = jc.quant.mse()
CHECKPOINTS = Path("resnet_checkpoints")


class Run(NamedTuple):
    """Settings of one training: bits of weights and activations, and a budget."""

    bits: int
    steps: int
    learning_rate: float
    seed: int = 0


LSQ_RUNS = (Run(4, 150, 3e-4), Run(3, 300, 5e-4), Run(2, 600, 1e-3))
ESTIMATOR_RUNS = tuple(Run(3, 30, 1e-3, seed) for seed in range(3))
ESTIMATORS = ("STE", "clipped STE", "LSQ", "LSQ+", "PACT", "DoReFa")


def estimator(name: str, bits: int, stats: Any) -> jc.Transform:
    """How weights and activations of the inner layers are trained."""
    element = jc.quant.Integer(bits=bits, symmetric=False, narrow=False)
    weights = jc.quant.integer(bits, narrow=False, search=SEARCH)
    fmt = weights.replace(activations=jc.quant.static(element))
    learned = functools.partial(
        jc.quant.lsq, fmt, initial="range", stats=stats, method=SEARCH
    )
    match name:
        case "STE":
            return jc.quant.calibrated(fmt, stats, method=SEARCH)
        case "clipped STE":
            clipped = fmt.replace(clip_gradient=True)
            return jc.quant.calibrated(clipped, stats, method=SEARCH)
        case "LSQ":
            return learned(learn_offset=False)
        case "LSQ+":
            return learned()
        case "PACT":
            return jc.quant.pact(weights, bits=bits, alpha=clips(fmt, stats))
        case "DoReFa":
            return jc.quant.dorefa(bits=bits, activation_bits=bits)
    raise ValueError(f"estimator: name must be one of {ESTIMATORS}; got {name!r}.")


def clips(fmt: jc.quant.NumberFormat, stats: Any) -> dict[str, jax.Array]:
    """The upper ends of the ranges that the other estimators start from."""
    assert fmt.activations is not None
    scales = {
        path: jc.quant.activation_range(s, fmt.activations, method=SEARCH)[0]
        for path, s in stats.items()
    }
    return {
        path: scale * fmt.activations.element.range[1] for path, scale in scales.items()
    }


class Training:
    """The float net to learn from, and the images to learn on."""

    def __init__(self, net: Net, x: np.ndarray) -> None:
        """Of training images `x`, those of `VALIDATION` left out."""
        self.net, self.apply = net, net.apply
        self.x = np.delete(x, np.r_[VALIDATION], axis=0)
        self.train: Any = functools.partial(
            self.apply, train=True, mutable=["batch_stats"]
        )
        self.calibration = batches(self.x[CALIBRATION], BATCH)

    def scheme(self, name: str, bits: int, variables: Any) -> jc.Transform:
        """`estimator` inside; 8 bits with calibrated activations at the ends."""
        example = self.calibration[0][0][:2]
        stats = jc.calibrate(self.apply, variables, self.calibration, histogram=True)
        element = jc.quant.Integer(bits=8, symmetric=False, narrow=False)
        outer = jc.quant.int8(activations=jc.quant.static(element))
        rules = jc.quant.first_and_last(
            self.apply,
            variables,
            example,
            inner=estimator(name, bits, stats),
            outer=jc.quant.calibrated(outer, stats),
        )
        axes = jc.trace_axes(self.apply, variables, example)
        return jc.select(rules, axes=axes)

    def images(self, run: Run) -> Iterator[jax.Array]:
        """Augmented batches, shuffled anew for each pass."""
        rng = np.random.default_rng(run.seed)
        order = np.zeros(0, int)
        for _ in range(run.steps):
            if len(order) < BATCH:
                order = rng.permutation(len(self.x))
            chosen, order = order[:BATCH], order[BATCH:]
            yield jnp.asarray(resnet.normalize(augmented(self.x[chosen], rng)))

    def learn(self, name: str, run: Run, variables: Any) -> tuple[Any, Any]:
        """Train from `variables`: the weights before the grid, and what is stored."""
        scheme = self.scheme(name, run.bits, variables)
        params, state = scheme.init(variables)
        free, rest = jc.partition(params["params"])
        rate = optax.cosine_decay_schedule(run.learning_rate, run.steps)
        tx = optax.adam(rate)
        forward = jc.lift(self.train)

        def whole(free: Any) -> Any:
            return {**params, "params": jc.merge(free, rest)}

        def loss(free: Any, x: jax.Array) -> jax.Array:
            target = self.apply(self.net.variables, x)
            logits, _ = forward(scheme.view(whole(free), state), x)
            gap = jc.distill.soft_targets(logits, target, temperature=TEMPERATURE)
            return gap.mean() + CLIP_PENALTY * jc.quant.clip_penalty(free)

        @jax.jit
        def step(free: Any, opt_state: Any, x: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(free, x)
            updates, opt_state = tx.update(grads, opt_state)
            return optax.apply_updates(free, updates), opt_state, value

        opt_state = tx.init(free)
        for i, x in enumerate(self.images(run)):
            free, opt_state, value = step(free, opt_state, x)
            if i % 25 == 0:
                print(f"  {name} {run} step {i}: loss {float(value):.4f}", flush=True)
        packed = self.recalibrated(scheme.compress(whole(free), state))
        latent = {**jc.materialize(whole(free)), "batch_stats": packed["batch_stats"]}
        return latent, packed

    def recalibrated(self, packed: Any) -> Any:
        """With running statistics of the compressed net."""
        images = augmented(self.x[RECALIBRATION], np.random.default_rng(0))
        seen = batches(images, 250)
        return jc.quant.recalibrate_batch_norm(self.train, packed, seen)


def lsq_rows(training: Training, report: Report, folder: Path) -> None:
    """From many bits to few, each from the last."""
    latent = training.net.variables
    for run in LSQ_RUNS:
        row = (f"W{run.bits}A{run.bits}", "LSQ, progressive")
        path = folder / f"{row[0]}.jc"
        if row in report and path.exists():
            latent = jc.io.load(path)
            continue
        latent, packed = training.learn("LSQ", run, latent)
        jc.io.save(path, latent, overwrite=True)
        found = training.net.scores(packed)
        report.add(*row, "", found.pop("score"), **found, **run._asdict())


def estimator_rows(training: Training, report: Report) -> None:
    """All from the float net, each seed an order and cut of the images."""
    for run, name in itertools.product(ESTIMATOR_RUNS, ESTIMATORS):
        row = (f"W{run.bits}A{run.bits}", f"{name}, seed {run.seed}")
        if row not in report:
            _, packed = training.learn(name, run, training.net.variables)
            found = training.net.scores(packed)
            report.add(*row, "", found.pop("score"), **found, **run._asdict())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--only", choices=["lsq", "estimators"])
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    options = parser.parse_args()
    train = data.cifar10("train", options.data_dir)
    images = data.cifar10("test", options.data_dir)
    if options.validate:
        images = data.Images(train.x[VALIDATION], train.y[VALIDATION])
    training = Training(Net(20, images, options.data_dir), train.x)
    name = "training" + "_validation" * options.validate
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    if options.only != "estimators":
        lsq_rows(training, report, options.checkpoints)
    if options.only != "lsq":
        estimator_rows(training, report)


if __name__ == "__main__":
    main()
