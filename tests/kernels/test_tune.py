"""Tables of block sizes: measured, written, found again, and used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import formats, tables, tune
from kernels_pallas.layouts import GPU, PORTABLE, TPU, Stored
from kernels_pallas.quantized_matmul import api, quantized_matmul, xla
from kernels_pallas.target import Target
from tests.kernels.weights import random_weight

SIZE = 128
STORED = Stored(formats.INT4, SIZE, SIZE, 1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables._table.cache_clear()
    yield tmp_path
    tables._table.cache_clear()


def test_what_is_measured_is_written_and_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "LEAST_GAIN", 0.0)
    options = ["--sizes", str(SIZE), "--rows", "1", "--bits", "4", "--group", "0"]
    monkeypatch.setattr(sys, "argv", ["tune", *options, "--rounds", "2"])
    tune.main()
    report = json.loads((folder / "cpu.json").read_text())
    assert report["jax"] == jax.__version__
    entry = report["entries"][tables.key(1, STORED)]
    assert entry["microseconds"] > 0
    assert tables.tuned("cpu", 1, STORED) == entry["settings"]
    assert tables.tuned("cpu", 2, STORED) is None
    assert tables.tuned("TPU v6e", 1, STORED) is None


def test_a_table_decides_what_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"settings": {"chunk": 5 * SIZE}}
    entries = {"entries": {tables.key(3, STORED): settings}}
    (folder / "cpu.json").write_text(json.dumps(entries))
    seen: list[int] = []
    plain = xla.quantized_matmul

    def spy(*args: Any, chunk: int) -> jax.Array:
        seen.append(chunk)
        return plain(*args, chunk=chunk)

    monkeypatch.setattr(api.xla, "quantized_matmul", spy)
    rng = np.random.default_rng(0)
    weight, dense = random_weight(rng, formats.INT4, SIZE, SIZE, 1)
    x = jnp.asarray(rng.normal(size=(3, SIZE)), jnp.float32)
    y = jax.jit(lambda x, w: quantized_matmul(x, w, formats.INT4))(x, weight)
    assert seen == [5 * SIZE]
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense.T, atol=1e-3)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_candidates_are_what_the_form_takes(platform: str) -> None:
    layout = {"cpu": PORTABLE, "tpu": TPU, "gpu": GPU}[platform]
    stored = Stored(formats.INT4, 1024, 1024, 8, layout)
    found = list(tune.candidates(16, stored, Target(platform, "some")))
    assert len(found) > 3
    for settings in found:
        tune._form(stored, Target(platform, "some"), settings)
        assert json.loads(json.dumps(settings)) == settings


def test_rows_of_a_class_share_an_entry() -> None:
    keys = [tables.key(m, STORED) for m in (1, 2, 8, 9, 16, 17)]
    assert keys[1] == keys[2] != keys[0]
    assert keys[3] == keys[4] != keys[5]
