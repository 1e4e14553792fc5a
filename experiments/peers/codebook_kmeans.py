"""k-means of scalars beside scikit-learn's `KMeans`: error, and seconds.

    python -m experiments.peers.codebook_kmeans codebook_kmeans.json [--side 4096]

Weights are normal, a tenth of them ten times as large. Both sides get the same values
and numbers of clusters; ours are jitted, and the first call, which compiles, is left
out. ``taskset -c 0`` before it measures on one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.cluster import KMeans

from experiments.peers import measure
from jaxcompress.codebook._scalars import cluster_scalars

ITERATIONS = 300


def weights(side: int) -> np.ndarray:
    """``float32[side, side]`` with heavy tails."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(side, side)).astype(np.float32)
    return np.where(rng.random((side, side)) < 0.1, 10 * w, w).astype(np.float32)


def error(w: np.ndarray, entries: np.ndarray) -> float:
    """Sum of squared distances to the nearest entry, in float64."""
    entries = np.sort(entries.astype(np.float64).ravel())
    middle = (entries[1:] + entries[:-1]) / 2
    total = 0.0
    for row in w:
        near = entries[np.searchsorted(middle, row)]
        total += float(np.square(row - near).sum())
    return total


def theirs(entries: int) -> Callable[[np.ndarray], np.ndarray]:
    """scikit-learn, one start, as many iterations."""
    means: Any = KMeans

    def run(w: np.ndarray) -> np.ndarray:
        model = means(entries, n_init=1, max_iter=ITERATIONS, random_state=0)
        return model.fit(w.reshape(-1, 1)).cluster_centers_

    return run


def ours(entries: int, init: Any) -> Callable[[np.ndarray], np.ndarray]:
    """`cluster_scalars`, jitted."""

    @jax.jit
    def find(w: jax.Array) -> jax.Array:
        key = jax.random.key(0)
        return cluster_scalars(
            w, entries=entries, init=init, iterations=ITERATIONS, key=key
        )

    return lambda w: np.asarray(find(jnp.asarray(w)))


def main() -> None:
    """One table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results")
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--entries", nargs="+", type=int, default=[16, 64])
    options = parser.parse_args()
    w = weights(options.side)
    names = ("jax", "jaxcompress", "scikit-learn")
    versions = {n: importlib.metadata.version(n) for n in names}
    rows: list[dict[str, Any]] = []
    for entries in options.entries:
        inits = ("density", "kmeans++")
        runs = {f"ours, {init}": ours(entries, init) for init in inits}
        for name, run in {**runs, "scikit-learn": theirs(entries)}.items():
            if name != "scikit-learn":
                run(w)
            start, used = time.perf_counter(), time.process_time()
            found = run(w)
            row = {
                "by": name,
                "side": options.side,
                "entries": entries,
                "wall": round(time.perf_counter() - start, 2),
                "cpu": round(time.process_time() - used, 2),
                "mean_error": error(w, found) / w.size,
            }
            rows.append(row)
            print(row, flush=True)
            measure.save(options.results, {"versions": versions, "results": rows})


if __name__ == "__main__":
    main()
