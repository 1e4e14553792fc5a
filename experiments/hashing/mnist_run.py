"""HashedNets on MNIST: 1000 hidden units a layer in the space of an 8th or a 64th.

Nets of 3 layers (784-1000-10) and 5 (784-1000-1000-1000-10) whose kernels are hashed,
each to its share of the budget, beside others with as many weights: dense nets of fewer
units, products of thin kernels, and kernels of which few entries, chosen at random, are
trained. All of them from labels alone; hashed nets also from what the teacher of
`experiments.distillation.mnist_run` says. Biases are not compressed.

    python -m experiments.hashing.mnist_run [--validate] [--resume] [--layers 3 5]
        [--ratios 8 64] [--methods hashed] [--lessons labels teacher] [--seeds 0 1 2]

Scores are percent of errors on the 10,000 test images. `--validate` trains on 55,000
images and scores the other 5,000 of the training set: settings are chosen so, by
`--dropout` and the like, which belong to a try and stand in the name of its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation import losses, mnist_run
from experiments.distillation.mnist_run import HELD_OUT, wrong
from experiments.distillation.training import SEEDS, Seen, train
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
BATCH, PIXELS, UNITS, CLASSES = 250, 784, 1000, 10
PUBLISHED = {
    (3, 8): {"hashed": 1.45, "dense": 1.69, "low rank": 1.89, "random edges": 2.19},
    (3, 64): {"hashed": 2.79, "dense": 6.28, "low rank": 28.99, "random edges": 15.03},
    (5, 8): {"hashed": 1.22, "dense": 1.35, "low rank": 1.77, "random edges": 1.24},
    (5, 64): {"hashed": 1.99, "dense": 2.69, "low rank": 28.11, "random edges": 3.20},
}
METHODS = ("hashed", "dense", "low rank", "random edges")
Layers = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a net is trained.

    Attributes:
      epochs: Passes over the images.
      learning_rate: Of AdamW at the start; it falls to zero as a cosine.
      input_dropout: Fraction of pixels left out.
      dropout: Fraction of hidden units left out.
      decay: Of AdamW, on kernels and buckets.
      temperature: Of the teacher's probabilities; None for its logits themselves.
    """

    epochs: int = 40
    learning_rate: float = 2e-3
    input_dropout: float = 0.1
    dropout: float = 0.25
    decay: float = 1e-4
    temperature: float | None = None


SETTINGS = {
    "labels": {
        (3, 8): Settings(input_dropout=0.2, dropout=0.4),
        (3, 64): Settings(60, 4e-3, input_dropout=0.0, dropout=0.1),
        (5, 8): Settings(input_dropout=0.2, dropout=0.25),
        (5, 64): Settings(input_dropout=0.1, dropout=0.2),
    },
    "teacher": {
        (3, 8): Settings(input_dropout=0.0, dropout=0.0),
        (3, 64): Settings(60, 4e-3, input_dropout=0.0, dropout=0.0, temperature=4.0),
        (5, 8): Settings(input_dropout=0.0, dropout=0.0),
        (5, 64): Settings(input_dropout=0.0, dropout=0.0, temperature=4.0),
    },
}
"""By lesson, layers and ratio; a net with as few weights otherwise has the same."""


def widths(layers: int, units: int = UNITS) -> list[int]:
    """Units of every layer, the input's and the output's included."""
    return [PIXELS, *[units] * (layers - 2), CLASSES]


def pairs(sizes: list[int]) -> list[tuple[int, int]]:
    """Inputs and outputs of every kernel."""
    return list(itertools.pairwise(sizes))


def budget(layers: int, ratio: int) -> int:
    """Weights of the compressed net."""
    return sum(a * b for a, b in pairs(widths(layers))) // ratio


def dense_units(layers: int, ratio: int) -> int:
    """Hidden units of the dense net that has as many weights, at least."""
    count = lambda units: sum(a * b for a, b in pairs(widths(layers, units)))
    wanted = budget(layers, ratio)
    return next(u for u in range(1, UNITS + 1) if count(u) >= wanted)


