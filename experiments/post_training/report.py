"""Rows of a table: printed as they come, saved after every row, kept to resume.

    python -m experiments.post_training.report results/stories.json

prints a finished table as Markdown.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


class Report:
    """Results of one script."""

    def __init__(
        self,
        name: str,
        doc: str | None,
        *,
        folder: Path = RESULTS,
        resume: bool = False,
    ) -> None:
        """An empty table, or with `resume` that of an earlier run.

        Args:
          name: Of the file.
          doc: Docstring of the script.
          folder: Where the file lies.
          resume: Whether to keep the rows of an earlier run.
        """
        self.path = folder / f"{name}.json"
        self.doc = doc
        self.rows: list[dict[str, Any]] = []
        self.start = time.perf_counter()
        if resume and self.path.exists():
            self.rows = json.loads(self.path.read_text())["rows"]

    def __contains__(self, row: tuple[str, str]) -> bool:
        """Whether there is a row of a model and method."""
        return row in {(r["model"], r["method"]) for r in self.rows}

    def add(self, model: str, method: str, note: str, score: Any, **more: Any) -> None:
        """Print a row and keep it."""
        seconds = round(time.perf_counter() - self.start, 1)
        row = {"model": model, "method": method, "score": score, **more}
        self.rows.append({**row, "note": note, "seconds": seconds})
        extra = "  ".join(f"{k} {v}" for k, v in more.items())
        print(f"{model:<12}{method:<34}{score:>9.4f}  {extra} {note}", flush=True)
        self.save()

    def add_means(self, model: str, columns: tuple[str, ...] = ()) -> None:
        """A row with mean and standard deviation for every method of several seeds.

        Its rows are those of the model named ``"method, seed N"``. A mean that is of
        other seeds by now is replaced.

        Args:
          model: Of the rows.
          columns: Others to give the mean of, where rows have them.
        """
        seeds: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            method, found, _ = row["method"].partition(", seed ")
            if found and row["model"] == model:
                seeds.setdefault(method, []).append(row)
        for method, rows in seeds.items():
            if len(rows) < 2:
                continue
            name, scores = f"{method}, mean", [row["score"] for row in rows]
            mean, spread = statistics.mean(scores), round(statistics.stdev(scores), 4)
            known = [r for r in self.rows if (r["model"], r["method"]) == (model, name)]
            if any((r["score"], r["spread"]) == (mean, spread) for r in known):
                continue
            self.rows = [row for row in self.rows if row not in known]
            there = [c for c in columns if all(c in row for row in rows)]
            more = {c: round(statistics.mean(r[c] for r in rows), 1) for c in there}
            self.add(model, name, "", mean, spread=spread, **more)

    def save(self) -> None:
        """Write everything so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "rows": self.rows,
        }
        self.path.write_text(json.dumps(report, indent=2) + "\n")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of all columns but those of time and bytes."""
    hidden = {"note", "seconds", "bytes"}
    columns = [c for c in dict.fromkeys(k for r in rows for k in r) if c not in hidden]
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(c, "")) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())["rows"]))
