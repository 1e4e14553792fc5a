"""Compare ways of training sparse networks on handwritten digits, budgets equal.

Every method trains the same MLP for the same steps on the same batches with the same
optimizer. Settings were chosen on the validation part (``--tune``); the test part is
scored once, for the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.digits.run import MLP, Part, accuracy, load
from experiments.sparse_training import sharded
from experiments.sparse_training.methods import Settings, runs, scheme
from experiments.sparse_training.training import Trained, fit
from jaxcompress.progress import track

TUNED: dict[str, list[dict[str, Any]]] = {
    "dense": [{"learning_rate": r} for r in (0.03, 0.1, 0.3)],
    "SET": [{"every": e} for e in (10, 25, 100)],
    "RigL": [{"every": e} for e in (10, 25, 100)],
    "Top-KAST": [{"explored": f} for f in (0.1, 0.5)],
    "gradual magnitude": [{"until": u} for u in (0.5, 0.75)],
    "SR-STE 2:4": [{"pull": p} for p in (2e-4, 2e-3)],
}
"""Candidates, scored on the validation part."""

TUNING_SEEDS = (10, 11, 12)


def stored(
    name: str, sparsity: float, settings: Settings, seed: int, trained: Trained
) -> Any:
    """The compressed params of a run."""
    keys = jax.random.split(jax.random.key(seed), 3)
    method = scheme(name, sparsity, settings, keys[1])
    return method.compress(trained.params, trained.state)


def overlaps(trained: Trained) -> dict[str, list[float]]:
    """Of all masks together: with the next checkpoint's, and with the last."""
    count = jax.tree.leaves(trained.history)[0].shape[0]
    states = [jax.tree.map(lambda a, i=i: a[i], trained.history) for i in range(count)]
    states.append(trained.state)

    def mean(a: Any, b: Any) -> float:
        return statistics.mean(map(float, jc.prune.mask_overlap(a, b).values()))

    return {
        "with_next": [mean(a, b) for a, b in itertools.pairwise(states)],
        "with_last": [mean(a, states[-1]) for a in states],
    }


def measure(
    name: str, sparsity: float, settings: Settings, train: Part, scored: Part
) -> dict[str, Any]:
    """One line of the table; lists hold one entry a seed."""
    apply = MLP(settings.width).apply
    rows: dict[str, Any] = {"method": name, "sparsity": sparsity, "accuracy": []}
    for seed in settings.seeds:
        trained = fit(name, sparsity, settings, train, jax.random.key(seed))
        packed = stored(name, sparsity, settings, seed, trained)
        dense = jc.materialize(packed)
        rows["accuracy"].append(accuracy(apply, dense, scored))
        kernels = [a for a in jax.tree.leaves(dense) if a.ndim == 2]
        rows["zeros"] = 1 - sum(int(jnp.count_nonzero(a)) for a in kernels) / sum(
            a.size for a in kernels
        )
        rows["density_in_training"] = float(trained.density)
        if seed == settings.seeds[0] and name != "dense":
            rows["overlap"] = overlaps(trained)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over the seeds."""
    header = (
        f"{'method':<20}{'zeros':>8}{'accuracy %':>12}{'spread':>8}"
        f"{'used in training':>18}{'first masks left':>18}"
    )
    lines = [header, "-" * len(header)]
    for row in rows:
        scores = row["accuracy"]
        left = f"{row['overlap']['with_last'][0]:.2f}" if "overlap" in row else ""
        lines.append(
            f"{row['method']:<20}{row['zeros']:>8.1%}{statistics.mean(scores):>12.2f}"
            f"{max(scores) - min(scores):>8.2f}{row['density_in_training']:>18.1%}"
            f"{left:>18}"
        )
    return "\n".join(lines)


def tune(settings: Settings) -> list[dict[str, Any]]:
    """Validation accuracy of each candidate, at the highest sparsity it is for."""
    train, validation, _ = load()
    found = []
    for name, candidates in TUNED.items():
        sparsity = [s for n, s in runs(settings) if n == name][-1]
        for changes in track(candidates, name):
            tried = dataclasses.replace(settings, seeds=TUNING_SEEDS, **changes)
            row = measure(name, sparsity, tried, train, validation)
            mean = statistics.mean(row["accuracy"])
            found.append(
                {"method": name, "sparsity": sparsity, **changes, "mean": mean}
            )
            print(found[-1], flush=True)
    return found


def run(settings: Settings, *, check: tuple[str, ...], steps: int) -> dict[str, Any]:
    """Train all, score the test part, compare devices; returns what is saved.

    Args:
      settings: Of the table.
      check: Methods whose masks are compared on one device and on eight.
      steps: Of those runs.
    """
    start = time.perf_counter()
    train, _, test = load()
    rows = [
        measure(name, sparsity, settings, train, test)
        for name, sparsity in track(runs(settings), "methods")
    ]
    print(table(rows))
    devices = [
        sharded.compare(name, settings.sparsities[-1], settings, train, steps)
        for name in track(check, "eight devices")
    ]
    return {
        "settings": dataclasses.asdict(settings),
        "rows": rows,
        "devices": devices,
        "seconds": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    """Run with the settings above and save results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/sparse_training"))
    parser.add_argument("--tune", action="store_true", help="score the candidates")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", sharded.DEVICES)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        results: Any = tune(Settings())
    else:
        check = ("SET", "RigL", "gradual magnitude")
        results = run(Settings(), check=check, steps=200)
        for row in results["devices"]:
            print(row)
        print(f"{results['seconds']} s")
    name = "tuning.json" if options.tune else "results.json"
    (options.out / name).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
