"""``python -m kernels_pallas.aot``: compile every kernel for chips that are not there.

Each kernel and chip has a process of its own, since a compiler may abort. What is
printed and written is static: instructions as scheduled, registers, spills; never a
time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from kernels_pallas.aot import _gpu, _tpu
from kernels_pallas.aot.cases import cases

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
CHIPS = (*TOPOLOGIES, "H200")
PACKAGES = ("jax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def main() -> None:
    """Compile, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--one", nargs=3, metavar=("CHIP", "CASE", "DUMP"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_here(*options.one)))
        return
    found = {}
    for chip in options.chips:
        names = cases("gpu" if chip == "H200" else "tpu")
        for name in (n for n in names if options.only in n):
            result = compile_apart(chip, name)
            found.setdefault(name, {})[chip] = result
            print(f"{chip:5s} {name:34s} {summary(result)}", flush=True)
    if options.out:
        report = {
            "date": datetime.date.today().isoformat(),
            "versions": {p: _version(p) for p in PACKAGES},
            "what": "static figures of compiled kernels; never a claim of speed",
            "kernels": found,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    failed = [
        n for n, chips in found.items() if any("error" in r for r in chips.values())
    ]
    if failed:
        sys.exit(f"aot: {len(failed)} kernels did not compile: {', '.join(failed)}")


def compile_apart(chip: str, name: str) -> dict[str, Any]:
    """Compile one case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder)
        if chip == "H200":
            own = _gpu.environment(dump)
        else:
            own = _tpu.environment(TOPOLOGIES[chip], dump)
        command = [sys.executable, "-m", "kernels_pallas.aot", "--one", chip, name]
        done = subprocess.run(
            [*command, folder],
            env={**os.environ, **own, "JAX_TRACEBACK_FILTERING": "off"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][-300:]}
    return json.loads(lines[-1])


def compile_here(chip: str, name: str, dump: str) -> dict[str, Any]:
    """Compile one case in this process, which was started for it."""
    folder = pathlib.Path(dump)
    if chip == "H200":
        return _gpu.compile_gpu(*cases("gpu")[name], folder)
    return _tpu.compile_tpu(*cases("tpu")[name], TOPOLOGIES[chip], folder)


def summary(result: dict[str, Any]) -> str:
    """One line of the figures that matter."""
    if "error" in result:
        return f"FAILED {result['error']}"
    if "registers" in result:
        loop = sum(result["loop"].values())
        return (
            f"{result['registers']} registers, {result['spill_stores']} bytes spilled, "
            f"{result['shared'] // 1024} KiB shared, {loop} instructions a loop"
        )
    spills = sum(n for unit, n in result["slots"].items() if "SPILL" in unit)
    return (
        f"{result['step_cycles']} bundles a step, {result['cycles']:.0f} in all, "
        f"{result['ratio']:.2f} of the memory's cycles, {spills} spills"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
