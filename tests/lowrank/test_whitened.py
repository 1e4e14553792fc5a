"""Activation-aware factors: none of their rank has a smaller error of the outputs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress import lowrank
from jaxcompress.lift import statistics
from tests.lowrank.weights import STACK, best_product, draw, energy, run

ROWS, INPUTS, OUTPUTS = 40, 8, 6


def inputs(seed: int, *, live: int = INPUTS) -> jax.Array:
    """Correlated, of very different sizes, in a space of `live` dimensions."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(live, INPUTS)) * 10.0 ** rng.uniform(-1, 1, (live, 1))
    return jnp.asarray(rng.normal(size=(ROWS, live)) @ mix, jnp.float32)


@functools.partial(jax.jit, static_argnames=("rank", "damping"))
def fitted(w: jax.Array, x: jax.Array, rank: int, damping: float = 0.0) -> jax.Array:
    stats = statistics(x, gram=True)
    leaf = lowrank.whitened_weight(w, rank, stats, damping=damping)
    return leaf.materialize()


def output_error(w: Any, other: Any, x: Any) -> float:
    return energy(np.float64(x) @ (np.float64(w) - np.float64(other)))


def oracle(w: Any, x: Any, rank: int) -> float:
    """What Eckart and Young leave of ``X W``, whose products ``X W'`` have the rank."""
    return energy(np.linalg.svd(np.float64(x) @ np.float64(w))[1][rank:])


def descended(w: Any, x: Any, rank: int, seed: int) -> np.ndarray:
    """Factors fitted in turn, each exactly given the other, from random ones."""
    w, x = np.float64(w), np.float64(x)
    right = np.random.default_rng(seed).normal(size=(rank, w.shape[1]))
    left = np.zeros((w.shape[0], rank))
    for _ in range(30):
        left = w @ np.linalg.pinv(right)
        right = np.linalg.lstsq(x @ left, x @ w, rcond=None)[0]
    return left @ right


@given(
    seed=st.integers(0, 1000),
    rank=st.sampled_from([1, 3, 5]),
    live=st.sampled_from([4, INPUTS]),
    size=st.sampled_from([-20, 0, 20]),
)
def test_no_other_factors_have_a_smaller_output_error(
    seed: int, rank: int, live: int, size: int
) -> None:
    """Plain SVD, random ones, and those that descend; inputs of full rank and not."""
    x, w = inputs(seed, live=live), draw(seed + 1, INPUTS, OUTPUTS) * 2.0**size
    found = output_error(w, fitted(w, x, rank), x)
    total = output_error(w, 0.0, x)
    slack = 1e-5 * total
    assert found <= oracle(w, x, rank) + slack
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(INPUTS, rank)) @ rng.normal(size=(rank, OUTPUTS))
    others = (best_product(w, rank), noise * 2.0**size, descended(w, x, rank, seed))
    assert all(found <= output_error(w, other, x) + slack for other in others)


def test_it_beats_plain_svd_where_inputs_differ_and_loses_on_the_weight() -> None:
    x, w = inputs(0), draw(1, INPUTS, OUTPUTS)
    white, plain = fitted(w, x, 3), best_product(w, 3)
    assert output_error(w, white, x) < 0.5 * output_error(w, plain, x)
    assert energy(w - white) > energy(w - plain)


def test_with_white_inputs_it_is_plain_svd() -> None:
    w = draw(1, INPUTS, OUTPUTS)
    found = fitted(w, jnp.eye(INPUTS), 3)
    np.testing.assert_allclose(found, best_product(w, 3), atol=1e-5)


def test_what_no_input_has_seen_is_factored_as_plainly_as_can_be() -> None:
    """Damping gives the last rank to the weights of inputs that are always zero."""
    x = jnp.eye(INPUTS).at[4:].set(0.0)
    w = jnp.zeros((INPUTS, OUTPUTS)).at[0, 0].set(1.0).at[6, 3].set(5.0)
    found = np.asarray(fitted(w, x, 2, damping=1e-6))
    np.testing.assert_allclose(found, w, atol=1e-4)


