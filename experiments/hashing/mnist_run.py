"""HashedNets on MNIST: 1000 hidden units a layer in the space of an 8th or a 64th.

Nets of 3 layers (784-1000-10) and 5 (784-1000-1000-1000-10) whose kernels are hashed,
each to its share of the budget, beside others with as many weights: dense nets of fewer
units, products of thin kernels, and kernels of which few entries, chosen at random, are
trained. All of them from labels alone, and from the outputs of a dense net as well.
Biases are not compressed.

    python -m experiments.hashing.mnist_run [--validate] [--resume] [--layers 3 5]
        [--ratios 8 64] [--methods hashed] [--seeds 0 1 2]

Scores are percent of errors on the 10,000 test images. `--validate` trains on 50,000
images and scores the other 10,000 of the training set: settings are chosen so, by
`--dropout` and the like, which belong to a try and stand in the name of its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation.training import SEEDS, train
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
HELD_OUT, BATCH, PIXELS, UNITS, CLASSES = 10_000, 250, 784, 1000, 10
TEMPERATURE, ALPHA = 4.0, 0.7
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
    """

    epochs: int = 40
    learning_rate: float = 2e-3
    input_dropout: float = 0.1
    dropout: float = 0.25
    decay: float = 1e-4


TEACHER = Settings(epochs=30, learning_rate=1e-3, input_dropout=0.2, dropout=0.5)
SETTINGS = {
    (3, 8): Settings(input_dropout=0.2, dropout=0.4),
    (3, 64): Settings(epochs=60, learning_rate=4e-3, input_dropout=0.0, dropout=0.1),
    (5, 8): Settings(input_dropout=0.2, dropout=0.4),
    (5, 64): Settings(epochs=40, learning_rate=2e-3, input_dropout=0.1, dropout=0.2),
}
"""By layers and ratio; a net that has as few weights otherwise is given the same."""


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
    """Logits of ``uint8[batch, 784]``; with a key, entries are dropped."""
    x = x.astype(jnp.float32) / 255.0
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
            thin = [[a, max(1, round(a * b / ratio / (a + b))), b] for a, b in full]
            return init(key, thin), None
        case "random edges":
            scheme = jc.prune.random(sparsity=1 - 1 / ratio, key=own)
            # Each unit has so many times fewer inputs.
            wide = lambda a: a * ratio**0.5 if a.ndim > 1 else a
            return jax.tree.map(wide, init(key, full)), jc.select({kernels: scheme})
    raise ValueError(f"compressed: method must be one of {METHODS}; got {method!r}.")


def batches(images: data.Images, said: Any, epochs: int, seed: int) -> Iterator[Any]:
    """Images, labels and what the teacher says; shuffled anew for every epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images.x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jax.tree.map(lambda a, at=chosen: a[at], (*images, said))


def fit(
    layers: Layers,
    scheme: jc.Transform | None,
    images: data.Images,
    settings: Settings,
    seed: int,
    said: Any = None,
) -> Any:
    """The net as it is stored, after training.

    A step looks every hashed kernel up once: on a CPU faster than the kernel that makes
    it again for the gradients.
    """
    scheme = scheme or jc.identity()
    params, state = scheme.init(layers)
    steps = settings.epochs * (len(images.x) // BATCH)
    key = jax.random.key(seed)

    def loss(params: Any, aux: Any, batch: Any, i: jax.Array) -> tuple[jax.Array, Any]:
        x, labels, said = batch
        dense = jc.materialize(scheme.view(params, state))
        logits = forward(dense, x, settings, jax.random.fold_in(key, i))
        if said is not None:
            found = jc.distill.mix(
                logits, said, labels, temperature=TEMPERATURE, alpha=ALPHA
            )
        else:
            found = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return found.mean(), aux

    tx = optax.adamw(
        optax.cosine_decay_schedule(settings.learning_rate, steps),
        weight_decay=settings.decay,
        mask=jc.weight_decay_mask(params),
    )
    shown = batches(images, said, settings.epochs, seed)
    params, _ = train(params, loss, shown, tx, steps=steps)
    return scheme.compress(params, state)


def logits_of(layers: Any, images: data.Images) -> np.ndarray:
    """Of all images, by the net as it is stored."""
    run = jax.jit(jc.lift(lambda p, x: forward(p, x, TEACHER)))
    parts = np.array_split(images.x, max(1, len(images.x) // 1000))
    return np.concatenate([run(layers, part) for part in parts])


def percent_wrong(layers: Any, images: data.Images) -> float:
    """Of images that get another class."""
    return 100.0 * float((logits_of(layers, images).argmax(-1) != images.y).mean())


def load(options: argparse.Namespace) -> tuple[data.Images, data.Images]:
    """Images to train on, and to score."""
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    images, test = (data.Images(i.x.reshape(-1, PIXELS), i.y) for i in (images, test))
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
    parser.add_argument("--labels-only", action="store_true", help="no distillation")
    parser.add_argument("--images", type=int, help="train on the first so many")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int if field.name == "epochs" else float)
    return parser.parse_args()


def main() -> None:
    """A dense teacher for each depth; then every method, ratio and seed."""
    options = arguments()
    images, test = load(options)
    name = "mnist_validation" if options.validate else "mnist"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)}
    tried = {k: v for k, v in given.items() if v is not None}
    label = "".join(f", {k} {v:g}" for k, v in tried.items())
    for depth in options.layers:
        said = None
        if not options.labels_only:
            first = init(jax.random.key(100), [list(p) for p in pairs(widths(depth))])
            own = TEACHER
            if options.epochs:
                own = dataclasses.replace(own, epochs=options.epochs)
            teacher = fit(first, None, images, own, 100)
            if (f"{depth} layers", "teacher") not in report:
                wrong = percent_wrong(teacher, test)
                report.add(f"{depth} layers", "teacher", "", wrong)
            said = logits_of(teacher, images)
        for ratio in options.ratios:
            run_all(report, options, (depth, ratio), images, test, said, tried, label)


def run_all(
    report: Report,
    options: argparse.Namespace,
    size: tuple[int, int],
    images: data.Images,
    test: data.Images,
    said: Any,
    tried: dict[str, Any],
    label: str,
) -> None:
    """Every method and seed of a depth and ratio, with and without the teacher."""
    model = f"{size[0]} layers, 1/{size[1]}"
    base = SETTINGS.get(size, Settings())
    settings = dataclasses.replace(base, **tried)
    lessons = {"": None} | ({} if said is None else {" distilled": said})
    for method, (how, lesson) in itertools.product(options.methods, lessons.items()):
        kind = f"{method}{how}{label}"
        for seed in options.seeds:
            row = f"{kind}, seed {seed}"
            if (model, row) in report:
                continue
            first, scheme = compressed(method, *size, seed)
            packed = fit(first, scheme, images, settings, seed, lesson)
            note = f"published {PUBLISHED.get(size, {}).get(method, math.nan)}"
            kept = {f"{budget(*size)} weights wanted": weights_of(packed)}
            report.add(model, row, note, percent_wrong(packed, test), **kept)
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
