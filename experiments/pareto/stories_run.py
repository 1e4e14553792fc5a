"""stories260k: what a weight costs and what it is worth, in every family.

All matrices of the layers, compressed after training with the same 16 batches of
stories 0-1159, towards the float model's outputs where a method knows them; nothing is
fine-tuned. A row has its mean NLL on stories 1160-1199, where settings were chosen, on
stories 1200-1229 ("test"), and the stored bits a weight: of the leaves' real buffers,
with codebooks, scales, zero points and masks.

    python -m experiments.pareto.stories_run [--resume] [--families codebooks]

The table is saved after every row, the plot at the end.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

import jaxcompress as jc
from experiments import data
from experiments.models import stories, text
from experiments.post_training import stories_run
from experiments.post_training.report import Report
from experiments.post_training.stories_run import (
    BATCHES,
    LAYERS,
    LENGTH,
    TEST,
    VALIDATION,
)

HERE = Path(__file__).parent
KEY = jax.random.key(0)
Make = Callable[[], Any]
Codes = functools.partial(jc.codebook.Codes, scale=True, dtype="bfloat16")
SCALARS = [(8, None), (6, None), (4, None), (4, 32), (3, None), (3, 32), (2, None)]
SCALARS += [(2, 32)]
"""Bits, and inputs that share a scale; all of an output's without."""
CODES = {
    "4 bits, scalars": Codes(dims=1, bits=4),
    "4 bits, scalars, 2 codebooks": Codes(dims=1, bits=4, blocks=2),
    "4 bits, scalars, 4 codebooks": Codes(dims=1, bits=4, blocks=4),
    "4 bits, sums of 2, d2": Codes(dims=2, bits=4, books=2),
    "3 bits, scalars": Codes(dims=1, bits=3),
    "3 bits, scalars, 4 codebooks": Codes(dims=1, bits=3, blocks=4),
    "3 bits, pairs": Codes(dims=2, bits=6),
    "3 bits, sums of 2, d2": Codes(dims=2, bits=3, books=2),
    "2 bits, scalars": Codes(dims=1, bits=2),
    "2 bits, pairs": Codes(dims=2, bits=4),
    "2 bits, sums of 2, d4": Codes(dims=4, bits=4, books=2),
}
RATIOS = (0.9, 0.75, 0.5)
PATTERNS = {
    "25%": 0.25,
    "50%": 0.5,
    "2:4": jc.prune.nm(2, 4),
    "75%": 0.75,
}
BUCKETS = (1.25, 2.0, 4.0)


def families(fn: Any, params: Any, batches: list[Any]) -> dict[str, dict[str, Make]]:
    """How to compress, by family and name."""
    inputs = (fn, params, batches)
    gptq = functools.partial(jc.quant.gptq, *inputs, reference=True)
    aqlm = functools.partial(jc.codebook.aqlm, *inputs, key=KEY, reference=True)
    whitened = functools.partial(jc.lowrank.whitened, *inputs, reference=True)
    sparsegpt = functools.partial(jc.prune.sparsegpt, *inputs, reference=True)
    into = functools.partial(jc.compress, fn=fn, example=batches[0])

    def scalars(bits: int, group: int | None) -> Any:
        rules = stories_run.formats(bits, group)
        return gptq(rules={k: f.replace(scale="bfloat16") for k, f in rules.items()})

    @functools.cache
    def factored(ratio: float) -> Any:
        return whitened(rules={LAYERS: jc.lowrank.by_ratio(ratio)})

    def short_factors(ratio: float) -> Any:
        svd = jc.lowrank.svd(rank=jc.lowrank.by_ratio(ratio))
        rules = {LAYERS: jc.chain(svd, jc.quant.int8())}
        return into(jc.materialize(factored(ratio)), rules)

    @functools.cache
    def sparse(name: str) -> Any:
        return sparsegpt(rules={LAYERS: PATTERNS[name]})

    def short_values(name: str) -> Any:
        zeros = jc.prune.magnitude(sparsity=PATTERNS[name])
        rules = {LAYERS: jc.chain(zeros, jc.quant.int8())}
        return into(jc.materialize(sparse(name)), rules)

    def hashed(ratio: float) -> Any:
        return into(params, {LAYERS: jc.hashing.hashed(ratio=ratio)})

    sizes = lambda group: "" if group is None else f" g{group}"
    return {
        "scalars": {
            f"{bits} bits{sizes(group)}": functools.partial(scalars, bits, group)
            for bits, group in SCALARS
        },
        "codebooks": {
            name: functools.partial(aqlm, rules={LAYERS: codes})
            for name, codes in CODES.items()
        },
        "low rank": {f"{r}": functools.partial(factored, r) for r in RATIOS},
        "low rank, 8 bits": {
            f"{r}": functools.partial(short_factors, r) for r in RATIOS
        },
        "pruned": {name: functools.partial(sparse, name) for name in PATTERNS},
        "pruned, 8 bits": {
            name: functools.partial(short_values, name) for name in PATTERNS
        },
        "hashed": {f"{r}x": functools.partial(hashed, r) for r in BUCKETS},
    }


