"""Hinton's experiment: a 1200-1200 net teaches an 800-800 net MNIST.

The teacher is trained with dropout and images shifted by up to two pixels. Students see
the images as they are; those that are `regularized` see them shifted, with dropout. One
never sees a three, and then has its bias of three raised until threes are as frequent
as they should be.

    python -m experiments.distillation.mnist_run [--validate] [--resume] [--seeds 0 1 2]
        [--tables student regularized "no threes"] [--methods plain]

Scores are errors on the 10,000 test images. `--validate` trains on 55,000 images and
scores the other 5,000 of the training set; settings are chosen so, by `--epochs`,
`--dropout` and `--input-dropout`, which stand in the names of the rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation.training import SEEDS, Seen, add_means, train
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
HELD_OUT, BATCH, LEARNING_RATE, LEFT_OUT = 5000, 250, 1e-3, 3
TEACHER, STUDENT = 1200, 800
TEMPERATURE = 20.0
HIDDEN = "Net/hidden_2"


class Regime(NamedTuple):
    """How a net is trained.

    Attributes:
      epochs: Passes over the images.
      input_dropout: Fraction of pixels left out.
      dropout: Fraction of hidden units left out.
      shift: Pixels that images are shifted by at most, each way.
    """

    epochs: int
    input_dropout: float = 0.0
    dropout: float = 0.0
    shift: int = 0


OF_THE_TEACHER = Regime(epochs=30, input_dropout=0.2, dropout=0.5, shift=2)
PLAIN = Regime(epochs=8)
REGULARIZED = Regime(epochs=12, dropout=0.2, shift=2)


class Net(nn.Module):
    """Two hidden layers of a width; in training, entries are dropped."""

    width: int
    regime: Regime = PLAIN

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``[batch, 10]`` of ``uint8[batch, 28, 28, 1]``."""
        drop = functools.partial(nn.Dropout, deterministic=not train)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32) / 255.0
        x = drop(self.regime.input_dropout)(x)
        for name in ("hidden_1", "hidden_2"):
            with jax.named_scope(name):
                x = nn.relu(nn.Dense(self.width, name=f"{name}_linear")(x))
            x = drop(self.regime.dropout)(x)
        return nn.Dense(10, name="logits")(x)


def jittered(x: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """Every image shifted by up to so many pixels each way."""
    pads = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * shift + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (28, 28, 1))
    return jax.vmap(cut)(jnp.pad(x, pads), starts)


def batches(images: data.Images, lessons: Any, epochs: int, seed: int) -> Iterator[Any]:
    """Images, labels and what the teacher says; shuffled anew for every epoch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images.x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jax.tree.map(lambda a, at=chosen: a[at], (*images, lessons))


def labels_only(seen: Seen) -> jax.Array:
    """Cross entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(seen.student, seen.labels)
    return losses.mean()


def soft(seen: Seen, temperature: float = TEMPERATURE) -> jax.Array:
    """Softened outputs, and the labels a little."""
    return jc.distill.mix(
        seen.student, seen.teacher, seen.labels, temperature=temperature, alpha=0.9
    ).mean()


def logit_mse(seen: Seen) -> jax.Array:
    """The teacher's logits, and the labels."""
    found = jc.distill.logit_mse(seen.student, seen.teacher).mean()
    return labels_only(seen) + found


def decoupled(seen: Seen) -> jax.Array:
    """The target class and the others apart, and the labels."""
    found = jc.distill.decoupled(
        seen.student, seen.teacher, seen.labels, temperature=4.0, alpha=1.0, beta=2.0
    )
    return labels_only(seen) + found.mean()


def hints(seen: Seen) -> jax.Array:
    """The teacher's second hidden layer from the student's, and the labels."""
    guess = PROJECTOR.apply(seen.projectors, seen.student_taps[HIDDEN])
    found = jc.distill.hint(guess, seen.teacher_taps[HIDDEN], normalize=True)
    return labels_only(seen) + found.mean()


def similarity(seen: Seen) -> jax.Array:
    """Which images are alike in the second hidden layer, and the labels."""
    found = jc.distill.similarity_preserving(
        seen.student_taps[HIDDEN], seen.teacher_taps[HIDDEN]
    )
    return labels_only(seen) + BATCH * found.mean()


PROJECTOR = jc.distill.linear_projector(STUDENT, TEACHER)
Method = Callable[[Seen], jax.Array]
METHODS: dict[str, Method] = {
    "plain": labels_only,
    "soft targets": soft,
    "soft targets, T = 4": functools.partial(soft, temperature=4.0),
    "logit MSE": logit_mse,
    "decoupled": decoupled,
    "hints": hints,
    "similarity": similarity,
}


