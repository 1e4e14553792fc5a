"""LeNet-300-100 and LeNet-5 on MNIST, 12 times fewer weights, no more errors.

Every net is trained dense, then pruned by magnitude on a cubic schedule to the density
that Deep Compression states for each layer, while it is trained on, from the labels
and a share from what a teacher says, a LeNet-5 that has seen shifted images.

    python -m experiments.lenets.pruning_run [--validate] [--resume] [--models lenet5]

`--validate` trains on 55,000 images and scores the other 5,000 of the training set;
settings are chosen so, by `--decay`, `--share`, `--epochs` and `--outside`, which stand
in the names of the rows.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.lenets.training import (
    NETS,
    RESULTS,
    SEEDS,
    dense,
    errors,
    load,
    logits_of,
    pruned,
    teacher,
)
from experiments.post_training.report import Report


def main() -> None:
    """Both nets, three seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--teacher", type=Path, help="a file to keep the teacher in")
    parser.add_argument("--outside", action=argparse.BooleanOptionalAction)
    parser.add_argument("--decay", type=float, help="while the net is pruned")
    parser.add_argument("--share", type=float, help="of the loss: the teacher's")
    parser.add_argument("--epochs", type=int, help="while the net is pruned")
    options = parser.parse_args()
    name = "pruning_validation" if options.validate else "pruning"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = load(options.validate, options.data_dir)
    given = {
        "pruned_decay": options.decay,
        "share": options.share,
        "epochs": options.epochs,
        "outside": options.outside,
    }
    tried = {k: v for k, v in given.items() if v is not None}
    kind = "pruned" + "".join(f", {k} {v:g}" for k, v in tried.items())

    @functools.cache
    def outside() -> np.ndarray:
        wiser = teacher(images, options.teacher)
        if ("teacher", "") not in report:
            report.add("teacher", "", "", errors(*wiser, test))
        return logits_of(*wiser, images.x)

    for which in options.models:
        net = NETS[which]._replace(**tried)
        for seed in options.seeds:
            if (which, f"{kind}, seed {seed}") in report:
                continue
            params = dense(net, images, seed)
            if (which, f"dense, seed {seed}") not in report:
                score = errors(net, params, test)
                report.add(which, f"dense, seed {seed}", "", score)
            said = outside() if net.outside else None
            packed = pruned(net, params, images, seed + 100, said=said)
            blank = jnp.zeros((1, 28, 28, 1))
            found = jc.report.pruning(net.model.apply, params, packed, blank)
            kernels = [r for r in found.rows if r.path.endswith("kernel")]
            total = sum(np.prod(r.shape) for r in kernels)
            left = sum(r.weights_left for r in kernels)
            report.add(
                which,
                f"{kind}, seed {seed}",
                "published {} dense, {} pruned".format(*net.published),
                errors(net, packed, test),
                times_fewer=round(float(total / left), 2),
            )
        report.add_means(which)


if __name__ == "__main__":
    main()
