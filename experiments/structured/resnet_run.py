"""ResNet-56 on CIFAR-10 with fewer channels, by the dependency graph of its trace.

Channels go by L1 norms of filters (every group the same fraction) or by group norms
(ranked together), until the net does 2.1 and 2.6 times fewer operations; then a few
epochs of fine-tuning on the 10,000 training images at hand, with labels alone or with
the float net's logits too.

    python -m experiments.structured.resnet_run [--validate] [--resume] [--epochs 6]

`--validate` trains on 9,000 of the images and scores the rest.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
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
from experiments.resnets.post_training import augmented

RESULTS = Path(__file__).parent / "results"
HELD_OUT = 1000
BATCH, LEARNING_RATE, MOMENTUM, DECAY = 100, 0.02, 0.9, 5e-4
TEMPERATURE = 4.0
SPEED_BATCH, SPEED_RUNS = 100, 15


class Method(NamedTuple):
    """How units are ranked."""

    importance: Any
    scope: Any
    round_to: int = 8


METHODS = {
    "L1": Method(jc.prune.filter_norm(order=1), "group"),
    "group norm": Method(jc.prune.group_norm(), "global"),
}
TARGETS = (2.1, 2.6)
GOALS = ("speed", "not tuned", "tuned", "tuned, distilled")


def epochs(
    x: np.ndarray, y: np.ndarray, count: int, seed: int
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Shuffled batches, each image shifted and mirrored anew."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            images = resnet.normalize(augmented(x[chosen], rng))
            yield jnp.asarray(images), jnp.asarray(y[chosen])


def fine_tune(
    fn: Any,
    variables: Any,
    batches: Iterator[tuple[jax.Array, jax.Array]],
    steps: int,
    teacher: Any,
) -> Any:
    """SGD with a cosine schedule; with a teacher, also towards its logits."""
    tx = optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), MOMENTUM),
    )

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array, target: Any) -> Any:
        run = functools.partial(fn, train=True, mutable=["batch_stats"])
        logits, seen = run({"params": params, "batch_stats": stats}, x)
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        if target is None:
            return hard, seen["batch_stats"]
        soft = jc.distill.soft_targets(logits, target, temperature=TEMPERATURE).mean()
        return 0.1 * hard + 0.9 * soft, seen["batch_stats"]

    @jax.jit
    def step(variables: Any, opt: Any, x: jax.Array, y: jax.Array) -> Any:
        params, stats = variables["params"], variables["batch_stats"]
        target = None if teacher is None else teacher(x)
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = grad(params, stats, x, y, target)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "batch_stats": stats}, opt, value

    opt, losses = tx.init(variables["params"]), []
    for i, (x, y) in enumerate(batches, 1):
        variables, opt, value = step(variables, opt, x, y)
        losses.append(float(value))
        if i % 20 == 0:
            print(
                f"  step {i} of {steps}: loss {np.mean(losses[-20:]):.4f}", flush=True
            )
    return variables


def seconds(fn: Any, variables: Any) -> Any:
    """As `seconds_of`, of a batch of images."""
    return seconds_of(fn, variables, jnp.zeros((SPEED_BATCH, 32, 32, 3)))


def seconds_of(fn: Any, *args: Any) -> Any:
    """What measures a call of the jitted function."""
    run = jax.jit(fn)
    jax.block_until_ready(run(*args))

    def one() -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        return time.perf_counter() - start

    return one


def speed_up(dense: Any, smaller: Any) -> float:
    """Median ratio of calls that take turns."""
    ratios = [dense() / smaller() for _ in range(SPEED_RUNS)]
    return round(statistics.median(ratios), 3)


def cases() -> Iterator[tuple[str, Method, float]]:
    """Every target by every method."""
    for target, (name, how) in itertools.product(TARGETS, METHODS.items()):
        yield f"{target}x {name}", how, target


def main() -> None:
    """Every method and target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--speed-only", action="store_true")
    options = parser.parse_args()
    name = f"resnet{options.depth}" + "_validation" * options.validate
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    train, test = (data.cifar10(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(train.x[-HELD_OUT:], train.y[-HELD_OUT:])
        train = data.Images(train.x[:-HELD_OUT], train.y[:-HELD_OUT])
    model, variables = resnet.load(options.depth, root=options.data_dir)
    example = jnp.zeros((2, 32, 32, 3))
    graph = jc.prune.dependency_graph(model.apply, variables, example)
    cost = jc.prune.Cost(graph)
    dense = seconds(model.apply, variables)

    def score(fn: Any, variables: Any) -> float:
        found = resnet.logits(fn, variables, test.x)
        return round(100 * float((found.argmax(-1) == test.y).mean()), 2)

    if ("dense", "pretrained") not in report:
        report.add("dense", "pretrained", "", score(model.apply, variables))
    teacher = functools.partial(model.apply, variables)
    for goal, (label, how, target) in itertools.product(GOALS, cases()):
        skipped = options.speed_only and goal != "speed"
        if skipped or (label, goal) in report:
            continue
        units = jc.prune.choose_units(
            graph,
            variables,
            importance=how.importance,
            flops=1 / target,
            scope=how.scope,
            round_to=how.round_to,
        )
        removal = jc.prune.Removal.of(graph, units)
        fn, small = removal.smaller(model.apply), removal.take(variables)
        note = ""
        if goal.startswith("tuned"):
            steps = options.epochs * (len(train.x) // BATCH)
            batches = epochs(train.x, train.y, options.epochs, seed=0)
            by = teacher if goal == "tuned, distilled" else None
            small = fine_tune(fn, small, batches, steps, by)
            note = f"{options.epochs} epochs"
        if goal == "speed":
            found = speed_up(dense, seconds(fn, small))
        else:
            found = score(fn, small)
        report.add(
            label,
            goal,
            note,
            found,
            flops_ratio=round(cost({}).flops / cost(units).flops, 3),
            parameters_ratio=round(cost({}).parameters / cost(units).parameters, 3),
        )


if __name__ == "__main__":
    main()