def common_rank(layers: int, ratio: int) -> int:
    """The highest rank that all kernels can have; one that is smaller whole stays so.

    A rank for each kernel by its own size would leave 1 for that of the ten classes.
    """
    count = lambda rank: sum(
        min(rank * (a + b), a * b) for a, b in pairs(widths(layers))
    )
    return max(r for r in range(1, UNITS) if count(r) <= budget(layers, ratio))


def init(key: jax.Array, sizes: list[list[int]]) -> Layers:
    """Kernels by He et al., those of a product with their share of the variance.

    Args:
      key: Decides the entries.
      sizes: For each layer its width, and the widths between its kernels, and so on to
        the outputs.
    """
    layers: Layers = []
    for i, chain in enumerate(sizes):
        gain = (2.0 if i < len(sizes) - 1 else 1.0) ** (0.5 / (len(chain) - 1))
        kernels = []
        for j, (a, b) in enumerate(pairs(chain)):
            own = jax.random.fold_in(jax.random.fold_in(key, i), j)
            kernels.append(gain * a**-0.5 * jax.random.normal(own, (a, b)))
        layers.append({"kernels": kernels, "bias": jnp.zeros(chain[-1])})
    return layers


def forward(
    layers: Layers, x: jax.Array, settings: Settings, key: jax.Array | None = None
) -> jax.Array:
    """Logits of ``uint8[batch, 28, 28, 1]``; with a key, entries are dropped."""
    x = x.reshape(x.shape[0], -1).astype(jnp.float32) / 255.0
    for i, layer in enumerate(layers):
        if key is not None:
            rate = settings.dropout if i else settings.input_dropout
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, x.shape)
            x = jnp.where(kept, x / (1 - rate), 0.0)
        for kernel in layer["kernels"]:
            x = x @ kernel
        x = x + layer["bias"]
        x = jax.nn.relu(x) if i < len(layers) - 1 else x
    return x


def compressed(method: str, layers: int, ratio: int, seed: int) -> tuple[Any, Any]:
    """First layers of a net, and the transform they are trained under."""
    key, own = jax.random.split(jax.random.key(seed))
    full = [list(p) for p in pairs(widths(layers))]
    kernels = "*/kernels/*"
    match method:
        case "hashed":
            scheme = jc.hashing.hashed(ratio=float(ratio), key=own, seed=seed)
            return init(key, full), jc.select({kernels: scheme})
        case "dense":
            units = dense_units(layers, ratio)
            return init(key, [list(p) for p in pairs(widths(layers, units))]), None
        case "low rank":
            rank = common_rank(layers, ratio)
            thin = lambda a, b: [a, rank, b] if rank * (a + b) < a * b else [a, b]
            return init(key, [thin(*pair) for pair in full]), None
        case "random edges":
            scheme = jc.prune.random(sparsity=1 - 1 / ratio, key=own)
            # Each unit has so many times fewer inputs.
            wide = lambda a: a * ratio**0.5 if a.ndim > 1 else a
            return jax.tree.map(wide, init(key, full)), jc.select({kernels: scheme})
    raise ValueError(f"compressed: method must be one of {METHODS}; got {method!r}.")


