"""Weights and operations of every layer, counted by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RNG = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"a": (3, 8), "b": (8,), "c": (8, 4)}.items()
}
X = jnp.ones((5, 3))


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]


def test_masked_weights_save_operations_in_proportion() -> None:
    half = {"c": jc.prune.magnitude(sparsity=0.75)}
    packed = jc.compress(PARAMS, half)
    report = jc.report.pruning(mlp, PARAMS, packed, X)
    a, b, c = report.rows
    assert (c.weights, c.weights_left, c.sparsity) == (32, 8, 0.75)
    assert (c.flops, c.flops_left) == (2 * 5 * 8 * 4, 5 * 8 * 4 // 2)
    assert (a.flops, a.flops_left) == (2 * 5 * 3 * 8,) * 2
    assert (b.flops, b.flops_left) == (0, 0)
    assert report.sparsity == pytest.approx(24 / 64)
    assert report.speedup == pytest.approx((240 + 320) / (240 + 80))
    assert "75.0%" in str(report)


def test_smaller_weights_have_another_shape() -> None:
    smaller = jc.prune.structured(mlp, PARAMS, X, parameters=0.5)
    report = jc.report.pruning(mlp, PARAMS, smaller.params, X, fn_after=smaller.fn)
    left = {r.path: r.left for r in report.rows}
    assert left == {k: w.shape for k, w in smaller.params.items()}
    assert sum(r.flops_left for r in report.rows) == smaller.after.flops
    assert sum(r.weights_left for r in report.rows) == smaller.after.parameters


def test_params_that_are_gone_are_said_to_be() -> None:
    params = {**PARAMS, "d": jnp.ones((4, 4))}
    fn = lambda p, x: mlp(p, x) @ p["d"]
    report = jc.report.pruning(fn, params, PARAMS, X, fn_after=mlp)
    (row,) = (r for r in report.rows if r.path == "d")
    assert (row.left, row.weights_left, row.flops_left) == (None, 0, 0)
    assert "gone" in str(report)
    with pytest.raises(ValueError, match=r"after has 'd', which before has not"):
        jc.report.pruning(mlp, PARAMS, params, X)


def test_pictures_of_layers_and_overlaps() -> None:
    smaller = jc.prune.structured(mlp, PARAMS, X, parameters=0.5)
    report = jc.report.pruning(mlp, PARAMS, smaller.params, X, fn_after=smaller.fn)
    figure = jc.report.layers(report)
    weights, flops = figure.axes
    assert [t.get_text() for t in weights.get_yticklabels()] == ["c", "a"]
    widths = [bar.get_width() for bar in flops.patches]
    used = [r for r in report.rows if r.flops][::-1]
    assert widths == [r.flops for r in used] + [r.flops_left for r in used]
    history = {0: {"w": 1.0, "v": 1.0}, 10: {"w": 0.5, "v": 0.75}}
    (axis,) = jc.report.overlaps(history).axes
    lines = {str(line.get_label()): line.get_ydata() for line in axis.lines}
    assert {k: list(map(float, v)) for k, v in lines.items()} == {
        "w": [1.0, 0.5],
        "v": [1.0, 0.75],
    }
    with pytest.raises(ValueError, match="history must have at least one step"):
        jc.report.overlaps({})