def bits_per_weight(packed: Any) -> float:
    """Of all compressed leaves."""
    leaves = [
        x for x in jax.tree.leaves(packed, is_leaf=jc.is_leaf) if isinstance(x, jc.Leaf)
    ]
    return 8 * sum(x.stored_bytes for x in leaves) / sum(x.size for x in leaves)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats both in bits and in NLL, by bits."""
    kept: list[tuple[float, float]] = []
    for bits, nll in sorted(points):
        if not kept or nll < kept[-1][1]:
            kept.append((bits, nll))
    return kept


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Test NLL against stored bits a weight, a line for each family, and the front."""
    figure, axis = plt.subplots(figsize=(7.2, 4.5), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["model"] != "float":
            points.setdefault(row["model"], []).append((row["stored"], row["test"]))
    for family, found in points.items():
        axis.plot(*zip(*sorted(found), strict=True), "o-", ms=4, lw=0.8, label=family)
    best = front([p for found in points.values() for p in found])
    axis.plot(*zip(*best, strict=True), "k--", lw=1.2, label="best of all")
    dense = next(row["test"] for row in rows if row["model"] == "float")
    axis.axhline(dense, color="gray", lw=0.8, label="float32")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(dense - 0.1, 5.0)
    axis.set_xlabel("stored bits a weight")
    axis.set_ylabel("NLL a token, stories 1200-1229")
    axis.set_title("stories260k after training, nothing tuned")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Every point; then the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the data folder")
    parser.add_argument("--resume", action="store_true", help="keep finished rows")
    parser.add_argument("--families", nargs="+", help="only these")
    options = parser.parse_args()
    root = options.data_dir
    model, params = stories.load(root=root)
    batches = stories_run.windows(root, LENGTH, mixed=False)[:BATCHES]
    found = families(model.apply, params, batches)
    if unknown := set(options.families or ()) - set(found):
        parser.error(f"--families must be among {list(found)}; got {sorted(unknown)}")
    nll = functools.partial(text.mean_nll, jc.lift(model.apply))
    validation, test = (data.stories(*part, root) for part in (VALIDATION, TEST))
    report = Report("stories", __doc__, folder=HERE, resume=options.resume)

    def add(family: str, name: str, packed: Any, **more: Any) -> None:
        scores = {"test": round(nll(packed, test), 4), **more}
        report.add(family, name, "", round(nll(packed, validation), 4), **scores)

    if ("float", "") not in report:
        add("float", "", params, stored=32.0)
    for family in options.families or found:
        for name, make in found[family].items():
            if (family, name) not in report:
                packed = make()
                add(family, name, packed, stored=round(bits_per_weight(packed), 3))
    plot(report.rows, HERE / "stories.png")


if __name__ == "__main__":
    main()
