"""The experiment of pruning after training, on one batch and a few stories."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("tokenizers")

from experiments.post_training.report import Report
from experiments.pruning_after_training import run


def test_sparsegpt_beats_magnitude(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("magnitude, each output", "SparseGPT as published")
    every = run.methods
    monkeypatch.setattr(
        run, "methods", lambda *inputs: {n: every(*inputs)[n] for n in names}
    )
    report = Report("results", None, folder=tmp_path)
    part = {"test": (1200, 1202)}
    run.of_stories(report, data_dir, batches=1, parts=part, patterns={"50%": 0.5})
    dense, magnitude, sparsegpt = (row["score"] for row in report.rows)
    assert dense < 1.9
    assert dense < sparsegpt < magnitude - 0.3
    run.of_stories(report, data_dir, batches=1, parts=part, patterns={"50%": 0.5})
    assert len(report.rows) == 3
