"""Deep Compression of LeNet-300-100 and LeNet-5: prune, share weights, entropy-code.

Every net is trained dense and pruned as in `pruning_run`, to the paper's densities;
the weights that are left are clustered, layer by layer, in as many values as the paper
has, and those are trained on. Sizes are of files on disk, with all a decoder needs:
codebooks, biases, positions, structure, checksums. `beyond` has fewer weights and
values than the paper. A LeNet-5 that has seen shifted images is the teacher, but with
`paper` LeNet-300-100 learns from the dense net.

    python -m experiments.lenets.deep_compression_run [--validate] [--resume]
        [--models lenet300] [--seeds 0 1 2] [--recipes paper beyond]

`--validate` trains on 55,000 images and scores the other 5,000 of the training set;
`--fewer`, `--share` and `--outside` try other settings so, which stand in the names
of rows.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments import data
from experiments.lenets.training import (
    NETS,
    RESULTS,
    SEEDS,
    Settings,
    dense,
    errors,
    load,
    logits_of,
    pruned,
    rules,
    teacher,
    train,
)
from experiments.post_training.report import Report

CODER, ITERATIONS = "rans", 1
"""Few iterations of k-means leave the values nearly as far apart as they began: that
costs little error and half a bit less a code, as the codes of equal steps are as unlike
in frequency as the weights."""

PUBLISHED = {"lenet300": (1.64, 1.58, 40, 27_000), "lenet5": (0.80, 0.74, 39, 44_000)}
"""Errors dense and compressed, ratio, bytes (Han et al., 2016, table 1)."""


class Recipe(NamedTuple):
    """How a net is compressed.

    Attributes:
      bits: Of a weight's code, by layer.
      fewer: What the densities of the paper are divided by; the last layer's is not.
      epochs: With trained centroids.
      rate: Their learning rate.
      share: Of the loss: the teacher's.
      outside: Whether the teacher is that of the LeNets, else the dense net itself.
    """

    bits: dict[str, int]
    fewer: float
    epochs: int
    rate: float = 1e-4
    share: float = 0.7
    outside: bool = False


RECIPES = {
    "paper": {
        "lenet300": Recipe({"ip1": 6, "ip2": 6, "ip3": 6}, 1.0, 10),
        "lenet5": Recipe(
            {"conv1": 8, "conv2": 8, "ip1": 5, "ip2": 5}, 1.0, 4, outside=True
        ),
    },
    "beyond": {
        "lenet300": Recipe({"ip1": 5, "ip2": 5, "ip3": 5}, 1.7, 15, outside=True),
        "lenet5": Recipe(
            {"conv1": 5, "conv2": 5, "ip1": 4, "ip2": 4}, 1.7, 5, outside=True
        ),
    },
}


def kept(net: Settings, recipe: Recipe) -> dict[str, float]:
    """Fraction of every layer's weights that stays."""
    *others, last = net.kept
    fewer = {layer: net.kept[layer] / recipe.fewer for layer in others}
    return {**fewer, last: net.kept[last]}


def clustered(
    net: Settings,
    recipe: Recipe,
    params: Any,
    said: np.ndarray,
    images: data.Images,
    seed: int,
) -> Any:
    """The stored form, after the shared values have been trained; 16 bits for floats.

    Args:
      net: What is trained.
      recipe: How.
      params: Of the pruned net.
      said: Logits of the teacher.
      images: To train on.
      seed: Of their order.
    """
    density = kept(net, recipe)

    def rule(layer: str, axes: Any) -> jc.Transform:
        return jc.chain(
            jc.prune.magnitude(sparsity=1.0 - density[layer], axes=axes),
            jc.codebook.kmeans(
                bits=recipe.bits[layer], iterations=ITERATIONS, axes=axes
            ),
        )

    scheme = rules(net, rule)
    params, _ = scheme.init(params)
    params, state = train(
        net,
        params,
        images,
        seed,
        epochs=recipe.epochs,
        rate=recipe.rate,
        decay=0.0,
        scheme=scheme,
        said=said,
        share=recipe.share,
    )
    packed = scheme.compress(params, state)
    short = lambda a: a.astype(jnp.float16) if a.dtype == jnp.float32 else a
    return jax.tree.map(short, packed)


def sizes(packed: Any) -> tuple[int, dict[str, dict[str, float]]]:
    """Bytes of the file; by layer, weights kept, bits a kept weight, share of dense."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.jc"
        jc.io.save(path, packed, entropy=CODER)
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
    recipe: Recipe,
    kind: str,
    seed: int,
    params: Any,
    said: np.ndarray,
    images: data.Images,
    test: data.Images,
) -> None:
    """One recipe on one net: rows for the pruned and the clustered net."""
    net = NETS[which]._replace(share=recipe.share)
    density = kept(net, recipe)
    left = pruned(net, params, images, seed + 100, said=said, kept=density)
    report.add(which, f"{kind}, pruned, seed {seed}", "", errors(net, left, test))
    dense_again = jc.materialize(left)
    packed = clustered(net, recipe, dense_again, said, images, seed + 200)
    size, layers = sizes(packed)
    full = sum(a.nbytes for a in jax.tree.leaves(params))
    for layer, row in layers.items():
        print(f"  {layer}: {row}", flush=True)
    report.add(
        which,
        f"{kind}, seed {seed}",
        "published {} dense, {} compressed, {}x, {} bytes".format(*PUBLISHED[which]),
        errors(net, packed, test),
        file_bytes=size,
        times_smaller=round(full / size, 1),
        huffman_bytes=jc.io.file_bytes(packed, entropy="huffman"),
        layers=layers,
    )


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--models", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--teacher", type=Path, help="a file to keep the larger net in")
    parser.add_argument("--fewer", type=float)
    parser.add_argument("--share", type=float)
    parser.add_argument("--outside", action=argparse.BooleanOptionalAction)
    return parser.parse_args()


def main() -> None:
    """Both nets, three seeds, both recipes."""
    options = arguments()
    name = "deep_compression_validation" if options.validate else "deep_compression"
    report = Report(name, __doc__, folder=RESULTS, resume=options.resume)
    images, test = load(options.validate, options.data_dir)
    given = {k: getattr(options, k) for k in ("fewer", "share", "outside")}
    tried = {k: v for k, v in given.items() if v is not None}
    label = "".join(f", {k} {v:g}" for k, v in tried.items())
    outside = functools.cache(
        lambda: logits_of(*teacher(images, options.teacher), images.x)
    )
    for which in options.models:
        net = NETS[which]
        for seed in options.seeds:
            todo = {
                kind: RECIPES[recipe][which]._replace(**tried)
                for recipe in options.recipes
                if (which, f"{(kind := recipe + label)}, seed {seed}") not in report
            }
            if not todo:
                continue
            params = dense(net, images, seed)
            if (which, f"dense, seed {seed}") not in report:
                score = errors(net, params, test)
                report.add(which, f"dense, seed {seed}", "", score)
            own = logits_of(net, params, images.x)
            for kind, recipe in todo.items():
                said = outside() if recipe.outside else own
                compress(report, which, recipe, kind, seed, params, said, images, test)
        report.add_means(which, ("file_bytes", "times_smaller"))


if __name__ == "__main__":
    main()
