"""Hinton's experiment: a 1200-1200 net teaches an 800-800 net MNIST.

The teacher is trained with dropout and images shifted by up to two pixels. Students see
the images as they are, but for two that are trained as the teacher is; one never sees a
three, and one of those has its bias of three raised until threes are as frequent as
they should be.

    python -m experiments.distillation.mnist_run [--validate] [--resume] [--seeds 0 1 2]

Scores are errors on the 10,000 test images. `--validate` trains on 55,000 images and
scores the other 5,000 of the training set.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
HELD_OUT, BATCH, SHIFT, LEFT_OUT = 5000, 250, 2, 3
TEACHER, STUDENT = 1200, 800
TEACHER_EPOCHS, EPOCHS, LEARNING_RATE = 30, 8, 1e-3
INPUT_DROPOUT, DROPOUT = 0.2, 0.5
TEMPERATURE = 20.0
HIDDEN = "Net/hidden_2"


class Net(nn.Module):
    """Two hidden layers of a width."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``[batch, 10]`` of ``uint8[batch, 28, 28, 1]``."""
        drop = functools.partial(nn.Dropout, deterministic=not train)
        x = x.reshape(x.shape[0], -1).astype(jnp.float32) / 255.0
        x = drop(INPUT_DROPOUT)(x)
        for name in ("hidden_1", "hidden_2"):
            with jax.named_scope(name):
                x = nn.relu(nn.Dense(self.width, name=f"{name}_linear")(x))
            x = drop(DROPOUT)(x)
        return nn.Dense(10, name="logits")(x)


def jittered(x: jax.Array, key: jax.Array) -> jax.Array:
    """Every image shifted by up to two pixels each way."""
    pads = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * SHIFT + 1)
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


def soft(seen: Seen, alpha: float = 0.9) -> jax.Array:
    """Softened outputs, and the labels a little."""
    return jc.distill.mix(
        seen.student, seen.teacher, seen.labels, temperature=TEMPERATURE, alpha=alpha
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
METHODS: dict[str, Callable[[Seen], jax.Array]] = {
    "plain": labels_only,
    "soft targets": soft,
    "logit MSE": logit_mse,
    "decoupled": decoupled,
    "hints": hints,
    "similarity": similarity,
}
REGULARIZED = {"plain": labels_only, "soft targets": soft}


def fit(
    net: Net,
    images: data.Images,
    epochs: int,
    seed: int,
    method: Callable[[Seen], jax.Array],
    teacher: Any = None,
    *,
    lessons: Any = None,
    regularized: bool = False,
) -> Any:
    """Train a net by a method; with dropout and shifted images if `regularized`.

    A teacher is asked about every shifted image anew; what it says of the images as
    they are comes as `lessons`.
    """
    key = jax.random.key(seed)
    steps = epochs * (len(images.x) // BATCH)
    run = jc.distill.features(net.apply, HIDDEN)

    def loss(params: Any, aux: Any, batch: Any, i: jax.Array) -> tuple[jax.Array, Any]:
        x, labels, said = batch
        shift, drop = jax.random.split(jax.random.fold_in(key, i))
        shown = jittered(x, shift) if regularized else x
        logits, taps = run(
            params["net"], shown, train=regularized, rngs={"dropout": drop}
        )
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
    data = batches(images, lessons, epochs, seed)
    return train(params, loss, data, tx, steps=steps)[0]["net"]


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


def main() -> None:
    """The teacher, then every student."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--teacher", type=Path, help="a file to keep the teacher in")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    name = "mnist_validation" if options.validate else "mnist"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    big, small = Net(TEACHER), Net(STUDENT)
    if options.teacher and options.teacher.exists():
        teacher = jc.io.load(options.teacher)
    else:
        teacher = fit(big, images, TEACHER_EPOCHS, 0, labels_only, regularized=True)
        if options.teacher:
            jc.io.save(options.teacher, teacher)
    if ("teacher", "plain") not in report:
        report.add(
            "teacher", "plain", "", wrong(predictions(big, teacher, test), test.y)
        )
    seen = images.y != LEFT_OUT
    without = data.Images(images.x[seen], images.y[seen])
    lessons = lessons_of(teacher, images)
    of_those = jax.tree.map(lambda a: a[seen], lessons)
    tables: dict[str, tuple[dict[str, Any], data.Images, Any, bool]] = {
        "student": (METHODS, images, lessons, False),
        "regularized": (REGULARIZED, images, None, True),
        "no threes": ({"soft targets": soft}, without, of_those, False),
    }
    for which, (methods, shown, said, regularized) in tables.items():
        for method, seed in ((m, s) for m in methods for s in options.seeds):
            row = f"{method}, seed {seed}"
            if (which, row) in report:
                continue
            params = fit(
                small,
                shown,
                EPOCHS,
                seed,
                methods[method],
                teacher,
                lessons=said,
                regularized=regularized,
            )
            logits = predictions(small, params, test)
            more = {}
            if which == "no threes":
                threes = test.y == LEFT_OUT
                found = raised(logits, int((images.y == LEFT_OUT).mean() * len(test.y)))
                more = {
                    "wrong_after_bias": wrong(found, test.y),
                    "threes_right": float(
                        (found.argmax(-1) == LEFT_OUT)[threes].mean()
                    ),
                }
            report.add(which, row, "", wrong(logits, test.y), **more)
        add_means(report, which, methods)


if __name__ == "__main__":
    main()
