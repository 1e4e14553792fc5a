"""ResNet-56 teaches ResNet-20s on CIFAR-10: smaller nets, and compressed ones.

`student` begins as blocks of the teacher: the first, the middle and the last of every
stage. `pruned` and `2 bits` begin as the pretrained ResNet-20 and lose 90 % of their
weights, or keep two bits of them, while they train. Rows of a setting differ in the
loss alone, and see the same shifted and mirrored images; what the teacher says of those
is computed once.

    python -m experiments.distillation.resnet_run [--validate] [--resume]

Scores are percent of the 1,000 test images (`--validate`: of the last 1,000 of the
10,000 training images, which then train nothing).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation.training import SEEDS, Seen, add_means, train
from experiments.models import resnet
from experiments.post_training.report import Report
from experiments.resnets.post_training import augmented

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 1000
TEACHER, STUDENT = 56, 20
BATCH, EPOCHS, LEARNING_RATE, MOMENTUM, DECAY = 100, 2, 0.05, 0.9, 5e-4
TEMPERATURE = 4.0
LAST_MAPS = {56: "ResNet/layer3_8", 20: "ResNet/layer3_2"}
WEIGHTS = jc.where("**/layer*/kernel")
Method = Callable[[Seen], jax.Array]


def labels_only(seen: Seen) -> jax.Array:
    """Cross entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(seen.student, seen.labels)
    return losses.mean()


def soft(seen: Seen) -> jax.Array:
    """Softened outputs, and the labels a little."""
    return jc.distill.mix(
        seen.student, seen.teacher, seen.labels, temperature=TEMPERATURE, alpha=0.9
    ).mean()


def correlations(seen: Seen) -> jax.Array:
    """DIST: correlations within an image and within a class, and the labels."""
    found = jc.distill.dist(seen.student, seen.teacher, temperature=TEMPERATURE)
    return labels_only(seen) + 2.0 * found.mean()


def hints(seen: Seen) -> jax.Array:
    """The teacher's last maps, which have as many channels, and the labels."""
    (student,), (teacher,) = seen.student_taps.values(), seen.teacher_taps.values()
    found = jc.distill.hint(student, teacher, normalize=True)
    return labels_only(seen) + found.mean()


def attention(seen: Seen) -> jax.Array:
    """Where the last maps are active, softened outputs, and the labels."""
    (student,), (teacher,) = seen.student_taps.values(), seen.teacher_taps.values()
    found = jc.distill.attention_transfer(student, teacher)
    return soft(seen) + 100.0 * found.mean()


METHODS: dict[str, Method] = {
    "plain": labels_only,
    "soft targets": soft,
    "DIST": correlations,
    "hints": hints,
    "attention": attention,
}


class Setting(NamedTuple):
    """What is trained.

    Attributes:
      scheme: Of a number of steps.
      methods: Names of the losses to compare.
      pretrained: Whether to begin as the pretrained ResNet-20.
    """

    scheme: Callable[[int], jc.Transform]
    methods: tuple[str, ...]
    pretrained: bool


