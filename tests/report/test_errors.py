"""Errors by layer, against products written out in NumPy float64."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

LAYERS, WIDTH = 3, 8


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embedding"][tokens]
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    experts = jnp.einsum("ebi,eio->ebo", jnp.stack([x, x * x]), p["experts"])
    return jnp.einsum("ebo,coe->bc", experts, p["head"]) + p["bias"][None]


@functools.cache
def setting() -> Any:
    params = {
        "embedding": draw(0, 12, WIDTH),
        "layers": draw(1, LAYERS, WIDTH, WIDTH) / 3,
        "experts": draw(2, 2, WIDTH, WIDTH),
        "head": draw(3, 5, WIDTH, 2),
        "bias": draw(4, 5),
    }
    batches = [jnp.array([0, 3, 7, 11]), jnp.array([1, 1, 2, 5])]
    rules = {
        "embedding": jc.quant.int8(),
        "layers": jc.quant.int4(),
        "experts": jc.quant.int4(),
        "head": jc.quant.int3(),
    }
    axes = jc.trace_axes(model, params, batches[0])
    scheme = jc.select(rules, axes=axes)
    state = scheme.init(params)[1]
    packed = jax.jit(scheme.compress)(params, state)
    return params, packed, batches, jc.report.errors(model, params, packed, batches)


def relative(error: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(whole))


def by_hand() -> dict[tuple[str, tuple[int, ...]], float]:
    """Outputs of each matmul on both batches, with original and compressed weight."""
    params, packed, batches, _ = setting()
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    dense = jax.jit(jc.materialize)(packed)
    q = jax.tree.map(lambda a: np.asarray(a, np.float64), dense)
    x = p["embedding"][np.concatenate(batches)]
    found = {}
    for i in range(LAYERS):
        w, v = p["layers"][i], q["layers"][i]
        found["layers", (i,)] = relative(x @ (w - v), x @ w)
        x = np.tanh(x @ w)
    for e in range(2):
        w, v = p["experts"][e], q["experts"][e]
        found["experts", (e,)] = relative(x ** (e + 1) @ (w - v), x ** (e + 1) @ w)
    outs = np.einsum("ebi,eio->ebo", np.stack([x, x * x]), p["experts"])
    head = lambda w: np.einsum("ebo,coe->bc", outs, w)
    found["head", ()] = relative(head(p["head"] - q["head"]), head(p["head"]))
    return found


def test_output_errors_are_those_of_the_products() -> None:
    report = setting()[-1]
    found = {(r.path, r.index): r.output_error for r in report.rows if r.output_error}
    expected = by_hand()
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3), key
        assert 0.005 < value < 0.5


def test_weight_errors_and_decibels() -> None:
    params, packed, _, report = setting()
    dense = jax.jit(jc.materialize)(packed)
    for row in report.rows:
        w = np.asarray(params[row.path], np.float64)[row.index]
        error = relative(np.asarray(dense[row.path], np.float64)[row.index] - w, w)
        assert row.weight_error == pytest.approx(error, rel=1e-4)
        assert row.weight_sqnr_db == pytest.approx(-20 * math.log10(error), abs=0.01)
        assert row.method == packed[row.path].method


def test_a_looked_up_weight_has_no_output_error() -> None:
    rows = setting()[-1].of("embedding")
    assert [(r.index, r.output_error, r.output_sqnr_db) for r in rows] == [
        ((), None, None)
    ]


def test_inputs_decide_which_error_counts() -> None:
    """An error in a channel that is never used is no error of the output."""
    params = {"w": jnp.array([[1.0, 1.0], [1.0, 0.0]])}
    packed = {"w": pack(jnp.array([[1.0, 1.0], [9.0, 0.0]]))}
    fn = lambda p, x: x @ p["w"]
    unused = jnp.array([[2.0, 0.0], [1.0, 0.0]])
    (row,) = jc.report.errors(fn, params, packed, [unused]).rows
    assert row.weight_error > 1
    assert row.output_error is not None
    assert row.output_error < 0.01
    (row,) = jc.report.errors(fn, params, packed, [jnp.eye(2)]).rows
    assert row.output_error == pytest.approx(row.weight_error, rel=1e-5)


@jax.jit
def pack(w: jax.Array) -> jc.quant.QuantizedArray:
    return jc.quant.quantize(w, jc.quant.int8())


def test_zeros_have_defined_errors() -> None:
    zero = jnp.zeros((4, 2))
    zeros = pack(zero)
    ones = zeros.replace(words=zeros.words + jnp.uint8(1), scale=zeros.scale + 1.0)
    fn = lambda p, x: x @ p["a"] + x @ p["b"]
    report = jc.report.errors(
        fn, {"a": zero, "b": zero}, {"a": zeros, "b": ones}, [jnp.ones((1, 4))]
    )
    a, b = report.rows
    assert (a.weight_error, a.output_error, a.weight_sqnr_db) == (0, 0, math.inf)
    assert (b.weight_error, b.output_error) == (math.inf, math.inf)
    rows = json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"]
    assert rows[0]["weight_error"] == 0
    assert rows[1]["weight_error"] is None


def test_the_table_and_the_worst() -> None:
    report = setting()[-1]
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.rows) == 1 + 1 + LAYERS + 2 + 1
    assert any(line.startswith("layers[2]") and "dB" in line for line in lines)
    worst = report.worst(2).rows
    assert worst[0].path == "head"
    assert len(worst) == 2
    assert worst[0].output_error > worst[1].output_error


def test_what_does_not_fit_is_named() -> None:
    params, packed, batches, _ = setting()
    errors = functools.partial(jc.report.errors, model)
    with pytest.raises(ValueError, match="no compressed leaves"):
        errors(params, params, batches)
    with pytest.raises(ValueError, match="batches is empty"):
        errors(params, packed, [])
    other = {**params, "layers": params["layers"][:2]}
    with pytest.raises(ValueError, match=r"'layers' of shape \(3, 8, 8\), params one"):
        errors(other, packed, batches)
    with pytest.raises(ValueError, match=r"'head' of shape .*, params none"):
        errors({k: v for k, v in params.items() if k != "head"}, packed, batches)
