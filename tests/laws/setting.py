"""What the laws are tried on: weights, every case, and the forms of each."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.layout import Axes
from tests.cases import CASES, Case

LAYERS, WIDTH = 3, 128
AXES = {
    "matrix": Axes(contract=(-2,)),
    "stack": Axes(contract=(-2,), stack=1),
    "bias": Axes(contract=(-1,)),
}
EVERY = [
    pytest.param(case, marks=pytest.mark.slow if case.is_slow else (), id=str(case))
    for case in CASES
]
cases = pytest.mark.parametrize("case", EVERY)


def of_dtype(case: Case, dtype: Any) -> Any:
    """A case in a dtype; in bfloat16 only the first row of a function is not slow."""
    first = next(c for c in CASES if c.fn is case.fn)
    narrow = dtype == jnp.bfloat16
    slow = case.is_slow or (narrow and case is not first)
    marks = pytest.mark.slow if slow else ()
    return pytest.param(
        case, dtype, marks=marks, id=f"{case}-{'bf16' if narrow else 'f32'}"
    )


cases_and_dtypes = pytest.mark.parametrize(
    ("case", "dtype"),
    [of_dtype(case, dtype) for case in CASES for dtype in (jnp.float32, jnp.bfloat16)],
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


def assert_settled(case: Case, again: Any, once: Any) -> None:
    """What was compressed changes no more, but for a second fit's error."""
    if not case.refit:
        assert_near(again, once, case.tolerance)
        return
    pairs = zip(
        *(jax.tree.leaves(jc.materialize(t)) for t in (again, once)), strict=True
    )
    for x, y in pairs:
        assert jnp.square(x - y).sum() <= case.refit * jnp.square(y).sum()