def test_stack_entries_without_rows_are_plain() -> None:
    w = draw(2, 2, INPUTS, OUTPUTS)
    x = jnp.stack([inputs(0), inputs(1)])
    mask = jnp.stack([jnp.ones(ROWS), jnp.zeros(ROWS)])

    def fn(w: Any, x: Any) -> Any:
        stats = statistics(x, weights=mask, gram=True)
        return lowrank.whitened_weight(w, 2, stats, axes=STACK).materialize()

    found = run(fn, w, x)
    np.testing.assert_allclose(found[1], best_product(w[1], 2), atol=1e-4)
    assert output_error(w[0], found[0], x[0]) <= oracle(w[0], x[0], 2) * 1.01


def test_a_table_whose_columns_are_contracted_is_whitened_along_them() -> None:
    x, w = inputs(0), draw(1, INPUTS, OUTPUTS)

    def fn(w: Any, x: Any) -> Any:
        stats = statistics(x, gram=True)
        leaf = lowrank.whitened_weight(w, 3, stats, axes=jc.Axes(contract=(-1,)))
        return leaf.materialize()

    found = run(fn, w.T, x)
    np.testing.assert_allclose(found.T, fitted(w, x, 3, damping=1e-6), atol=1e-3)


def model(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["first"]) @ p["second"]


def test_a_model_sees_the_inputs_of_its_factored_weights() -> None:
    """The second weight is fitted to what the first, factored, gives."""
    params = {"first": draw(0, INPUTS, 12), "second": draw(1, 12, OUTPUTS)}
    x = inputs(3) / 10
    rules = {"*": lowrank.by_ratio(0.75)}
    layers: list[Any] = []
    packed = lowrank.whitened(model, params, [x], rules=rules, on_layer=layers.append)
    assert [(layer.path, layer.method) for layer in layers] == [
        ("first", "rank 3"),
        ("second", "rank 3"),
    ]
    assert all(layer.error <= layer.error_before * 1.0001 for layer in layers)
    hidden = np.tanh(np.float64(x) @ np.float64(packed["first"].materialize()))
    found = output_error(params["second"], packed["second"].materialize(), hidden)
    least = oracle(params["second"], hidden, 3)
    assert found == pytest.approx(least, rel=1e-2)


def test_a_budget_by_output_errors_gives_ranks_where_they_count() -> None:
    """Of two alike, the one with inputs in few directions needs fewer ranks."""
    params = {"flat": jnp.eye(16), "few": jnp.eye(16)}
    x = jnp.eye(16)
    narrow = x.at[3:].multiply(1e-4)
    stats = {"flat": statistics(x, gram=True), "few": statistics(narrow, gram=True)}
    ranks = lowrank.allocate(params, "*", size_bytes=10 * 2 * 16 * 4, stats=stats)
    assert ranks == {"flat": 7, "few": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, "damping must not be negative"),
        ({"rank": 7}, "rank must be from 1 to 6"),
        ({"rank": 0}, "positive integer or a rule"),
        ({"stats": statistics(jnp.ones((2, INPUTS)))}, "gram=True"),
        ({"stats": statistics(jnp.ones((2, 5)), gram=True)}, "must have shape"),
    ],
)
def test_what_is_out_of_range_is_refused(options: Any, message: str) -> None:
    given = {"rank": 2, "stats": None} | options
    with pytest.raises(ValueError, match=message):
        lowrank.whitened_weight(draw(0, INPUTS, OUTPUTS), **given)


def test_a_sweep_refuses_rules_that_look_at_values() -> None:
    with pytest.raises(ValueError, match="allocate"):
        lowrank.whitened(model, {}, [], rules={"*": lowrank.by_energy(0.9)})
