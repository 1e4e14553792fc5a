"""Each weight alone: against compressing it by hand and running the function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

q = jc.quant


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(p: Any, x: jax.Array, scale: float = 1.0) -> jax.Array:
    return jnp.tanh(x @ p["in"]["kernel"]) @ p["out"]["kernel"] * scale


PARAMS = {
    "in": {"kernel": draw(0, 16, 8) / 4},
    "out": {"kernel": draw(1, 8, 4)},
}
BATCHES = [draw(2, 5, 16), (draw(3, 5, 16), 2.0)]
traces: list[None] = []
dense = jax.jit(q.fake_quantize, static_argnums=1)


def counted(p: Any, x: jax.Array, scale: float = 1.0) -> jax.Array:
    traces.append(None)
    return model(p, x, scale)


@functools.cache
def found() -> jc.report.SensitivityReport:
    rules = {"*/kernel": [q.int2(), q.int4()]}
    return jc.report.sensitivity(counted, PARAMS, BATCHES, rules)


def by_hand(path: str, fmt: Any) -> float:
    name, _ = path.split("/")
    rounded = dense(PARAMS[name]["kernel"], fmt)
    changed = {**PARAMS, name: {"kernel": rounded}}
    changes = []
    for batch in BATCHES:
        batch = batch if isinstance(batch, tuple) else (batch,)
        y, z = (np.asarray(model(p, *batch), np.float64) for p in (PARAMS, changed))
        changes.append(np.linalg.norm(z - y) / np.linalg.norm(y))
    return float(np.mean(changes))


def test_rows_are_what_each_weight_does_alone_largest_first() -> None:
    rows = found().rows
    assert len(rows) == 4
    assert [r.change for r in rows] == sorted((r.change for r in rows), reverse=True)
    for path in ("in/kernel", "out/kernel"):
        assert [r.method for r in found().of(path)] == ["int2", "int4"]
    row = found().of("in/kernel")[1]
    assert row.change == pytest.approx(by_hand("in/kernel", q.int4()), rel=1e-3)
    row = found().of("out/kernel")[0]
    assert row.change == pytest.approx(by_hand("out/kernel", q.int2()), rel=1e-3)


def test_bytes_of_each_choice() -> None:
    row = found().of("in/kernel")[1]
    assert (row.dense_bytes, row.stored_bytes) == (16 * 8 * 4, 16 * 8 // 2 + 8 * 4)


def test_all_choices_run_one_program() -> None:
    found()
    # The axes, and for both kinds of batch the outputs and the change.
    assert len(traces) == 1 + 2 * 2


def test_the_metric_is_the_callers() -> None:
    report = jc.report.sensitivity(
        model, PARAMS, BATCHES[:1], {"in/*": q.int3()}, metric=jc.report.kl_divergence
    )
    (row,) = report.rows
    rounded = {**PARAMS, "in": {"kernel": dense(PARAMS["in"]["kernel"], q.int3())}}
    logits, logits_q = (model(p, BATCHES[0]) for p in (PARAMS, rounded))
    expected = jc.report.kl_divergence(logits, logits_q)
    assert row.change == pytest.approx(float(expected), rel=1e-3)


def test_activations_are_quantized_too_where_the_format_says_so() -> None:
    run = lambda fmt: jc.report.sensitivity(model, PARAMS, BATCHES[:1], {"out/*": fmt})
    plain, both = run(q.int8()), run(q.int8(activations=q.dynamic(q.Integer(bits=4))))
    assert both.rows[0].change > 3 * plain.rows[0].change


def test_the_table() -> None:
    lines = str(found()).splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["weight", "method", "change", "dense", "stored"]
    assert found().to_dict()["rows"][0]["method"] == "int2"


def test_relative_change_of_trees() -> None:
    change = jc.report.relative_change
    y = {"a": jnp.array([3.0]), "n": jnp.array([1]), "b": jnp.array([0.0, 4.0])}
    z = {"a": jnp.array([3.0]), "n": jnp.array([9]), "b": jnp.array([1.0, 4.0])}
    assert change(y, z) == pytest.approx(0.2)
    zero = jnp.zeros(2)
    assert change(zero, zero) == 0
    assert change(zero, zero + 1) == np.inf
    with pytest.raises(ValueError, match="no output is floating"):
        change(jnp.array([1]), jnp.array([2]))


def test_nothing_to_measure_is_named() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        jc.report.sensitivity(model, PARAMS, [], {"**": q.int8()})
    with pytest.raises(ValueError, match="sensitivity: rule 'middle' matches nothing"):
        jc.report.sensitivity(model, PARAMS, BATCHES, {"middle": q.int8()})
