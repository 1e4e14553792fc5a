"""Allocations against bisection in float64, and the masks they give."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import prune
from tests.quant.wrapping import run

SHAPES = {
    "first": (3, 3, 3, 16),
    "middle": (3, 3, 16, 32),
    "wide": (512, 256),
    "head": (32, 10),
    "scale": (32,),
}
SIZES = {path: int(np.prod(shape)) for path, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())


def erk_by_bisection(sparsity: float, copies: dict[str, int]) -> dict[str, float]:
    """The factor of the clipped densities, found by halving."""
    raw = {p: sum(s) / np.prod(s, dtype=np.float64) for p, s in SHAPES.items()}
    n = {p: SIZES[p] * copies.get(p, 1) for p in SHAPES}
    low, high = 0.0, 1e9
    for _ in range(200):
        factor = (low + high) / 2
        kept = sum(n[p] * min(1.0, factor * raw[p]) for p in SHAPES)
        below = kept < (1 - sparsity) * sum(n.values())
        low, high = (factor, high) if below else (low, factor)
    return {p: 1 - min(1.0, high * raw[p]) for p in SHAPES}


@hypothesis.given(
    sparsity=st.floats(0.001, 0.999),
    copies=st.sampled_from([{}, {"head": 40}, {"wide": 3, "first": 7}]),
)
def test_erk_is_the_clipped_density_that_meets_the_sparsity(
    sparsity: float, copies: dict[str, int]
) -> None:
    found = prune.erk()(SHAPES, sparsity, copies=copies)
    expected = erk_by_bisection(sparsity, copies)
    assert list(found) == list(SHAPES)
    np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=0, atol=1e-9
    )
    n = {p: SIZES[p] * copies.get(p, 1) for p in SHAPES}
    overall = sum(n[p] * found[p] for p in SHAPES) / sum(n.values())
    assert overall == pytest.approx(sparsity, abs=1e-12)


def test_erk_clips_several_layers() -> None:
    """Settings at which the property test is about clipping at all."""
    dense = [sum(d == 0 for d in prune.erk()(SHAPES, s).values()) for s in (0.99, 0.3)]
    assert dense[0] < dense[1] < len(SHAPES)
    assert dense[1] >= 3


def test_uniform_gives_all_the_same() -> None:
    assert prune.uniform()(SHAPES, 0.75) == dict.fromkeys(SHAPES, 0.75)


def test_what_is_kept_dense_is_made_up_for() -> None:
    for make in (prune.uniform, prune.erk):
        found = make(dense=jc.where("*", exclude=("middle", "wide")))(SHAPES, 0.75)
        assert [p for p in SHAPES if found[p] == 0] == ["first", "head", "scale"]
        overall = sum(SIZES[p] * found[p] for p in SHAPES) / TOTAL
        assert overall == pytest.approx(0.75, abs=1e-12)
    equal = prune.uniform(dense="first")(SHAPES, 0.75)
    assert len(set(equal.values())) == 2


@pytest.mark.parametrize("make", [prune.uniform, prune.erk])
def test_traced_sparsities_are_those_of_numbers(make: Any) -> None:
    allocation = make(dense="head")
    traced = jax.jit(lambda s: allocation(SHAPES, s))
    for sparsity in (0.0, 0.3, 0.9, 0.99):
        found = traced(jnp.float32(sparsity))
        expected = allocation(SHAPES, sparsity)
        for path in SHAPES:
            assert found[path].dtype == jnp.float32
            np.testing.assert_allclose(found[path], expected[path], atol=1e-6)


def params(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = {"small": (4, 10), "large": (40, 50), "stack": (3, 20, 20)}
    return {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}


AXES = {"small": jc.Axes(contract=(-2,)), "large": jc.Axes(contract=(-2,))}
AXES["stack"] = jc.Axes(contract=(-2,), stack=1)


def kept(state: Any) -> dict[str, np.ndarray]:
    """Weights kept, by layer of a stack."""
    (chosen,) = state
    masks = {p: np.asarray(m) for p, (m,) in chosen.state.masks.items()}
    return {p: m.sum(axis=(-2, -1)) for p, m in masks.items()}


def test_erk_as_a_scope_keeps_the_largest_of_each_layer_on_a_schedule() -> None:
    schedule = jc.schedules.linear(0.0, 0.9, begin=0, end=2)
    rule = prune.magnitude(sparsity=schedule, scope=prune.erk())
    scheme = jc.select({"*": rule}, axes=AXES)
    weights, state = run(scheme.init, params(0))
    update = jax.jit(scheme.update).lower(weights, state).compile()
    shapes = {"small": (4, 10), "large": (40, 50), "stack": (20, 20)}
    for sparsity in (0.0, 0.45, 0.9):
        share = prune.erk()(shapes, sparsity, copies={"stack": 3})
        for path, count in kept(state).items():
            n = int(np.prod(shapes[path]))
            expected = n - np.floor(share[path] * n + 0.5)
            np.testing.assert_array_equal(count, expected, err_msg=path)
        count_of_large = kept(state)["large"]
        weights, state = update(weights, state)
    assert len({round(float(s), 3) for s in share.values()}) == 3
    order = np.argsort(np.abs(params(0)["large"]), axis=None)
    largest = np.sort(order[-int(count_of_large) :])
    np.testing.assert_array_equal(largest, np.flatnonzero(weights["large"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prune.erk()(SHAPES, 1.0), r"sparsity .* \[0, 1\); got 1\.0"),
        (lambda: prune.erk()({}, 0.5), "shapes is empty"),
        (
            lambda: prune.uniform(dense="wide")(SHAPES, 0.5),
            r"the weights that 'wide' leaves are 0\.0\d+ of all, too few",
        ),
        (lambda: prune.erk(dense="missing")(SHAPES, 0.5), "'missing' matches nothing"),
        (
            lambda: prune.magnitude(sparsity=0.5, scope="erk"),  # type: ignore[arg-type]
            r"scope must be 'layer', 'global' or an allocation .* got 'erk'",
        ),
        (
            lambda: prune.magnitude(sparsity=prune.nm(2, 4), scope=prune.erk()),
            r"scope is an option of a fraction",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