def fit(
    layers: Layers,
    scheme: jc.Transform | None,
    seen: mnist_run.Epoch,
    settings: Settings,
    seed: int,
) -> Any:
    """The net as it is stored, after training; from a teacher's logits too, if any.

    A step looks every hashed kernel up once: on a CPU faster than the kernel that makes
    it again for the gradients.
    """
    scheme = scheme or jc.identity()
    params, state = scheme.init(layers)
    steps = settings.epochs * (len(seen.x) // BATCH)
    key = jax.random.key(seed)

    def lesson(found: Seen) -> jax.Array:
        if found.teacher is None:
            return losses.labels_only(found)
        if settings.temperature is None:
            return losses.logit_mse(found)
        return losses.soft(found, settings.temperature)

    def loss(params: Any, aux: Any, batch: Any, i: jax.Array) -> tuple[jax.Array, Any]:
        dense = jc.materialize(scheme.view(params, state))
        logits = forward(dense, batch.x, settings, jax.random.fold_in(key, i))
        return lesson(Seen(logits, batch.logits, batch.y)), aux

    tx = optax.adamw(
        optax.cosine_decay_schedule(settings.learning_rate, steps),
        weight_decay=settings.decay,
        mask=jc.weight_decay_mask(params),
    )
    shown = mnist_run.batches([seen] * settings.epochs, seed)
    params, _ = train(params, loss, shown, tx, steps=steps)
    return scheme.compress(params, state)


def percent_wrong(layers: Any, images: data.Images) -> float:
    """Of images that get another class, by the net as it is stored."""
    run = jax.jit(jc.lift(lambda p, x: forward(p, x, Settings())))
    parts = np.array_split(images.x, max(1, len(images.x) // 1000))
    logits = np.concatenate([run(layers, part) for part in parts])
    return 100.0 * wrong(logits, images.y) / len(images.y)


def load(options: argparse.Namespace) -> tuple[data.Images, data.Images]:
    """Images to train on, and to score."""
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    if options.images:
        images = data.Images(images.x[: options.images], images.y[: options.images])
    return images, test


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--layers", nargs="+", type=int, default=[3, 5], choices=(3, 5))
    parser.add_argument("--ratios", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--lessons", nargs="+", default=list(SETTINGS), choices=SETTINGS
    )
    parser.add_argument("--teacher", type=Path, help="a file to keep the teacher in")
    parser.add_argument("--images", type=int, help="train on the first so many")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int if field.name == "epochs" else float)
    return parser.parse_args()


def main() -> None:
    """A teacher; then every depth, ratio, method, lesson and seed."""
    options = arguments()
    images, test = load(options)
    name = "mnist_validation" if options.validate else "mnist"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    lessons = {"labels": mnist_run.Epoch(*images)}
    if "teacher" in options.lessons:
        teachers = mnist_run.teachers_of(images, 1, options.teacher)
        if ("teacher", "") not in report:
            found = wrong(mnist_run.taught(teachers, *test).logits, test.y)
            report.add("teacher", "", "", 100.0 * found / len(test.y))
        lessons["teacher"] = mnist_run.taught(teachers, *images)._replace(taps=None)
    for size in itertools.product(options.layers, options.ratios):
        run_all(report, options, size, lessons, test)


def run_all(
    report: Report,
    options: argparse.Namespace,
    size: tuple[int, int],
    lessons: dict[str, mnist_run.Epoch],
    test: data.Images,
) -> None:
    """Every method, lesson and seed of a depth and ratio."""
    model = "{} layers, 1/{}".format(*size)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    tried = {k: v for k, v in given.items() if v is not None}
    label = "".join(f", {k} {v:g}" for k, v in tried.items())
    kinds = itertools.product(options.methods, options.lessons, options.seeds)
    for method, lesson, seed in kinds:
        if lesson == "teacher" and method != "hashed":
            continue
        taught = " distilled" if lesson == "teacher" else ""
        if (model, row := f"{method}{taught}{label}, seed {seed}") in report:
            continue
        settings = dataclasses.replace(SETTINGS[lesson][size], **tried)
        first, scheme = compressed(method, *size, seed)
        packed = fit(first, scheme, lessons[lesson], settings, seed)
        report.add(
            model,
            row,
            f"published {PUBLISHED[size][method]}",
            percent_wrong(packed, test),
            weights=weights_of(packed),
            budget=budget(*size),
        )
    report.add_means(model)


def weights_of(layers: Any) -> int:
    """Values stored for all kernels: buckets, factors, entries that are kept."""

    def count(kernel: Any) -> int:
        if isinstance(kernel, jc.hashing.HashedArray):
            return kernel.buckets.size
        dense = jc.materialize(kernel)
        return int((dense != 0).sum())

    return sum(count(kernel) for layer in layers for kernel in layer["kernels"])


if __name__ == "__main__":
    main()
