"""Timing of programs against each other, in one run, and the record of it."""

from __future__ import annotations

import argparse
import datetime
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
    programs: Mapping[str, Callable[[], Any]], *, rounds: int, calls: int = 1
) -> dict[str, dict[str, float]]:
    """Median time of each program, and the median of its ratio to the first.

    The programs take turns, so that what slows the machine down slows all of them; a
    ratio is between two neighbours in time. The first round is not counted.

    Args:
      programs: What to call; each result is waited for.
      rounds: Turns.
      calls: Calls a turn, of which the mean counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in track(range(rounds + 1), "timing"):
        for name, call in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - start) / calls)
    counted = {name: s[1:] for name, s in seconds.items()}
    first = next(iter(counted.values()))
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(s), 4),
            "ratio": round(
                statistics.median(a / b for a, b in zip(s, first, strict=True)), 4
            ),
        }
        for name, s in counted.items()
    }


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
