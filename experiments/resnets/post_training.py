"""CIFAR-10 ResNets quantized after training, without labels, by bits and algorithm.

Correct of the 1,000 test images, and how many predictions are those of the float net.
Calibrated on the first training images; settings were chosen on the last ones, by
agreement and divergence only: the nets know the labels of all of them by heart.

    python -m experiments.resnets.post_training [--validate] [--depth 20 56]
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
from experiments.models import resnet
from experiments.post_training.report import Report
from experiments.post_training.tuning import tune

RESULTS = Path(__file__).parent / "results"
BATCHES, ROWS = 4, 128
VALIDATION = slice(9000, 10000)
RECALIBRATION = slice(1000, 3000)
TUNING_STEPS, TUNING_RATE, TUNING_ROWS, TEMPERATURE = 40, 1e-3, 64, 4.0
TUNING = slice(3000, 9000)
# Behind a ReLU there is nothing below zero; before the first layer there is.
ACTIVATIONS = jc.quant.static(jc.quant.Integer(bits=8, symmetric=False, narrow=False))
SEARCH = jc.quant.mse()
QUICK = (
    "rounding",
    "rounding, MSE range",
    "... bias corrected",
    "... norms recalibrated",
    "equalized, MSE range",
)
COMPARED = (3,)  # Bits of the table that all algorithms are in.


class Net:
    """A float ResNet, and what the scripts ask of a compressed one."""

    def __init__(self, depth: int, images: data.Images, root: Path | None) -> None:
        """Load it, and run it once over `images`."""
        self.model, self.variables = resnet.load(depth, root=root)
        self.apply: Any = self.model.apply
        self.images = images
        self.logits = resnet.logits(self.apply, self.variables, images.x)

    def scores(self, variables: Any, apply: Any = None) -> dict[str, Any]:
        """Labels and float predictions met, and nats from the float net an image."""
        run = jc.lift(self.apply) if apply is None else apply
        logits = resnet.logits(run, variables, self.images.x)
        gap = jc.distill.soft_targets(
            jnp.asarray(logits), jnp.asarray(self.logits), temperature=1.0
        )
        return {
            "score": resnet.correct(logits, self.images.y),
            "agree": resnet.correct(logits, self.logits.argmax(-1)),
            "divergence": round(float(gap.mean()), 4),
        }


def batches(images: np.ndarray, rows: int) -> list[tuple[jax.Array]]:
    """Normalized images in batches; a rest is left out."""
    n = len(images) // rows
    parts = images[: n * rows].reshape(n, rows, *images.shape[1:])
    return [(jnp.asarray(resnet.normalize(part)),) for part in parts]


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut from images with 4 black pixels around, half mirrored: as nets were trained.

    Running statistics belong to such images; without the black they are others.
    """
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = rng.integers(0, 9, (len(images), 2))
    signs = np.where(rng.random(len(images)) < 0.5, -1, 1)
    parts = [
        image[i : i + 32, j : j + 32][:, ::sign]
        for image, (i, j), sign in zip(padded, corners, signs, strict=True)
    ]
    return np.stack(parts)


def divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """KL divergence of softened predictions, an image."""
    return jc.distill.soft_targets(logits, target, temperature=TEMPERATURE).mean()


class Methods:
    """Every way to compress one net, on the same calibration images."""

    def __init__(self, net: Net, x: np.ndarray) -> None:
        """Of the float `net`; `x` are training images."""
        self.net, self.apply = net, net.apply
        self.calibration = batches(x[: BATCHES * ROWS], ROWS)
        rng = np.random.default_rng(0)
        self.recalibration = batches(augmented(x[RECALIBRATION], rng), 250)
        self.tuning = batches(augmented(x[TUNING], rng), TUNING_ROWS)[:TUNING_STEPS]
        self.example = self.calibration[0][0][:2]

    def rules(self, bits: int, *, activations: bool = False, **options: Any) -> Any:
        """First and last layer of 8 bits, all others of `bits`; a scale a channel."""
        if activations:
            options["activations"] = ACTIVATIONS
        return jc.quant.first_and_last(
            self.apply,
            self.net.variables,
            self.example,
            inner=jc.quant.integer(bits, **options),
            outer=jc.quant.int8(**options),
        )

    def rounded(self, rules: Any, variables: Any = None) -> Any:
        """Without data but for the ranges of static activations."""
        variables = self.net.variables if variables is None else variables
        return jc.compress(variables, rules, fn=self.apply, example=self.example)

    def static(self, rules: Any) -> Any:
        """As `rounded`, activations of the range that they were seen in."""
        seen = jc.calibrate(self.apply, self.net.variables, self.calibration)
        return self.rounded({p: jc.quant.calibrated(f, seen) for p, f in rules.items()})

    def swept(self, algorithm: Any, rules: Any, **options: Any) -> Any:
        """Weight by weight."""
        variables = self.net.variables
        quiet = {"on_layer": lambda layer: None, **options}
        return algorithm(self.apply, variables, self.calibration, rules=rules, **quiet)

    def recalibrated(self, packed: Any) -> Any:
        """With running statistics of the compressed net."""
        train = functools.partial(self.apply, train=True, mutable=["batch_stats"])
        return jc.quant.recalibrate_batch_norm(train, packed, self.recalibration)

    def corrected(self, packed: Any) -> Any:
        """With the mean error of every layer taken out of its norm's running mean."""
        variables = self.net.variables
        return jc.quant.correct_bias(self.apply, variables, packed, self.calibration)

    def tuned(self, packed: Any) -> Any:
        """Norms and the last bias trained towards the float logits.

        Running statistics stay: a variance near zero would be stepped below it.
        """
        kept = {"batch_stats": packed["batch_stats"]}
        params = tune(
            lambda params, x: self.apply({"params": params, **kept}, x),
            self.net.variables["params"],
            packed["params"],
            self.tuning,
            divergence,
            steps=TUNING_STEPS,
            learning_rate=TUNING_RATE,
        )
        return {"params": params, **kept}

    def folded(self) -> Any:
        """Batch norms moved into the convolutions."""
        return jc.quant.fold_batch_norm(self.apply, self.net.variables, self.example)

    def equalized(self) -> Any:
        """Folded, and the channels of consecutive convolutions of one range."""
        return jc.quant.equalize(self.apply, self.folded(), self.example)


