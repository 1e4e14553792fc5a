"""Hinton's experiment: a 1200-1200 net teaches an 800-800 net MNIST.

The teacher is trained with dropout and images shifted by up to two pixels. Students see
the images as they are; others are trained with dropout as well and taught by three such
teachers, and those that are `regularized` also see the images shifted. One never sees a
three, and then has its bias of three raised until threes are as frequent as they should
be.

    python -m experiments.distillation.mnist_run [--validate] [--resume] [--seeds 0 1 2]
        [--tables student dropout regularized "no threes"] [--methods plain]

Scores are errors on the 10,000 test images. `--validate` trains on 55,000 images and
scores the other 5,000 of the training set; settings are chosen so, those of the teacher
by `--tables teacher`, by `--epochs`, `--dropout`, `--input-dropout` and `--teachers`,
which stand in the names of the rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation import losses
from experiments.distillation.training import SEEDS, Seen, train
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
HELD_OUT, BATCH, LEARNING_RATE, LEFT_OUT = 5000, 250, 1e-3, 3
TEACHER, STUDENT = 1200, 800
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


OF_THE_TEACHER = Regime(epochs=30, input_dropout=0.1, dropout=0.35, shift=2)
PLAIN = Regime(epochs=8)
DROPPED = Regime(epochs=12, dropout=0.2)
REGULARIZED = DROPPED._replace(shift=2)


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


class Epoch(NamedTuple):
    """What a student sees in a pass over the images.

    Attributes:
      x: ``uint8[n, 28, 28, 1]``.
      y: ``int32[n]``.
      logits: ``float32[n, 10]`` of the teacher, or None.
      taps: Its second hidden layer by name, ``float32[n, 1200]``, if kept.
    """

    x: Any
    y: Any
    logits: Any = None
    taps: Any = None


def batches(epochs: Sequence[Epoch], seed: int) -> Iterator[Epoch]:
    """Parts of every epoch, shuffled."""
    rng = np.random.default_rng(seed)
    for epoch in epochs:
        order = rng.permutation(len(epoch.x))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jax.tree.map(lambda a, at=chosen: a[at], epoch)


def similarity(seen: Seen) -> jax.Array:
    """Which images are alike in the second hidden layer, and the labels."""
    found = jc.distill.similarity_preserving(
        seen.student_taps[HIDDEN], seen.teacher_taps[HIDDEN]
    )
    return losses.labels_only(seen) + BATCH * found.mean()


PROJECTOR = jc.distill.linear_projector(STUDENT, TEACHER)
Method = Callable[[Seen], jax.Array]
METHODS: dict[str, Method] = {
    "plain": losses.labels_only,
    "soft targets": functools.partial(losses.soft, temperature=20.0),
    "soft targets, T = 4": functools.partial(losses.soft, temperature=4.0),
    "logit MSE": losses.logit_mse,
    "decoupled": functools.partial(losses.decoupled, temperature=4.0, beta=2.0),
    "DIST": losses.correlations,
    "hints": functools.partial(losses.hints, projector=PROJECTOR),
    "similarity": similarity,
}
OUTPUTS = ("plain", "soft targets, T = 4", "logit MSE", "decoupled", "DIST")
"""Methods that need the teacher's logits alone."""


