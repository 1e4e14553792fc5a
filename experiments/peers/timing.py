"""Seconds of our GPTQ, from a second moment that is there.

    python -m experiments.peers.timing layers.npz ours_seconds.json

The first call, which compiles, is left out. ``taskset -c 0`` before it measures on one
core: where others use the machine, threads that wait for each other multiply seconds,
in `jax.lax.linalg.cholesky` (LAPACK) by fifteen.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.peers import measure
from jaxcompress import quant
from jaxcompress.lift import statistics

SIZES = ("512", "1024", "2048")
BITS, GROUP, REPEATS = 4, 128, 5
SETTINGS: dict[str, dict[str, Any]] = {
    "act_order=True": {"act_order": True},
    "act_order=True, refine=0": {"act_order": True, "refine": 0},
    "refine=0, candidates=1": {"refine": 0, "candidates": 1},
}


def solver(options: dict[str, Any]) -> Callable[[jax.Array, Any], Any]:
    """The jitted call."""
    fmt = quant.integer(BITS, group_size=GROUP, symmetric=False)
    return jax.jit(lambda w, stats: quant.gptq_weight(w, fmt, stats, **options))


def main(layers: str, results: str) -> None:
    """One table of seconds."""
    data = measure.load(layers)
    found: list[dict[str, Any]] = []
    versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxcompress")}
    for size in SIZES:
        x, w = (jnp.asarray(data[size][part]) for part in "xw")
        given = w, statistics(x, gram=True)
        for name, options in SETTINGS.items():
            solve = solver(options)
            timed = measure.seconds(
                lambda given, solve=solve: jax.block_until_ready(solve(*given)),
                prepare=lambda given=given: given,
                repeats=REPEATS,
            )
            row = {"by": f"ours: {name}", "layer": size, "bits": BITS, "group": GROUP}
            found.append(row | timed)
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
