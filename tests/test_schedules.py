"""Schedules against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

STEPS = np.arange(-2, 16)


def zhu_gupta(t: int, *, initial: float, final: float, begin: int, end: int) -> float:
    """Zhu & Gupta, 2017, equation 1, held at its ends."""
    if t <= begin:
        return initial
    if t >= end:
        return final
    return final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3


CASES: dict[str, tuple[Any, Callable[[int], float]]] = {
    "constant": (jc.schedules.constant(0.3), lambda t: 0.3),
    "one_shot": (jc.schedules.one_shot(0.7, at=4), lambda t: 0.7 if t >= 4 else 0.0),
    "one_shot from": (
        jc.schedules.one_shot(0.7, at=4, before=0.2),
        lambda t: 0.7 if t >= 4 else 0.2,
    ),
    "linear": (
        jc.schedules.linear(0.1, 0.8, begin=3, end=10),
        lambda t: np.interp(t, [3, 10], [0.1, 0.8]),
    ),
    "linear down": (
        jc.schedules.linear(8.0, 1.0, begin=0, end=11),
        lambda t: np.interp(t, [0, 11], [8.0, 1.0]),
    ),
    "cubic": (
        jc.schedules.cubic(0.2, 0.9, begin=2, end=12),
        lambda t: zhu_gupta(t, initial=0.2, final=0.9, begin=2, end=12),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_formula(name: str) -> None:
    schedule, formula = CASES[name]
    values = jax.jit(schedule)(jnp.asarray(STEPS, jnp.int32))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [formula(t) for t in STEPS], rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_scalar_step_gives_a_scalar(name: str) -> None:
    schedule, formula = CASES[name]
    value = schedule(jnp.int32(5))
    assert (value.shape, value.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(value, formula(5), rtol=1e-6)


@pytest.mark.parametrize("ramp", [jc.schedules.linear, jc.schedules.cubic])
def test_both_ends_are_reached_exactly(ramp: Any) -> None:
    schedule = ramp(0.0, 0.9, begin=10, end=30_000)
    assert schedule(jnp.int32(10)) == 0.0
    assert schedule(jnp.int32(30_000)) == schedule(jnp.int32(10**9)) == np.float32(0.9)


@pytest.mark.parametrize("ramp", [jc.schedules.linear, jc.schedules.cubic])
@pytest.mark.parametrize("end", [5, 4])
def test_a_ramp_that_does_not_rise_in_time_is_refused(ramp: Any, end: int) -> None:
    with pytest.raises(ValueError, match=rf"end must be after .* begin=5, end={end}"):
        ramp(0.0, 1.0, begin=5, end=end)