def fit(net: Net, epochs: Sequence[Epoch], seed: int, method: Method) -> Any:
    """Train a net by a method; images are shifted as its regime says."""
    key, shift = jax.random.key(seed), net.regime.shift
    steps = sum(len(epoch.x) // BATCH for epoch in epochs)
    run = jc.distill.features(net.apply, HIDDEN)

    def loss(params: Any, aux: Any, batch: Epoch, i: jax.Array) -> Any:
        moved, drop = jax.random.split(jax.random.fold_in(key, i))
        x = jittered(batch.x, moved, shift) if shift else batch.x
        logits, taps = run(params["net"], x, train=True, rngs={"dropout": drop})
        seen = Seen(
            logits, batch.logits, batch.y, taps, batch.taps, params["projector"]
        )
        return method(seen), aux

    params = {
        "net": jax.jit(net.init)(key, epochs[0].x[:1]),
        "projector": PROJECTOR.init(jax.random.split(key)[1]),
    }
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    return train(params, loss, batches(epochs, seed), tx, steps=steps)[0]["net"]


@jax.jit
def said_by(teachers: Sequence[Any], x: jax.Array) -> tuple[jax.Array, Any]:
    """Mean logits of the teachers; the second hidden layer of one that is alone."""
    ask: Any = jc.distill.features(Net(TEACHER).apply, HIDDEN)
    found = [ask(teacher, x) for teacher in teachers]
    logits = jc.distill.average([logits for logits, _ in found])
    return logits, found[0][1] if len(found) == 1 else None


def taught(teachers: Sequence[Any], x: np.ndarray, y: np.ndarray) -> Epoch:
    """Images with what the teachers say of them."""
    parts = [said_by(teachers, part) for part in np.array_split(x, len(x) // 1000)]
    join = lambda *part: np.concatenate(part)
    return Epoch(x, y, *jax.tree.map(join, *parts))


def epochs_of(
    images: data.Images, regime: Regime, teachers: Sequence[Any]
) -> tuple[list[Epoch], Regime]:
    """All epochs of a net, and what is left of its regime.

    Where teachers are asked, images are shifted anew for every epoch, not for every
    net.
    """
    if not teachers:
        return [Epoch(*images)] * regime.epochs, regime
    if not regime.shift:
        return [taught(teachers, *images)] * regime.epochs, regime
    move = jax.jit(jittered, static_argnums=2)
    keys = jax.random.split(jax.random.key(0), regime.epochs)
    moved = (np.asarray(move(images.x, key, regime.shift)) for key in keys)
    epochs = [taught(teachers, x, images.y) for x in moved]
    return epochs, regime._replace(shift=0)


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
    """Nets of one kind.

    Attributes:
      methods: Names of those to compare.
      regime: How they are trained.
      teachers: How many teach them.
      sees: Which images they see, or None for all.
      width: Of their hidden layers.
    """

    methods: tuple[str, ...]
    regime: Regime
    teachers: int = 1
    sees: Callable[[np.ndarray], np.ndarray] | None = None
    width: int = STUDENT


TABLES = {
    "teacher": Table(("plain",), OF_THE_TEACHER, teachers=0, width=TEACHER),
    "student": Table(tuple(METHODS), PLAIN),
    "dropout": Table(OUTPUTS, DROPPED, teachers=3),
    "regularized": Table(OUTPUTS, REGULARIZED, teachers=3),
    "no threes": Table(
        ("soft targets",), PLAIN, sees=lambda labels: labels != LEFT_OUT
    ),
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
    parser.add_argument("--teacher", type=Path, help="a file to keep teachers in")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES)[1:])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--input-dropout", type=float)
    parser.add_argument("--teachers", type=int, help="how many teach")
    return parser.parse_args()


def teachers_of(images: data.Images, count: int, path: Path | None) -> list[Any]:
    """Teachers of different seeds; those that a file has are not trained again."""
    found = jc.io.load(path) if path and path.exists() else []
    epochs, regime = epochs_of(images, OF_THE_TEACHER, [])
    while len(found) < count:
        found.append(fit(Net(TEACHER, regime), epochs, len(found), losses.labels_only))
        if path:
            jc.io.save(path, found, overwrite=True)
    return found[:count]


def run_table(
    report: Report,
    which: str,
    images: data.Images,
    test: data.Images,
    options: argparse.Namespace,
) -> None:
    """Every method and seed of a table; a row for its teachers."""
    given = {name: getattr(options, name) for name in (*Regime._fields[:3], "teachers")}
    tried = {name: value for name, value in given.items() if value is not None}
    label = "".join(f", {name} {value:g}" for name, value in tried.items())
    table = TABLES[which]
    table = table._replace(teachers=tried.pop("teachers", table.teachers))
    teachers = teachers_of(images, table.teachers, options.teacher)
    if teachers and ("teacher", row := f"mean of {len(teachers)}") not in report:
        report.add("teacher", row, "", wrong(taught(teachers, *test).logits, test.y))
    share = float((images.y == LEFT_OUT).mean())
    if table.sees is not None:
        chosen = table.sees(images.y)
        images = data.Images(images.x[chosen], images.y[chosen])
    epochs, regime = epochs_of(images, table.regime._replace(**tried), teachers)
    net = Net(table.width, regime)
    methods = [m for m in table.methods if m in options.methods]
    for seed, method in ((s, m) for s in options.seeds for m in methods):
        if (which, row := f"{method}{label}, seed {seed}") in report:
            continue
        logits = predictions(net, fit(net, epochs, seed, METHODS[method]), test)
        more = {} if table.sees is None else after_bias(logits, test, share)
        report.add(which, row, "", wrong(logits, test.y), **more)
    report.add_means(which)


def main() -> None:
    """Every table."""
    options = arguments()
    name = "mnist_validation" if options.validate else "mnist"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    for which in options.tables:
        run_table(report, which, images, test, options)


if __name__ == "__main__":
    main()