def fit(
    net: Net,
    images: data.Images,
    seed: int,
    method: Method,
    teacher: Any = None,
    *,
    lessons: Any = None,
) -> Any:
    """Train a net by a method.

    A teacher is asked about every shifted image anew; what it says of the images as
    they are comes as `lessons`.
    """
    key, regime = jax.random.key(seed), net.regime
    steps = regime.epochs * (len(images.x) // BATCH)
    run = jc.distill.features(net.apply, HIDDEN)

    def loss(params: Any, aux: Any, batch: Any, i: jax.Array) -> tuple[jax.Array, Any]:
        x, labels, said = batch
        shift, drop = jax.random.split(jax.random.fold_in(key, i))
        shown = jittered(x, shift, regime.shift) if regime.shift else x
        logits, taps = run(params["net"], shown, train=True, rngs={"dropout": drop})
        if said is None:
            said = (logits, taps) if teacher is None else taught(teacher, shown)
        target, values = said
        seen = Seen(logits, target, labels, taps, values, params["projector"])
        return method(seen), aux

    params = {
        "net": jax.jit(net.init)(key, images.x[:1]),
        "projector": PROJECTOR.init(jax.random.split(key)[1]),
    }
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    shown = batches(images, lessons, regime.epochs, seed)
    return train(params, loss, shown, tx, steps=steps)[0]["net"]


taught = jc.distill.features(Net(TEACHER).apply, HIDDEN)
"""Logits of the teacher, and its second hidden layer."""


def lessons_of(teacher: Any, images: data.Images) -> Any:
    """What the teacher says of every image, asked once."""
    run = jax.jit(taught)
    cut = np.array_split(images.x, len(images.x) // 1000)
    parts = [run(teacher, part) for part in cut]
    return jax.tree.map(lambda *part: np.concatenate(part), *parts)


def predictions(net: Net, params: Any, images: data.Images) -> np.ndarray:
    """Logits of all images."""
    run = jax.jit(net.apply)
    parts = np.array_split(images.x, len(images.x) // 1000)
    return np.concatenate([run(params, part) for part in parts])


def wrong(logits: np.ndarray, labels: np.ndarray) -> int:
    """How many images get another class."""
    return int((logits.argmax(-1) != labels).sum())


def raised(logits: np.ndarray, count: int) -> np.ndarray:
    """Logits with the bias of the class left out raised until it is found so often."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        moved = logits + middle * (np.arange(10) == LEFT_OUT)
        often = (moved.argmax(-1) == LEFT_OUT).sum() > count
        low, high = (low, middle) if often else (middle, high)
    return logits + high * (np.arange(10) == LEFT_OUT)


class Table(NamedTuple):
    """Students of one kind.

    Attributes:
      methods: Names of those to compare.
      regime: How they are trained.
      sees: Which images they see, or None for all.
      told: Whether what the teacher says is computed once.
    """

    methods: tuple[str, ...]
    regime: Regime
    sees: Callable[[np.ndarray], np.ndarray] | None = None
    told: bool = True


TABLES = {
    "student": Table(tuple(METHODS), PLAIN),
    "regularized": Table(tuple(METHODS), REGULARIZED, told=False),
    "no threes": Table(("soft targets",), PLAIN, lambda labels: labels != LEFT_OUT),
}


def after_bias(logits: np.ndarray, test: data.Images, share: float) -> dict[str, Any]:
    """Errors once the class left out is found as often as it should be."""
    found = raised(logits, int(share * len(test.y)))
    right = (found.argmax(-1) == LEFT_OUT)[test.y == LEFT_OUT]
    return {
        "wrong_after_bias": wrong(found, test.y),
        "threes_right": round(float(right.mean()), 4),
    }


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--teacher", type=Path, help="a file to keep the teacher in")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--input-dropout", type=float)
    return parser.parse_args()


def teacher_of(images: data.Images, path: Path | None) -> Any:
    """The teacher, from its file if there is one."""
    if path and path.exists():
        return jc.io.load(path)
    teacher = fit(Net(TEACHER, OF_THE_TEACHER), images, 0, labels_only)
    if path:
        jc.io.save(path, teacher)
    return teacher


def main() -> None:
    """The teacher, then every student."""
    options = arguments()
    name = "mnist_validation" if options.validate else "mnist"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    teacher = teacher_of(images, options.teacher)
    if ("teacher", "plain") not in report:
        found = wrong(predictions(Net(TEACHER), teacher, test), test.y)
        report.add("teacher", "plain", "", found)
    lessons = lessons_of(teacher, images)
    given = {name: getattr(options, name) for name in Regime._fields[:3]}
    tried = {name: value for name, value in given.items() if value is not None}
    label = "".join(f", {name} {value:g}" for name, value in tried.items())
    for which in options.tables:
        table = TABLES[which]
        shown, said = images, lessons
        if table.sees is not None:
            chosen = table.sees(images.y)
            shown, said = jax.tree.map(lambda a, at=chosen: a[at], (images, lessons))
        net = Net(STUDENT, table.regime._replace(**tried))
        methods = [m for m in table.methods if m in options.methods]
        for method, seed in ((m, s) for m in methods for s in options.seeds):
            if (which, row := f"{method}{label}, seed {seed}") in report:
                continue
            known = said if table.told else None
            params = fit(net, shown, seed, METHODS[method], teacher, lessons=known)
            logits = predictions(net, params, test)
            share = float((images.y == LEFT_OUT).mean())
            more = {} if table.sees is None else after_bias(logits, test, share)
            report.add(which, row, "", wrong(logits, test.y), **more)
        add_means(report, which, [f"{method}{label}" for method in methods])


if __name__ == "__main__":
    main()
