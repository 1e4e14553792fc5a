"""What holds for every method: the laws of leaves and transforms, over one table."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.layout import Axes
from tests.cases import CASES, PRESETS, Case, methods
from tests.lift.programs import mesh

LAYERS, WIDTH = 3, 128
AXES = {
    "matrix": Axes(contract=(-2,)),
    "stack": Axes(contract=(-2,), stack=1),
    "bias": Axes(contract=(-1,)),
}
EVERY = [
    pytest.param(case, marks=pytest.mark.slow if case.is_variant else (), id=str(case))
    for case in CASES
]
cases = pytest.mark.parametrize("case", EVERY)
dtypes = pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"]
)


def weights(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """A matrix and a stack of matrices, a tenth of them zeros, and a bias."""
    return dict(_weights(dtype))


@functools.cache
def _weights(dtype: Any) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        w = rng.normal(size=shape) * (rng.uniform(size=shape) > 0.1)
        return jnp.asarray(w, dtype)

    return {
        "matrix": draw(WIDTH, WIDTH),
        "stack": draw(LAYERS, WIDTH, WIDTH),
        "bias": draw(WIDTH),
    }


def scheme(rule: Any) -> jc.Transform:
    """The rule on both weights but not on the bias."""
    return jc.select({jc.where("*", exclude="bias"): rule}, axes=AXES)


def packed(case: Case, dtype: Any = jnp.float32) -> Any:
    """The stored form, computed once for all laws."""
    return dict(_packed(case, dtype))


@functools.cache
def _packed(case: Case, dtype: Any) -> Any:
    transform = scheme(case.rule())
    return transform.compress(*transform.init(weights(dtype)))


@functools.cache
def viewed(case: Case, dtype: Any = jnp.float32) -> Any:
    """What the forward pass sees before any update, computed once for all laws."""
    transform = scheme(case.rule())
    return transform.view(*transform.init(weights(dtype)))


def forward(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["matrix"] + p["bias"][None])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]


run = jax.jit(jc.lift(forward))


def batch(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), dtype)


def assert_same(a: Any, b: Any) -> None:
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_near(a: Any, b: Any, tolerance: float) -> None:
    """The same bits; with a tolerance, weights within so much of the largest."""
    if not tolerance:
        assert_same(a, b)
    pairs = zip(*(jax.tree.leaves(jc.materialize(t)) for t in (a, b)), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * float(abs(y).max()))


@dtypes
@cases
def test_materialize_keeps_structure_shapes_and_dtypes(case: Case, dtype: Any) -> None:
    dense = jc.materialize(packed(case, dtype))
    assert jax.tree.structure(dense) == jax.tree.structure(weights())
    for path, w in weights(dtype).items():
        assert (dense[path].shape, dense[path].dtype) == (w.shape, w.dtype)


@cases
def test_untouched_leaves_are_the_same_objects(case: Case) -> None:
    assert packed(case)["bias"] is weights()["bias"]


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


@cases
def test_compressing_what_was_compressed_changes_nothing(case: Case) -> None:
    once = packed(case)
    transform = scheme(case.rule())
    twice = transform.compress(*transform.init(jc.materialize(once)))
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert_near(twice, once, case.tolerance)


@dtypes
@cases
def test_view_and_storage_give_the_same_forward_pass(case: Case, dtype: Any) -> None:
    view, stored = viewed(case, dtype), packed(case, dtype)
    assert_same(jc.materialize(view), jc.materialize(stored))
    x = batch(dtype)
    np.testing.assert_array_equal(run(view, x), run(stored, x))


@cases
def test_zeros_stay_zero(case: Case) -> None:
    dense = jc.materialize(packed(case))
    for path, w in weights().items():
        zeros = np.asarray(dense[path])[np.asarray(w) == 0]
        assert zeros.size
        kept = case.keeps_zeros or case.adapts or path == "bias"
        assert (zeros == 0).all() == kept
    leaves = jax.tree.leaves(packed(case), is_leaf=jc.is_leaf)
    leaves = [x for x in leaves if isinstance(x, jc.Leaf)]
    assert all(x.preserves_zeros == case.keeps_zeros for x in leaves)
    blank = jax.tree.map(jnp.zeros_like, weights())
    transform = scheme(case.rule())
    for a in jax.tree.leaves(
        jc.materialize(transform.compress(*transform.init(blank)))
    ):
        assert not a.any()


@cases
def test_stored_bytes_are_those_of_the_buffers(case: Case) -> None:
    tree = packed(case)
    sizes = {row.path: row.memory_bytes for row in jc.report.size(tree).rows}
    for path, leaf in tree.items():
        buffers = sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        assert sizes[path] == buffers
        if isinstance(leaf, jc.Leaf):
            assert leaf.stored_bytes == buffers < weights()[path].nbytes


@cases
def test_a_stacked_leaf_can_be_sliced_scanned_and_mapped(case: Case) -> None:
    stack = packed(case)["stack"]
    dense = jc.materialize(stack)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda a, i=i: a[i], stack)
        np.testing.assert_array_equal(jc.materialize(layer), dense[i])
    scanned = jax.lax.scan(lambda _, w: (None, jc.materialize(w)), None, stack)[1]
    np.testing.assert_array_equal(scanned, dense)
    mapped = jax.vmap(jc.materialize)(stack)
    np.testing.assert_array_equal(mapped, dense)


@dtypes
@cases
def test_save_and_load_give_the_same_bits(
    case: Case, dtype: Any, tmp_path: Path
) -> None:
    jc.io.save(tmp_path / "m.jc", packed(case, dtype))
    assert_same(jc.io.load(tmp_path / "m.jc"), packed(case, dtype))


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


def some_pairs(first: Case, share: int) -> list[Case]:
    """Every `SHARES`-th case, another set for each first; always the exceptions.

    After a structure fewer: to what follows, a factor is an array like any other.
    """
    at = CASES.index(first)
    stride = 5 * SHARES if first.structure else SHARES
    exception = lambda second: second.fn is jc.identity or second.adapts
    return [
        second
        for i, second in enumerate(CASES)
        if (i - at) % stride == share or exception(second)
    ]


SHARES = 4
"""Of all pairs of two cases: one in each test run, the others in `make slow`."""
shares = pytest.mark.parametrize(
    "share",
    [pytest.param(n, marks=pytest.mark.slow if n else ()) for n in range(SHARES)],
)


@shares
@pytest.mark.parametrize("first", EVERY)
def test_a_later_transform_preserves_an_earlier_constraint(
    first: Case, share: int
) -> None:
    """A constraint holds where its own method changes nothing any more."""
    stack = {"stack": weights()["stack"]}
    alone = jc.select({"stack": first.rule()}, axes=AXES)
    seconds = some_pairs(first, share)
    refused = []
    for second in seconds:
        both = jc.chain(first.rule(), second.rule())
        transform = jc.select({"stack": both}, axes=AXES)
        try:
            params, state = transform.init(stack)
        except jc.OrderError:
            refused.append(str(second))
            continue
        except ValueError as error:
            if not (first.structure and (second.adapts or "divide" in str(error))):
                raise
            continue  # Groups and ranks of a weight are not those of its values.
        result = jc.materialize(transform.compress(params, state))
        assert_same(jc.materialize(transform.view(params, state)), result)
        again = jc.materialize(alone.view(*alone.init(result)))
        assert_near(again, result, first.tolerance)
    # Nothing but the identity may follow what fixes the value of every weight, no
    # adapters a mask, and no gates gates; only the identity may precede a structure.
    masks = hasattr(jc.prune, first.fn.__name__)
    same = [str(first)] if first.adapts or first.structure else []  # They are there.
    free = masks or first.structure or first.fn is jc.identity
    fixes_values = first.sealed or not free

    def may_follow(c: Case) -> bool:
        if c.fn is jc.identity or str(c) in same:
            return True
        late = c.structure and first.fn is not jc.identity
        again = first.once and str(c) == str(first)
        return not (fixes_values or late or again or (masks and c.adapts))

    assert refused == [str(c) for c in seconds if not may_follow(c)]


def test_every_public_method_is_a_case() -> None:
    families = (jc.quant, jc.prune, jc.lowrank, jc.hashing)
    public = set().union(*map(methods, families)) | {"identity", *PRESETS}
    assert {case.fn.__name__ for case in CASES} == public
