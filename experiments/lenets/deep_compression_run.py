"""Deep Compression of LeNet-300-100 and LeNet-5: prune, share weights, entropy-code.

Every net is trained dense and pruned as in `pruning_run`, to the paper's densities;
the weights that are left are clustered, layer by layer, in as many values as the paper
has, and those are trained on. Sizes are of files on disk, with all a decoder needs:
codebooks, biases, positions, structure, checksums. `beyond` does the same with fewer
weights and values, a teacher (the dense net) and halves for what is not coded.

    python -m experiments.lenets.deep_compression_run [--validate] [--resume]
        [--models lenet300] [--seeds 0 1 2] [--recipes paper beyond]

`--validate` trains on 55,000 images and scores the other 5,000 of the training set.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.lenets.pruning_run import (
    BATCH,
    HELD_OUT,
    NETS,
    RESULTS,
    SEEDS,
    Settings,
    batches,
    errors,
    train,
)
from experiments.post_training.report import Report

PUBLISHED = {"lenet300": (1.64, 1.58, 40, 27_000), "lenet5": (0.80, 0.74, 39, 44_000)}
"""Errors dense and compressed, ratio, bytes (Han et al., 2016, table 1)."""


class Recipe(NamedTuple):
    """How a net is compressed.

    Attributes:
      bits: Of a weight's code, of convolutions and of linear layers, by net.
      fewer: By net, what the densities of the paper are divided by; by layer where the
        first layers need more.
      iterations: Of k-means, from values at equal distances: few leave those nearly
        so, which costs little error and saves half a bit of a code, since the codes of
        equal steps are as unlike in frequency as the weights.
      epochs: With trained centroids, by net.
      rate: Their learning rate.
      teacher: Share of the loss that the dense net's probabilities have.
      coder: Of codes and positions.
      half: Whether codebooks and biases are stored in 16 bits.
    """

    bits: dict[str, tuple[int, int]]
    fewer: dict[str, float]
    iterations: int
    epochs: dict[str, int]
    rate: float
    teacher: float
    coder: Any
    half: bool


RECIPES = {
    "paper": Recipe(
        bits={"lenet300": (6, 6), "lenet5": (8, 5)},
        fewer={"lenet300": 1.0, "lenet5": 1.0},
        iterations=1,
        epochs={"lenet300": 10, "lenet5": 4},
        rate=1e-4,
        teacher=0.0,
        coder="rans",
        half=True,
    ),
    "beyond": Recipe(
        bits={"lenet300": (5, 5), "lenet5": (5, 4)},
        fewer={"lenet300": 1.7, "lenet5": 1.7},
        iterations=1,
        epochs={"lenet300": 15, "lenet5": 5},
        rate=1e-4,
        teacher=0.7,
        coder="rans",
        half=True,
    ),
}


def kept(net: Settings, recipe: Recipe, which: str, layer: str) -> float:
    """Fraction of a layer's weights that stays; of the last layer, all the paper's."""
    first = net.kept[layer]
    return first if layer == list(net.kept)[-1] else first / recipe.fewer[which]


def rules(net: Settings, rule: Any) -> jc.Transform:
    """``rule(layer, axes)`` for the kernel of every layer."""
    axes = {n: (-4, -3, -2) if n.startswith("conv") else -2 for n in net.kept}
    return jc.select({f"params/{n}/kernel": rule(n, axes[n]) for n in net.kept})


def distill(
    net: Settings,
    params: Any,
    images: data.Images,
    epochs: int,
    rate: float,
    decay: float,
    seed: int,
    scheme: jc.Transform,
    teacher: Any,
    share: float,
) -> tuple[Any, Any]:
    """As `train`; the teacher's probabilities at temperature 4 count for a share."""
    steps = epochs * (len(images.x) // BATCH)
    schedule = optax.cosine_decay_schedule(rate, steps)
    tx = jc.optim.attach(optax.adamw(schedule, weight_decay=decay), scheme)
    apply = jc.lift(net.model.apply)

    def loss(params: Any, opt: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = apply(scheme.view(params, jc.optim.state(opt)), x)
        own = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        if not share:
            return own
        wanted = net.model.apply(teacher, x)
        soft = jc.distill.soft_targets(logits, wanted, temperature=4.0).mean()
        return (1 - share) * own + share * soft

    @jax.jit
    def step(params: Any, opt: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, opt, x, y)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt, value = tx.init(params), 0.0
    for i, (x, y) in enumerate(batches(images, epochs, seed), 1):
        params, opt, value = step(params, opt, x, y)
        if i % max(1, steps // 5) == 0:
            print(f"  step {i} of {steps}: loss {float(value):.4f}", flush=True)
    return params, jc.optim.state(opt)


def pruned(
    net: Settings,
    dense: Any,
    images: data.Images,
    which: str,
    recipe: Recipe,
    epochs: int,
    seed: int,
) -> Any:
    """Params with zeros, after gradual magnitude pruning."""
    steps = epochs * (len(images.x) // BATCH)
    end = int(net.ramp * steps)

    def rule(layer: str, axes: Any) -> jc.Transform:
        sparsity = 1.0 - kept(net, recipe, which, layer)
        ramp = jc.schedules.cubic(0.0, sparsity, begin=0, end=end)
        every = max(1, steps // 300)
        return jc.prune.magnitude(sparsity=ramp, every=every, axes=axes)

    params, _ = distill(
        net,
        dense,
        images,
        epochs,
        net.learning_rate / 2,
        net.pruned_decay if not recipe.teacher else net.decay,
        seed,
        rules(net, rule),
        dense,
        recipe.teacher,
    )
    return params


def clustered(
    net: Settings,
    params: Any,
    dense: Any,
    images: data.Images,
    which: str,
    recipe: Recipe,
    epochs: int,
    seed: int,
) -> Any:
    """The stored form, after the shared values have been trained."""

    def rule(layer: str, axes: Any) -> jc.Transform:
        conv, linear = recipe.bits[which]
        sparsity = 1.0 - kept(net, recipe, which, layer)
        return jc.chain(
            jc.prune.magnitude(sparsity=sparsity, axes=axes),
            jc.codebook.kmeans(
                bits=conv if layer.startswith("conv") else linear,
                iterations=recipe.iterations,
                axes=axes,
            ),
        )

    scheme = rules(net, rule)
    params, _ = scheme.init(params)
    params, state = distill(
        net,
        params,
        images,
        epochs,
        recipe.rate,
        0.0,
        seed,
        scheme,
        dense,
        recipe.teacher,
    )
    packed = scheme.compress(params, state)
    if not recipe.half:
        return packed
    short = lambda a: a.astype(jnp.float16) if a.dtype == jnp.float32 else a
    return jax.tree.map(short, packed)


def sizes(packed: Any, coder: Any) -> tuple[int, dict[str, dict[str, float]]]:
    """Bytes of the file; by layer, weights kept, bits a kept weight, share of dense."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.jc"
        jc.io.save(path, packed, entropy=coder)
        total = path.stat().st_size
        arrays = jc.io.read_manifest(path)["arrays"]
        again = jax.tree.leaves(jc.io.load(path))
    for a, b in zip(again, jax.tree.leaves(packed), strict=True):
        np.testing.assert_array_equal(a, b)
    layers = {}
    for layer, entry in packed["params"].items():
        kernel, at = entry["kernel"], f"params/{layer}/kernel"
        left = int(jnp.count_nonzero(kernel.materialize()))
        stored = {name: a[2] for name, a in arrays.items() if name.startswith(at)}
        layers[layer] = {
            "kept_percent": round(100 * left / kernel.size, 1),
            "value_bits": round(8 * stored[f"{at}/elements"] / left, 2),
            "index_bits": round(8 * stored[f"{at}/mask"] / left, 2),
            "percent_of_dense": round(100 * sum(stored.values()) / 4 / kernel.size, 2),
        }
    return total, layers


def compress(
    report: Report,
    which: str,
    name: str,
    seed: int,
    dense: Any,
    images: data.Images,
    test: data.Images,
    epochs: int | None,
) -> None:
    """One recipe on one net: rows for the pruned and the clustered net."""
    net, recipe = NETS[which], RECIPES[name]
    left = pruned(net, dense, images, which, recipe, epochs or net.epochs, seed + 100)
    zeros = f"{name}, pruned, seed {seed}"
    report.add(which, zeros, "", errors(net.model, left, test))
    epochs = epochs or recipe.epochs[which]
    packed = clustered(net, left, dense, images, which, recipe, epochs, seed + 200)
    size, layers = sizes(packed, recipe.coder)
    full = sum(a.nbytes for a in jax.tree.leaves(dense))
    huffman = jc.io.file_bytes(packed, entropy="huffman")
    for layer, row in layers.items():
        print(f"  {layer}: {row}", flush=True)
    report.add(
        which,
        f"{name}, seed {seed}",
        "published {} dense, {} compressed, {}x, {} bytes".format(*PUBLISHED[which]),
        errors(net.model, packed, test),
        file_bytes=size,
        times_smaller=round(full / size, 1),
        huffman_bytes=huffman,
        layers=layers,
    )


def add_means(report: Report, which: str, methods: list[str]) -> None:
    """A row with mean and spread for every method with several seeds."""
    for method in methods:
        rows = [
            r
            for r in report.rows
            if r["model"] == which and r["method"].startswith(f"{method}, seed")
        ]
        if len(rows) < 2 or (which, f"{method}, mean") in report:
            continue
        scores = [r["score"] for r in rows]
        more = {"spread": round(statistics.stdev(scores), 3)}
        if "file_bytes" in rows[0]:
            more["file_bytes"] = round(statistics.mean(r["file_bytes"] for r in rows))
            times = [r["times_smaller"] for r in rows]
            more["times_smaller"] = round(statistics.mean(times), 1)
        report.add(which, f"{method}, mean", "", statistics.mean(scores), **more)


def main() -> None:
    """Both nets, three seeds, both recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--epochs", type=int, help="of every phase, for a quick try")
    parser.add_argument("--images", type=int, help="train on the first, for a try")
    options = parser.parse_args()
    name = "deep_compression_validation" if options.validate else "deep_compression"
    name += "_try" if options.epochs or options.images else ""
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = (data.mnist(p, options.data_dir) for p in ("train", "test"))
    if options.validate:
        test = data.Images(images.x[-HELD_OUT:], images.y[-HELD_OUT:])
        images = data.Images(images.x[:-HELD_OUT], images.y[:-HELD_OUT])
    images = data.Images(images.x[: options.images], images.y[: options.images])
    for which in options.models:
        net = NETS[which]
        for seed in options.seeds:
            todo = [
                r for r in options.recipes if (which, f"{r}, seed {seed}") not in report
            ]
            if not todo:
                continue
            params = jax.jit(net.model.init)(
                jax.random.key(seed), jnp.zeros((1, 28, 28, 1))
            )
            dense, _ = train(
                net.model,
                params,
                images,
                options.epochs or net.dense_epochs,
                net.learning_rate,
                net.decay,
                seed,
                jc.identity(),
            )
            if (which, f"dense, seed {seed}") not in report:
                score = errors(net.model, dense, test)
                report.add(which, f"dense, seed {seed}", "", score)
            for recipe in todo:
                compress(
                    report, which, recipe, seed, dense, images, test, options.epochs
                )
        methods = [m for r in options.recipes for m in (f"{r}, pruned", r)]
        add_means(report, which, ["dense", *methods])


if __name__ == "__main__":
    main()
