"""The distillation experiments in small, and the means of their tables."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxcompress as jc
from experiments.distillation import losses, resnet_run
from experiments.models import resnet
from experiments.post_training.report import Report

RNG = np.random.default_rng(0)


def test_a_resnet_is_quantized_while_it_learns_from_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resnet_run, "STUDENT", 8)
    monkeypatch.setattr(resnet_run, "BATCH", 4)
    monkeypatch.setitem(resnet_run.LAST_MAPS, 8, "ResNet/layer3_0")
    x = RNG.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    maps = RNG.normal(size=(8, 8, 8, 64)).astype(np.float32)
    logits = RNG.normal(size=(8, 10)).astype(np.float32)
    lessons = resnet_run.Lessons(x, np.arange(8, dtype=np.int32), logits, maps)
    model = resnet.ResNet(8)
    before = jax.jit(model.init)(jax.random.key(0), resnet.normalize(x[:1]))
    with jax.numpy_dtype_promotion("standard"):
        after = resnet_run.fit(
            before, resnet_run.SETTINGS["2 bits"], [lessons], 0, losses.hints
        )
    block = after["params"]["layer1_0"]
    assert isinstance(block["conv1"]["kernel"], jc.quant.QuantizedArray)
    assert isinstance(after["params"]["conv1"]["kernel"], jax.Array)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before["batch_stats"], after["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


def test_means_follow_their_seeds(tmp_path: Path) -> None:
    report = Report("table", None, folder=tmp_path)
    report.add("a", "plain, seed 0", "", 1.0)
    report.add("b", "plain, seed 0", "", 9.0)
    report.add_means("a")
    assert ("a", "plain, mean") not in report
    for seed, score in ((1, 2.0), (2, 6.0)):
        report.add("a", f"plain, seed {seed}", "", score)
        report.add_means("a")
        report.add_means("a")
    for seed, size in ((0, 10), (1, 11)):
        report.add("a", f"small, seed {seed}", "", 1.0, size=size)
    report.add_means("a", ("size",))
    assert report.rows[-1]["size"] == 10.5
    means = [row for row in report.rows if row["method"] == "plain, mean"]
    assert [(row["model"], row["score"], row["spread"]) for row in means] == [
        ("a", 3.0, round(7**0.5, 4))
    ]
