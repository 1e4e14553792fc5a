"""Soft rounding: the staircase, its limits, and the hard end of the schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def soft_by_hand(x: float, alpha: float) -> float:
    r = x - np.floor(x) - 0.5
    return np.floor(x) + 0.5 * np.tanh(alpha * r) / np.tanh(alpha / 2) + 0.5


def test_the_staircase_is_that_of_the_paper_and_has_both_limits() -> None:
    x = jnp.linspace(-2.3, 2.3, 23)
    run = jax.jit(q.soft_round)
    for alpha in (0.5, 4.0):
        hand = [soft_by_hand(float(v), alpha) for v in x]
        np.testing.assert_allclose(run(x, alpha), hand, atol=1e-5)
    np.testing.assert_allclose(run(x, 1e-2), x, atol=1e-4)
    np.testing.assert_allclose(run(x, 200.0), np.round(x), atol=1e-5)


@pytest.mark.parametrize(
    "fmt", [q.int3(group_size=4), q.int3(symmetric=False)], ids=lambda f: f.name
)
def test_the_view_sharpens_and_ends_as_what_is_stored(fmt: q.NumberFormat) -> None:
    sharpness = jc.schedules.linear(0.01, 60.0, begin=0, end=2)
    scheme = q.soft_rounding(fmt, sharpness=sharpness, end=3)
    w = draw(8, 3)
    params, state = scheme.init({"w": w})

    @jax.jit
    def seen(params: Any, state: Any) -> Any:
        view = lambda p: jc.materialize(scheme.view(p, state))["w"]
        stored = jc.materialize(scheme.compress(params, state))["w"]
        return view(params), stored, jax.grad(lambda p: view(p).sum())(params)["w"]

    errors, slopes = [], []
    for _ in range(4):
        view, stored, slope = seen(params, state)
        errors.append(float(jnp.abs(view - stored).max()))
        slopes.append(np.asarray(slope))
        params, state = scheme.update(params, state)
    # A zero point is rounded, so that an end of the range may be clipped.
    at_first = np.round(slopes[0], 2)
    assert set(np.unique(at_first)) <= {0.0, 1.0}
    assert at_first.mean() > 0.8
    assert fmt.name == "uint3" or at_first.all()
    assert slopes[1].std() > 0.1
    assert errors[0] > errors[2] > 0
    assert errors[3] == 0
    assert (slopes[3] == 1).all()
    error = jnp.abs(seen(params, jnp.int32(0))[0] - w) * at_first
    assert error.max() < 0.02


def test_zeros_stay_zero_on_the_way() -> None:
    scheme = q.soft_rounding(q.int4(), sharpness=3.0, end=9)
    params, state = scheme.init({"w": jnp.zeros((4, 2)).at[0, 0].set(1.0)})
    view = jax.jit(lambda p: jc.materialize(scheme.view(p, state)))(params)["w"]
    assert np.count_nonzero(np.abs(np.asarray(view)) > 1e-6) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.soft_rounding(q.nf4(), sharpness=1.0, end=1), "must be integers"),
        (
            lambda: q.soft_rounding(
                q.int4(rounding="stochastic"), sharpness=1.0, end=1
            ),
            "must be 'nearest'",
        ),
        (lambda: q.soft_rounding(q.int4(), sharpness=1.0, end=-1), "got -1"),
    ],
)
def test_what_has_no_staircase_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
