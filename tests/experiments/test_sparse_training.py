"""The comparison of sparse training runs, in few steps; sharded masks are the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from experiments.digits.run import Part, load
from experiments.sparse_training import run, sharded
from experiments.sparse_training.methods import METHODS, SR_STE, Settings, runs, scheme
from experiments.sparse_training.training import train

FEW = Settings(seeds=(0,), width=16, steps=8, checkpoints=2, every=2, sparsities=(0.5,))


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """As `optax` needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def images() -> Part:
    return load()[0]


def test_every_method_is_trained_where_it_applies() -> None:
    pairs = runs(Settings())
    assert len(pairs) == len(set(pairs)) == 1 + 2 * (len(METHODS) - 1) - 1
    assert (SR_STE, 0.9) not in pairs


@pytest.mark.parametrize("name", METHODS)
def test_every_method_traces(name: str, images: Part) -> None:
    program = functools.partial(train, name, 0.5, FEW, images)
    found = jax.eval_shape(program, jax.random.key(0))
    assert found.params["params"]["Dense_0"]["kernel"].shape == (64, 16)


def test_a_method_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .* got 'lottery'"):
        scheme("lottery", 0.5, FEW, jax.random.key(0))


def test_a_short_run_is_measured(capsys: Any) -> None:
    settings = dataclasses.replace(FEW, methods=("dense", "SET"))
    results = run.run(settings, check=(), steps=4)
    dense, moving = results["rows"]
    assert dense["zeros"] == 0.0
    assert moving["zeros"] == pytest.approx(0.5, abs=0.01)
    assert moving["density_in_training"] == pytest.approx(0.5, abs=0.01)
    assert moving["overlap"]["with_last"][-1] == 1.0
    assert moving["overlap"]["with_last"][0] < 0.9
    assert "SET" in capsys.readouterr().out


def test_eight_devices_find_the_masks_of_one(images: Part) -> None:
    found = sharded.compare("RigL", 0.5, FEW, images, steps=8)
    assert found["devices"] == 8
    assert found["kernels_are_cut"]
    assert found["mask_changes"] > 20
    assert found["masks_are_identical"]
