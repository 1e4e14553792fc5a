"""Joins what both sides measured, and prints the tables of README.md.

python -m experiments.peers.run errors found.json ...    writes results.json
python -m experiments.peers.run seconds found.json ...   writes seconds.json
python -m experiments.peers.run tables
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.peers import measure

HERE = Path(__file__).parent
Row = dict[str, Any]
Sort = Callable[[Row], bool]
MEASURES = ("calibration", "held_out")


def join(files: Iterable[str], name: str) -> None:
    """One file of all results and versions."""
    results: list[Row] = []
    versions: dict[str, str] = {}
    for file in files:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        results += found["results"]
        versions |= found["versions"] if "gptqmodel" not in found["versions"] else {}
        if "gptqmodel" in found["versions"]:
            own = found["versions"]
            versions |= {"gptqmodel": own["gptqmodel"]}
            versions |= {"torch of gptqmodel": own["torch"]}
    today = datetime.date.today().isoformat()
    whole = {"date": today, "versions": versions, "results": results}
    measure.save(HERE / name, whole)


def read(name: str) -> list[Row]:
    return json.loads((HERE / name).read_text(encoding="utf-8"))["results"]


def least(rows: list[Row], where: Sort, measured: str) -> float | None:
    """The smallest of an error among the rows that have it."""
    values = [r[measured] for r in rows if where(r) and measured in r]
    return min(values) if values else None


def cases(rows: list[Row]) -> list[tuple[str, int, int]]:
    """Layers and formats in order of appearance."""
    return list(dict.fromkeys((r["layer"], r["bits"], r["group"]) for r in rows))


def compare(title: str, rows: list[Row], columns: dict[str, Sort], *ours: str) -> None:
    """A table, and where each of `ours` is above every peer's column.

    Of a method's settings the best is taken, for each error on its own. The least
    held-out error of a row is bold.
    """
    print(f"\n{title}\n\n| layer, bits, group |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    known_cases = cases([r for r in rows if columns[ours[0]](r)])
    lost: dict[str, list[str]] = {name: [] for name in ours}
    for layer, bits, group in known_cases:
        here = [
            r
            for r in rows
            if (r["layer"], r["bits"], r["group"]) == (layer, bits, group)
        ]
        cells: dict[str, list[float | None]] = {}
        for name, where in columns.items():
            cells[name] = [least(here, where, m) for m in MEASURES]
        for i, m in enumerate(MEASURES):
            peers = [v[i] for name, v in cells.items() if not name.startswith("ours")]
            best = min((v for v in peers if v is not None), default=float("inf"))
            for name in ours:
                mine = cells[name][i]
                if mine is not None and mine > best:
                    case = f"{layer} {bits} g{group} {m}"
                    lost[name].append(f"{case} {mine / best - 1:+.2%}")
        first = min(v[1] for v in cells.values() if v[1] is not None)
        text = [show(values, values[1] == first) for values in cells.values()]
        print(f"| {layer}, {bits}, {group} |", " | ".join(text), "|")
    for name, found in lost.items():
        print(
            f"\n{name.capitalize()} is above the best other column in {len(found)} "
            f"errors of {2 * len(known_cases)}: {', '.join(found) or 'none'}."
        )


def show(values: list[float | None], bold: bool) -> str:
    if any(v is None for v in values):
        return ""
    text = " / ".join(f"{v:.4f}" for v in values)
    return f"**{text}**" if bold else text


def by(name: str, **wanted: Any) -> Sort:
    """Rows of one method, with these entries, in the row or its settings."""

    def matches(r: Row) -> bool:
        entries = r | (r["settings"] if isinstance(r["settings"], dict) else {})
        return r["by"] == name and all(entries.get(k) == v for k, v in wanted.items())

    return matches


def gptq_tables(rows: list[Row]) -> None:
    """Integers with a scale and a zero point a group."""
    rows = [r for r in rows if "method" not in r and r["group"] != 64]
    for damping in (0.01, 0.05):
        like: dict[str, Any] = {"groups": "consecutive", "damping": damping}
        columns = {
            "ours": by("ours: gptq", refine=2, **like),
            "ours, refine=0": by("ours: gptq", refine=0, **like),
            "llm-compressor": by("llmcompressor", **like),
            "GPTQModel, act_group_aware": by("gptqmodel", **like),
            "qwix": by("qwix: gptq", **like),
            "hqq": by("hqq"),
            "rounding, mse": by("ours: rounding, mse"),
        }
        title = f"Groups of consecutive inputs, damping {damping}"
        compare(title, rows, columns, "ours", "ours, refine=0")
    for damping in (0.01, 0.05):
        like = {"groups": "permuted", "damping": damping}
        columns = {"ours": by("ours: gptq", **like)}
        columns["GPTQModel, desc_act"] = by("gptqmodel", **like)
        compare(f"Groups of permuted inputs, damping {damping}", rows, columns, "ours")


def other_tables(rows: list[Row]) -> None:
    """NF4, AWQ and SmoothQuant."""
    nf4 = [r for r in rows if r["group"] == 64]
    columns = {
        "ours: gptq": by("ours: gptq to nf4"),
        "ours: rounding": by("ours: rounding to nf4"),
        "bitsandbytes": by("bitsandbytes nf4"),
    }
    compare("NF4, 64 inputs a scale", nf4, columns, "ours: gptq")
    awq = [r for r in rows if r.get("method") == "awq"]
    smooth = [r for r in rows if r.get("method") == "smoothquant"]
    peers = {"ModelOpt": "modelopt", "llm-compressor": "llmcompressor", "qwix": "qwix"}
    for symmetric in (True, False):
        columns = {"ours": by("ours", symmetric=symmetric)}
        columns |= {k: by(v, symmetric=symmetric) for k, v in peers.items()}
        kind = "symmetric" if symmetric else "with zero points"
        compare(f"AWQ, int4 {kind}", awq, columns, "ours")
    for scheme in ("static", "token"):
        columns = {"ours": by("ours", activations=scheme)}
        columns |= {k: by(v, activations=scheme) for k, v in peers.items()}
        compare(f"SmoothQuant W8A8, {scheme} activations", smooth, columns, "ours")


def weight_table(rows: list[Row]) -> None:
    """Rounding and GPTQ: errors of the weight, and of the held-out outputs."""
    print(
        "\n| layer, bits, group | weight: rounding | gptq | outputs: rounding | gptq |"
    )
    print("|---|---|---|---|---|")
    methods = (
        by("ours: rounding, mse"),
        by("ours: gptq", damping=0.01, groups="consecutive"),
    )
    for layer, bits, group in cases([r for r in rows if methods[1](r)]):
        key = (layer, bits, group)
        here = [r for r in rows if (r["layer"], r["bits"], r["group"]) == key]
        cells = [least(here, m, e) for e in ("weight", "held_out") for m in methods]
        print(
            f"| {layer}, {bits}, {group} |", " | ".join(f"{v:.4f}" for v in cells), "|"
        )


def seconds_table(rows: list[Row], cores: int) -> None:
    """Medians on so many cores; of a method that ran more than once, its slowest."""
    rows = [r for r in rows if r["cores"] == cores]
    sizes = list(dict.fromkeys(r["layer"] for r in rows))
    print(f"\n| wall (processor) seconds, cores: {cores} |", " | ".join(sizes), "|")
    print("|---|" + "---|" * len(sizes))
    for name in dict.fromkeys(r["by"] for r in rows):
        cells = []
        for size in sizes:
            runs = [r for r in rows if r["by"] == name and r["layer"] == size]
            r = max(runs, key=lambda r: r["wall"])
            cells.append(f"{r['wall']:.2f} ({r['cpu']:.2f})")
        print(f"| {name} |", " | ".join(cells), "|")


def main(command: str, *files: str) -> None:
    """One of the commands above."""
    if command == "errors":
        join(files, "results.json")
    if command == "seconds":
        join(files, "seconds.json")
    if command == "tables":
        rows = read("results.json")
        gptq_tables(rows)
        weight_table(rows)
        other_tables(rows)
        for cores in (1, 2):
            seconds_table(read("seconds.json"), cores)


if __name__ == "__main__":
    main(*sys.argv[1:])
