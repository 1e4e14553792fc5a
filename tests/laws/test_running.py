"""Laws of running: view equals storage, jit equals eager, eight devices equal one."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from tests.cases import Case
from tests.laws.setting import (
    assert_near,
    assert_same,
    batch,
    cases,
    cases_and_dtypes,
    packed,
    run,
    scheme,
    viewed,
    weights,
)
from tests.lift.programs import mesh


@cases
def test_jit_equals_eager_and_a_second_call_does_not_trace(case: Case) -> None:
    transform = scheme(case.rule())
    params, state = transform.init(weights())
    traces = []

    @jax.jit
    def view(params: Any, state: Any) -> Any:
        traces.append(None)
        return jc.materialize(transform.view(params, state))

    assert_same(view(params, state), jc.materialize(viewed(case)))
    view(*transform.update(params, state, grads=params))
    assert len(traces) == 1


@cases_and_dtypes
def test_view_and_storage_give_the_same_forward_pass(case: Case, dtype: Any) -> None:
    view, stored = viewed(case, dtype), packed(case, dtype)
    assert_same(jc.materialize(view), jc.materialize(stored))
    x = batch(dtype)
    np.testing.assert_array_equal(run(view, x), run(stored, x))


def on_devices(tree: Any, specs: Any) -> Any:
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh(), s), specs, is_leaf=lambda s: isinstance(s, P)
    )
    return jax.device_put(tree, shardings)


SPECS = {"matrix": P(None, "d"), "stack": P(None, None, "d"), "bias": P()}
WHOLE = (jc.prune.BitmaskArray, jc.hashing.HashedArray)
"""Leaves whose own axes cannot be cut."""


@cases
def test_eight_devices_find_the_same_bits(case: Case) -> None:
    transform = scheme(case.rule())
    view = lambda params: jc.materialize(transform.view(*transform.init(params)))
    found = jax.jit(view)(on_devices(weights(), SPECS))
    assert_near(found, jc.materialize(packed(case)), case.tolerance)


@cases
def test_a_sharded_leaf_runs_as_the_whole_one(case: Case) -> None:
    tree = {"matrix": packed(case)["matrix"]}
    cut_outputs = {
        "matrix": P() if isinstance(tree["matrix"], WHOLE) else SPECS["matrix"]
    }
    placed = on_devices(tree, jc.shardings(tree, cut_outputs, mesh()))
    product = jax.jit(jc.lift(lambda p, x: x @ p["matrix"]))
    np.testing.assert_allclose(
        product(placed, batch()), product(tree, batch()), rtol=1e-5, atol=1e-5
    )
