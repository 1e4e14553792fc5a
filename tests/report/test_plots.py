"""What the histograms count, and how a missing library is named."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

W = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
PARAMS = {"a": W, "b": 2.0 * W, "bias": W[0]}
quantize = jax.jit(lambda w: jc.quant.quantize(w, jc.quant.int3()))
PACKED = {"a": quantize(W), "b": quantize(2.0 * W), "bias": W[0]}


def counts(axis: Any) -> list[np.ndarray]:
    return [patch.get_data().values for patch in axis.patches]


def test_every_compressed_weight_has_its_distributions() -> None:
    figure = jc.report.histograms(PARAMS, PACKED, bins=20)
    assert [a.get_title() for a in figure.axes] == ["a: int3", "b: int3"]
    for axis in figure.axes:
        before, after = counts(axis)
        assert before.sum() == after.sum() == W.size
        assert len(before) == len(after) == 20
        assert axis.get_legend_handles_labels()[1] == ["before", "after"]
    patch: Any = figure.axes[0].patches[0]
    before, edges = patch.get_data().values, patch.get_data().edges
    np.testing.assert_array_equal(before, np.histogram(np.asarray(W), edges)[0])


def test_a_path_and_a_logarithmic_axis(tmp_path: Any) -> None:
    figure = jc.report.histograms(PARAMS, PACKED, path="b", log=True)
    assert [a.get_title() for a in figure.axes] == ["b: int3"]
    assert figure.axes[0].get_yscale() == "log"
    figure.savefig(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_constant_weights_have_a_histogram() -> None:
    zeros = jnp.zeros((4, 2))
    packed = {"w": quantize(zeros)}
    (axis,) = jc.report.histograms({"w": zeros}, packed, bins=5).axes
    assert [c.sum() for c in counts(axis)] == [8, 8]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="rule 'bias' matches nothing"):
        jc.report.histograms(PARAMS, PACKED, path="bias")
    with pytest.raises(ValueError, match="no weight 'a' of shape"):
        jc.report.histograms({**PARAMS, "a": W[:3]}, PACKED)
    with pytest.raises(ValueError, match="bins must be a positive integer"):
        jc.report.histograms(PARAMS, PACKED, bins=0)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="extra 'plots'"):
        jc.report.histograms(PARAMS, PACKED)
