"""Timing of programs against each other, in one run, and the record of it."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcompress.progress import track

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "jaxcompress", "qwix")


def compare(
    programs: Mapping[str, Callable[[], Callable[[], Any]]],
    *,
    to: str,
    rounds: int,
    calls: int = 1,
) -> dict[str, dict[str, float]]:
    """Median time of each program, and the median of its ratio to one of them.

    The programs take turns, each going first in turn, so that what slows the machine
    down slows all of them. In every turn a program is made anew and called once before
    its time is taken: where its buffers come to lie may be worth some percent.
    Python's garbage collector waits meanwhile, as in `timeit`.

    Args:
      programs: Each returns what to call; each result is waited for.
      to: The program that ratios refer to.
      rounds: Turns.
      calls: Calls a turn, of which the mean counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for i in track(range(rounds), "timing"):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(_seconds(programs[name](), calls))
    base = seconds[to]
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(s), 4),
            "ratio": round(
                statistics.median(a / b for a, b in zip(s, base, strict=True)), 4
            ),
        }
        for name, s in seconds.items()
    }


def _seconds(call: Callable[[], Any], calls: int) -> float:
    jax.block_until_ready(call())
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(call())
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / calls


def record(name: str, doc: str | None, results: dict[str, Any]) -> None:
    """Print results, and write them to ``results/<name>.json`` (or ``--out``)."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    out = parser.parse_args().out
    report = {
        "date": datetime.date.today().isoformat(),
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "processor": _processor(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        **results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
    return f"{lines[0].partition(': ')[2]}, {len(lines)} cores" if lines else ""
