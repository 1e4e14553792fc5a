"""ResNet-56 teaches ResNet-20s on CIFAR-10: smaller nets, and compressed ones.

`student` begins as blocks of the teacher, the first, the middle and the last of every
stage, and sees the training images shifted and mirrored. `pruned` and `2 bits` begin as
the pretrained ResNet-20 and lose most of their weights, or keep two bits of them, with
few images, as they are. Rows of a setting differ in the loss alone; what the teacher
says of the images is computed once.

    python -m experiments.distillation.resnet_run [--validate] [--resume]
        [--settings student pruned "2 bits"] [--methods plain "soft targets"]

Scores are percent of the 1,000 test images (`--validate`: of the last 1,000 of the
10,000 training images, which then train nothing). `--rate` tries another learning rate,
which then stands in the names of the rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.distillation import losses
from experiments.distillation.training import SEEDS, Seen, train
from experiments.models import resnet
from experiments.post_training.report import Report
from experiments.resnets.post_training import augmented

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 1000
TEACHER, STUDENT = 56, 20
BATCH, MOMENTUM, DECAY = 100, 0.9, 5e-4
SOFT = functools.partial(losses.soft, temperature=4.0)
LAST_MAPS = {56: "ResNet/layer3_8", 20: "ResNet/layer3_2"}
WEIGHTS = jc.where("layer*/**/kernel")
Method = Callable[[Seen], jax.Array]


def attention(seen: Seen) -> jax.Array:
    """Where the last maps are active, softened outputs, and the labels."""
    (student,), (teacher,) = seen.student_taps.values(), seen.teacher_taps.values()
    found = jc.distill.attention_transfer(student, teacher)
    return SOFT(seen) + 100.0 * found.mean()


METHODS: dict[str, Method] = {
    "plain": losses.labels_only,
    "soft targets": SOFT,
    "DIST": losses.correlations,
    "hints": losses.hints,
    "attention": attention,
}


class Setting(NamedTuple):
    """What is trained, and on what.

    Attributes:
      scheme: How the blocks' weights are compressed in a number of steps.
      methods: Names of the losses to compare.
      pretrained: Whether to begin as the pretrained ResNet-20.
      images: How many, from the first.
      epochs: Passes over them.
      noise: Whether every pass shifts and mirrors them anew.
      rate: Learning rate at the start.
    """

    scheme: Callable[[int], jc.Transform]
    methods: tuple[str, ...]
    pretrained: bool
    images: int
    epochs: int
    noise: bool
    rate: float


def pruning(steps: int) -> jc.Transform:
    """80 % of the weights of all blocks together."""
    rise = jc.schedules.cubic(0.3, 0.8, begin=0, end=steps // 2)
    return jc.prune.magnitude(sparsity=rise, scope="global", every=10)


compressed = functools.partial(
    Setting,
    methods=("plain", "soft targets"),
    pretrained=True,
    images=1000,
    epochs=6,
    noise=False,
    rate=0.01,
)
SETTINGS = {
    "student": Setting(
        scheme=lambda steps: jc.identity(),
        methods=tuple(METHODS),
        pretrained=False,
        images=5000,
        epochs=1,
        noise=True,
        rate=0.02,
    ),
    "pruned": compressed(scheme=pruning),
    "2 bits": compressed(scheme=lambda steps: jc.quant.lsq(jc.quant.int2())),
}


class Lessons(NamedTuple):
    """Images as the students see them, and what the teacher says of them.

    Attributes:
      x: ``uint8[n, 32, 32, 3]``.
      y: ``int32[n]``.
      logits: ``float32[n, 10]``.
      maps: ``float32[n, 8, 8, 64]``, the last ones.
    """

    x: np.ndarray
    y: np.ndarray
    logits: np.ndarray
    maps: np.ndarray


def taught(images: data.Images, root: Path | None) -> Lessons:
    """Images through the teacher."""
    model, variables = resnet.load(TEACHER, root=root)
    ask = jax.jit(jc.distill.features(model.apply, LAST_MAPS[TEACHER]))
    parts = []
    for part in np.split(images.x, len(images.x) // BATCH):
        logits, taps = ask(variables, resnet.normalize(part))
        parts.append((logits, *taps.values()))
    return Lessons(*images, *(np.concatenate(p) for p in zip(*parts, strict=True)))


def passes(setting: Setting, images: data.Images, root: Path | None) -> list[Lessons]:
    """What every epoch of a setting shows; one for all where all are alike."""
    images = data.Images(images.x[: setting.images], images.y[: setting.images])
    if not setting.noise:
        return [taught(images, root)] * setting.epochs
    rng = np.random.default_rng(0)
    shown = (augmented(images.x, rng) for _ in range(setting.epochs))
    return [taught(data.Images(x, images.y), root) for x in shown]


def batches(epochs: list[Lessons], seed: int) -> Iterator[Any]:
    """Shuffled in every epoch."""
    rng = np.random.default_rng(seed)
    for lessons in epochs:
        order = rng.permutation(len(lessons.y))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            x, y, logits, maps = (a[order[start : start + BATCH]] for a in lessons)
            yield resnet.normalize(x), y, (logits, maps)


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
    variables: Any, setting: Setting, epochs: list[Lessons], seed: int, method: Method
) -> Any:
    """Variables of a ResNet-20 after training, its params stored."""
    model = resnet.ResNet(STUDENT)
    run = jc.lift(jc.distill.features(model.apply, LAST_MAPS[STUDENT]))
    params, stats = variables["params"], variables["batch_stats"]
    steps = sum(len(lessons.y) // BATCH for lessons in epochs)

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
        optax.sgd(optax.cosine_decay_schedule(setting.rate, steps), MOMENTUM),
    )
    axes = jc.trace_axes(
        lambda params, x: model.apply({"params": params, "batch_stats": stats}, x),
        params,
        resnet.normalize(epochs[0].x[:1]),
    )
    params, stats = train(
        params,
        loss,
        batches(epochs, seed),
        tx,
        steps=steps,
        aux=stats,
        scheme=jc.select({WEIGHTS: setting.scheme(steps)}, axes=axes),
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rate", type=float)
    options = parser.parse_args()
    name = "resnet_validation" if options.validate else "resnet"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.cifar10(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    apply = jc.lift(resnet.ResNet(STUDENT).apply)
    for which in options.settings:
        setting = SETTINGS[which]
        label = ""
        if options.rate is not None:
            setting = setting._replace(rate=options.rate)
            label = f", rate {options.rate:g}"
        methods = [m for m in setting.methods if m in options.methods]
        epochs = passes(setting, images, options.data_dir)
        start = blocks_of_the_teacher(options.data_dir)
        if setting.pretrained:
            _, start = resnet.load(STUDENT, root=options.data_dir)
        for seed, method in ((s, m) for s in options.seeds for m in methods):
            if (which, row := f"{method}{label}, seed {seed}") in report:
                continue
            found = fit(start, setting, epochs, seed, METHODS[method])
            logits = resnet.logits(apply, found, test.x)
            score = 100 * float((logits.argmax(-1) == test.y).mean())
            report.add(which, row, "", round(score, 2))
        report.add_means(which)


if __name__ == "__main__":
    main()
