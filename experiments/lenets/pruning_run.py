"""LeNet-300-100 and LeNet-5 on MNIST, 12 times fewer weights, no more errors.

Every net is trained dense, then pruned by magnitude on a cubic schedule to the density
that Deep Compression states for each layer, while it is trained on.

    python -m experiments.lenets.pruning_run [--validate] [--resume] [--models lenet5]

`--validate` trains on 55,000 images and scores the other 5,000 of the training set;
settings were chosen so, and the test set is used once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.models import lenet
from experiments.post_training.report import Report

RESULTS = Path(__file__).parent / "results"
HELD_OUT, BATCH, SEEDS = 5000, 128, (0, 1, 2)


class Settings(NamedTuple):
    """A net, the fraction of each layer's weights that stays, and the budget.

    Attributes:
      model: The net.
      kept: By layer, as published.
      published: Percent of errors, dense and pruned (Han et al., 2015, Table 1).
      dense_epochs: Epochs of dense training.
      epochs: Epochs of training while it is pruned and after.
      ramp: Fraction of those until the sparsity is reached.
      learning_rate: Of dense training; the pruned net starts with half of it.
      decay: Weight decay of dense training.
      pruned_decay: And while the net is pruned: few weights that must fit what many did
        fit it too closely.
    """

    model: Any
    kept: dict[str, float]
    published: tuple[float, float]
    dense_epochs: int
    epochs: int
    ramp: float = 0.5
    learning_rate: float = 1.5e-3
    decay: float = 1e-2
    pruned_decay: float = 0.3


NETS = {
    "lenet300": Settings(
        model=lenet.LeNet300(),
        kept={"ip1": 0.08, "ip2": 0.09, "ip3": 0.26},
        published=(1.64, 1.59),
        dense_epochs=25,
        epochs=40,
    ),
    "lenet5": Settings(
        model=lenet.LeNet5(),
        kept={"conv1": 0.66, "conv2": 0.12, "ip1": 0.08, "ip2": 0.19},
        published=(0.80, 0.77),
        dense_epochs=8,
        epochs=10,
    ),
}


def batches(images: data.Images, epochs: int, seed: int) -> Iterator[Any]:
    """Shuffled anew for every epoch; a rest is left out."""
    rng = np.random.default_rng(seed)
    x, y = images.x.astype(np.float32) / 255, images.y
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield jnp.asarray(x[chosen]), jnp.asarray(y[chosen])


def train(
    model: Any,
    params: Any,
    images: data.Images,
    epochs: int,
    rate: float,
    decay: float,
    seed: int,
    scheme: jc.Transform,
) -> tuple[Any, Any]:
    """AdamW with a cosine schedule, the scheme inside: params and its state."""
    steps = epochs * (len(images.x) // BATCH)
    schedule = optax.cosine_decay_schedule(rate, steps)
    tx = jc.optim.attach(optax.adamw(schedule, weight_decay=decay), scheme)
    apply = jc.lift(model.apply)

    def loss(params: Any, opt: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = apply(scheme.view(params, jc.optim.state(opt)), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params: Any, opt: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, opt, x, y)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, value = tx.init(params), 0.0
    for i, (x, y) in enumerate(batches(images, epochs, seed), 1):
        params, opt, value = step(params, opt, x, y)
        if i % (steps // 5) == 0:
            print(f"  step {i} of {steps}: loss {float(value):.4f}", flush=True)
    return params, jc.optim.state(opt)


def errors(model: Any, params: Any, images: data.Images) -> float:
    """Percent of images that get another class."""
    run = jax.jit(jc.lift(model.apply))
    wrong = 0
    for start in range(0, len(images.x), 1000):
        part = slice(start, start + 1000)
        logits = run(params, jnp.asarray(images.x[part].astype(np.float32) / 255))
        wrong += int((np.asarray(logits).argmax(-1) != images.y[part]).sum())
    return 100.0 * wrong / len(images.x)


def scheme_of(net: Settings, steps: int) -> jc.Transform:
    """Magnitude pruning, each layer to its own density."""
    end = int(net.ramp * steps)
    rules: dict[Any, Any] = {}
    for layer, kept in net.kept.items():
        ramp = jc.schedules.cubic(0.0, 1.0 - kept, begin=0, end=end)
        axes = (-4, -3, -2) if layer.startswith("conv") else -2
        prune = jc.prune.magnitude(sparsity=ramp, every=max(1, steps // 300), axes=axes)
        rules[f"params/{layer}/kernel"] = prune
    return jc.select(rules)


def main() -> None:
    """Both nets, three seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = parser.parse_args()
    name = "pruning_validation" if options.validate else "pruning"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    for which in options.models:
        net = NETS[which]
        for seed in options.seeds:
            if (which, f"pruned, seed {seed}") in report:
                continue
            blank = jnp.zeros((1, 28, 28, 1))
            params = jax.jit(net.model.init)(jax.random.key(seed), blank)
            params, _ = train(
                net.model,
                params,
                images,
                net.dense_epochs,
                net.learning_rate,
                net.decay,
                seed,
                jc.identity(),
            )
            report.add(
                which, f"dense, seed {seed}", "", errors(net.model, params, test)
            )
            steps = net.epochs * (len(images.x) // BATCH)
            scheme = scheme_of(net, steps)
            params, state = train(
                net.model,
                params,
                images,
                net.epochs,
                net.learning_rate / 2,
                net.pruned_decay,
                seed + 100,
                scheme,
            )
            packed = scheme.compress(params, state)
            found = jc.report.pruning(net.model.apply, params, packed, blank)
            kernels = [r for r in found.rows if r.path.endswith("kernel")]
            total = sum(np.prod(r.shape) for r in kernels)
            report.add(
                which,
                f"pruned, seed {seed}",
                f"published {net.published[0]} dense, {net.published[1]} pruned",
                errors(net.model, packed, test),
                times_fewer=round(
                    float(total / sum(r.weights_left for r in kernels)), 2
                ),
            )
        for kind in ("dense", "pruned"):
            rows = [r for r in report.rows if r["model"] == which]
            scores = [
                r["score"] for r in rows if r["method"].startswith(f"{kind}, seed")
            ]
            if len(scores) > 1 and (which, f"{kind}, mean") not in report:
                spread = round(statistics.stdev(scores), 3)
                report.add(
                    which, f"{kind}, mean", "", statistics.mean(scores), spread=spread
                )


if __name__ == "__main__":
    main()