def pruning(steps: int) -> jc.Transform:
    """90 % of the weights of all blocks together."""
    rise = jc.schedules.cubic(0.3, 0.9, begin=0, end=steps // 2)
    magnitude = jc.prune.magnitude(sparsity=rise, scope="global", every=10)
    return jc.select({WEIGHTS: magnitude})


def two_bits(steps: int) -> jc.Transform:
    """Two bits with learned steps, a step for every output channel."""
    del steps
    return jc.select({WEIGHTS: jc.quant.lsq(jc.quant.int2())})


SETTINGS = {
    "student": Setting(lambda steps: jc.identity(), tuple(METHODS), False),
    "pruned": Setting(pruning, ("plain", "soft targets"), True),
    "2 bits": Setting(two_bits, ("plain", "soft targets"), True),
}


class Lessons(NamedTuple):
    """Images as the students see them, and what the teacher says of them.

    Attributes:
      x: ``uint8[epochs, n, 32, 32, 3]``, each epoch shifted and mirrored anew.
      y: ``int32[n]``.
      logits: ``float32[epochs, n, 10]``.
      maps: ``float32[epochs, n, 8, 8, 64]``, the last ones.
    """

    x: np.ndarray
    y: np.ndarray
    logits: np.ndarray
    maps: np.ndarray


def taught(images: data.Images, root: Path | None) -> Lessons:
    """Every epoch's images through the teacher."""
    rng = np.random.default_rng(0)
    x = np.stack([augmented(images.x, rng) for _ in range(EPOCHS)])
    model, variables = resnet.load(TEACHER, root=root)
    ask = jax.jit(jc.distill.features(model.apply, LAST_MAPS[TEACHER]))
    parts = []
    for part in np.split(x.reshape(-1, *x.shape[2:]), x.shape[0] * x.shape[1] // BATCH):
        logits, taps = ask(variables, resnet.normalize(part))
        parts.append((np.asarray(logits), np.asarray(*taps.values())))
    logits, maps = (
        np.concatenate(p).reshape(*x.shape[:2], *p[0].shape[1:])
        for p in zip(*parts, strict=True)
    )
    return Lessons(x, images.y, logits, maps)


def batches(lessons: Lessons, seed: int) -> Iterator[Any]:
    """Shuffled in every epoch."""
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        order = rng.permutation(len(lessons.y))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            images = resnet.normalize(lessons.x[epoch, chosen])
            said = (lessons.logits[epoch, chosen], lessons.maps[epoch, chosen])
            yield images, lessons.y[chosen], said


def blocks_of_the_teacher(root: Path | None) -> Any:
    """A ResNet-20 from the first, the middle and the last block of every stage."""
    _, variables = resnet.load(TEACHER, root=root)
    depth = lambda layers: (layers - 2) // 6
    chosen = jc.distill.layer_map(depth(STUDENT), depth(TEACHER), kind="spaced")
    for collection in variables:
        for stage in (1, 2, 3):
            path = f"{collection}/layer{stage}_{{}}"
            variables = jc.distill.take_layers(variables, path, chosen)
    return variables


def fit(
    variables: Any, scheme: jc.Transform, lessons: Lessons, seed: int, method: Method
) -> Any:
    """Variables of a ResNet-20 after training, its params stored."""
    model = resnet.ResNet(STUDENT)
    run = jc.distill.features(jc.lift(model.apply), LAST_MAPS[STUDENT])
    steps = EPOCHS * (len(lessons.y) // BATCH)

    def loss(
        params: Any, stats: Any, batch: Any, i: jax.Array
    ) -> tuple[jax.Array, Any]:
        x, labels, (logits, maps) = batch
        del i
        whole = {"params": params, "batch_stats": stats}
        (found, seen), taps = run(whole, x, train=True, mutable=["batch_stats"])
        loss = method(Seen(found, logits, labels, taps, {"": maps}, None))
        return loss, seen["batch_stats"]

    tx = optax.chain(
        optax.add_decayed_weights(DECAY, jc.weight_decay_mask),
        optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), MOMENTUM),
    )
    params, stats = train(
        variables["params"],
        loss,
        batches(lessons, seed),
        tx,
        steps=steps,
        aux=variables["batch_stats"],
        scheme=scheme,
    )
    return {"params": params, "batch_stats": stats}


def main() -> None:
    """Every setting, method and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    options = parser.parse_args()
    name = "resnet_validation" if options.validate else "resnet"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.cifar10(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    lessons = taught(images, options.data_dir)
    apply = jc.lift(resnet.ResNet(STUDENT).apply)
    for which in options.settings:
        setting = SETTINGS[which]
        start = blocks_of_the_teacher(options.data_dir)
        if setting.pretrained:
            _, start = resnet.load(STUDENT, root=options.data_dir)
        scheme = setting.scheme(EPOCHS * (len(images.y) // BATCH))
        for seed in options.seeds:
            for method in setting.methods:
                if (which, row := f"{method}, seed {seed}") in report:
                    continue
                found = fit(start, scheme, lessons, seed, METHODS[method])
                logits = resnet.logits(apply, found, test.x)
                score = 100 * float((logits.argmax(-1) == test.y).mean())
                report.add(which, row, "", round(score, 2))
        add_means(report, which, setting.methods)


if __name__ == "__main__":
    main()
