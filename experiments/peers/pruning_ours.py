"""Our pruning of the same layers, and the table beside peers.

    python -m experiments.peers.pruning_ours layers.npz ours.json
    python -m experiments.peers.pruning_ours table ours.json peers.json

Algorithm 1 of the paper in float64 NumPy stands beside both, as what is published.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.peers import measure
from jaxcompress import prune
from jaxcompress.lift import statistics

LAYERS = ("query", "intermediate", "output", "512", "1024")
PATTERNS = {"50%": 0.5, "2:4": prune.nm(2, 4)}
DAMPINGS = (0.01, 0.1)
RESULTS = Path(__file__).parent / "pruning.json"
COLUMNS = {
    "ours": ("ours", "SparseGPT"),
    "ours, refine=0": ("ours", "SparseGPT, refine=0"),
    "Algorithm 1": ("numpy", "Algorithm 1"),
    "llm-compressor": ("llmcompressor", "SparseGPT"),
    "ModelOpt, mask": ("modelopt", "SparseGPT mask"),
    "ours, Wanda": ("ours", "Wanda"),
    "llm-compressor, Wanda": ("llmcompressor", "Wanda"),
}


def algorithm_1(
    layer: measure.Layer, nm: tuple[int, int] | None, damping: float
) -> np.ndarray:
    """Frantar & Alistarh, 2023, Algorithm 1: B = Bs = 128, half the weights."""
    w = layer["w"].astype(np.float64)
    h = layer["x"].astype(np.float64).T @ layer["x"] / len(layer["x"])
    h += damping * np.diagonal(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    pruned = np.zeros(w.shape, bool)
    size = 128 if nm is None else nm[1]
    for j in range(len(w)):
        if j % size == 0:
            group = slice(j, min(j + size, len(w)))
            cost = (w[group] / np.diagonal(upper)[group, None]) ** 2
            if nm is None:
                order = np.argsort(cost, axis=None, kind="stable")
                flat = np.zeros(cost.size, bool)
                flat[order[: cost.size // 2]] = True
                pruned[group] = flat.reshape(cost.shape)
            else:
                worst = np.argsort(cost, axis=0)[: nm[1] - nm[0]]
                np.put_along_axis(pruned[group], worst, True, axis=0)
        error = np.where(pruned[j], w[j], 0) / upper[j, j]
        w[j:] -= upper[j, j:, None] * error
        w[j][pruned[j]] = 0
    return w


def methods(layer: measure.Layer) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every pattern and setting."""
    stats = statistics(jnp.asarray(layer["x"]), gram=True)
    w = jnp.asarray(layer["w"])
    for name, pattern in PATTERNS.items():
        row: dict[str, Any] = {"by": "ours", "pattern": name}
        for damping in DAMPINGS:
            for method, refine in (("SparseGPT", 32), ("SparseGPT, refine=0", 0)):
                options = {"damping": damping, "refine": refine}
                run: Callable[[], Any] = functools.partial(
                    prune.sparsegpt_weight, w, pattern, stats, **options
                )
                yield row | {"method": method, "settings": options}, run
            nm = (2, 4) if name == "2:4" else None
            run = functools.partial(algorithm_1, layer, nm, damping)
            paper = {"by": "numpy", "method": "Algorithm 1"}
            yield row | paper | {"settings": {"damping": damping}}, run
        run = functools.partial(prune.wanda_weight, w, pattern, stats)
        yield row | {"method": "Wanda", "settings": {}}, run


def run(layers: str, results: str) -> None:
    """Measure on all layers."""
    data, found = measure.load(layers), []
    names = ("jax", "jaxlib", "jaxcompress", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    for name in LAYERS:
        for row, prune_it in methods(data[name]):

            def task(prune_it: Any = prune_it, layer: Any = data[name]) -> Any:
                found = prune_it()
                if not isinstance(found, np.ndarray):
                    found = np.asarray(found.materialize())
                zeros = {"zeros": float(np.mean(found == 0))}
                return measure.errors(layer, found) | zeros

            found.append(row | {"layer": name} | measure.attempt(task))
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


def table(*files: str) -> None:
    """Join the files, save them, and print calibration / held-out errors."""
    parts = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    rows = [row for part in parts for row in part["results"]]
    versions = {k: v for part in parts for k, v in part["versions"].items()}
    measure.save(RESULTS, {"versions": versions, "results": rows})
    for damping in DAMPINGS:
        print(f"\n| damping {damping} |", " | ".join(COLUMNS), "|")
        print("|---|" + "---|" * len(COLUMNS))
        for pattern in PATTERNS:
            for layer in LAYERS:
                cells = [
                    cell(rows, layer, pattern, *who, damping)
                    for who in COLUMNS.values()
                ]
                print(f"| {layer}, {pattern} |", " | ".join(cells), "|")


def cell(
    rows: list[Any], layer: str, pattern: str, by: str, method: str, damping: float
) -> str:
    """Both errors of one method on one layer."""
    wanted = {"layer": layer, "pattern": pattern, "by": by, "method": method}
    for row in rows:
        same = all(row[k] == v for k, v in wanted.items())
        if same and row["settings"].get("damping", damping) == damping:
            if "failed" in row:
                return "failed"
            return f"{row['calibration']:.4f} / {row['held_out']:.4f}"
    return ""


if __name__ == "__main__":
    if sys.argv[1] == "table":
        table(*sys.argv[2:])
    else:
        run(*sys.argv[1:])