Rows = dict[tuple[str, str], Callable[[], Any]]


def rows_of(methods: Methods, bits: int) -> Rows:
    """Weights of `bits` and float activations: how to get the compressed variables."""
    rules = methods.rules(bits, search=SEARCH)
    rounded = functools.cache(lambda: methods.rounded(rules))
    rows: dict[str, Callable[[], Any]] = {
        "rounding": lambda: methods.rounded(methods.rules(bits)),
        "rounding, MSE range": rounded,
        "... bias corrected": lambda: methods.corrected(rounded()),
        "... norms recalibrated": lambda: methods.recalibrated(rounded()),
        "equalized, MSE range": lambda: methods.rounded(rules, methods.equalized()),
    }
    if bits < 8:
        packed = functools.cache(
            lambda: methods.swept(jc.quant.gptq, rules, reference=True)
        )
        rows |= {
            "GPTQ, float targets": packed,
            "... and norms recalibrated": lambda: methods.recalibrated(packed()),
            "... and tuned": lambda: methods.tuned(packed()),
        }
    return {(f"W{bits}", method): get for method, get in rows.items()}


def rows_compared(methods: Methods, bits: int) -> Rows:
    """The other algorithms that sweep, as `rows_of`."""
    rules = methods.rules(bits, search=SEARCH)
    found: Rows = {}
    for name in ("GPTQ", "AdaRound", "AWQ"):
        algorithm = getattr(jc.quant, name.lower())
        found[f"W{bits}", name] = functools.partial(methods.swept, algorithm, rules)
    return found


def rows_with_activations(methods: Methods) -> Rows:
    """Static 8-bit activations."""
    eight = methods.rules(8, activations=True)
    four = methods.rules(4, activations=True, search=SEARCH)
    return {
        ("W8A8 static", "rounding"): lambda: methods.static(eight),
        ("W4A8 static", "rounding, MSE range"): lambda: methods.static(four),
        ("W4A8 static", "GPTQ, float targets"): lambda: methods.swept(
            jc.quant.gptq, four, reference=True
        ),
    }


def folding(net: Net, methods: Methods) -> dict[str, Any]:
    """Scores of the folded net, and how far its logits are from the float net's."""
    folded = methods.folded()
    logits = resnet.logits(net.apply, folded, net.images.x)
    gap = round(float(np.abs(logits - net.logits).max()), 8)
    return {**net.scores(folded, net.apply), "largest_logit_difference": gap}


def run(depth: int, bits: list[int], images: data.Images, options: Any) -> None:
    """The table of one net."""
    net = Net(depth, images, options.data_dir)
    methods = Methods(net, data.cifar10("train", options.data_dir).x)
    name = f"post_training_{depth}" + "_validation" * options.validate
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    rows = rows_with_activations(methods)
    for n in bits:
        rows |= rows_of(methods, n)
    for n in COMPARED if not options.quick else ():
        rows |= rows_compared(methods, n)
    if options.quick:
        rows = {row: get for row, get in rows.items() if row[1] in QUICK}
    if ("float", "") not in report:
        add(report, "float", "", net.scores(net.variables, net.apply))
        add(report, "float", "batch norm folded", folding(net, methods))
    for row, variables in rows.items():
        if row not in report:
            add(report, *row, net.scores(variables()))


def add(report: Report, grid: str, method: str, found: dict[str, Any]) -> None:
    """A row of these scores."""
    report.add(grid, method, "", found.pop("score"), **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--validate", action="store_true", help="not on the test part")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--quick", action="store_true", help="no sweeps, no tuning")
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    options = parser.parse_args()
    part = data.cifar10("train" if options.validate else "test", options.data_dir)
    if options.validate:
        part = data.Images(part.x[VALIDATION], part.y[VALIDATION])
    for depth in options.depth:
        run(depth, options.bits, part, options)


if __name__ == "__main__":
    main()
