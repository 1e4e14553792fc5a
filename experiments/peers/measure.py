"""What both sides measure, in NumPy alone so that either environment can import it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BITS, GROUPS = (4, 3, 2), (128, 32)
FORMATS = [(bits, group) for bits in BITS for group in GROUPS]
Layer = dict[str, np.ndarray]


def load(path: str) -> dict[str, Layer]:
    """Layers by name: rows `x`, held-out rows `held`, weight `w` ``[in, out]``."""
    layers: dict[str, Layer] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            name, part = key.split("/")
            layers.setdefault(name, {})[part] = arrays[key]
    return layers


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """``|found - wanted| / |wanted|``."""
    wanted = wanted.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def errors(layer: Layer, weight: np.ndarray) -> dict[str, float]:
    """Relative errors of a weight: of its outputs on both sets of rows, and its own."""
    w = layer["w"]
    return {
        "calibration": relative(layer["x"] @ weight, layer["x"] @ w),
        "held_out": relative(layer["held"] @ weight, layer["held"] @ w),
        "weight": relative(weight, w),
    }


def output_errors(
    layer: Layer, apply: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    """Relative errors of a function that stands for the matmul."""
    return {
        "calibration": relative(apply(layer["x"]), layer["x"] @ layer["w"]),
        "held_out": relative(apply(layer["held"]), layer["held"] @ layer["w"]),
    }


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, or how it failed: a peer that fails is recorded."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def seconds(
    run: Callable[[Any], Any], *, prepare: Callable[[], Any], repeats: int
) -> dict[str, Any]:
    """Medians of wall and processor seconds of ``run(prepare())``, the first left out.

    Only `run` is timed.
    """
    wall, cpu = [], []
    for _ in range(repeats + 1):
        prepared = prepare()
        start, used = time.perf_counter(), time.process_time()
        run(prepared)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {
        "wall": statistics.median(wall[1:]),
        "cpu": statistics.median(cpu[1:]),
        "walls": wall[1:],
        "cpus": cpu[1:],
        "load": os.getloadavg()[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def save(path: Path | str, results: dict[str, Any]) -> None:
    """Write JSON."""
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
