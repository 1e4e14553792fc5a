"""Codes by the inputs' second moment against plain loops, GPTQ and no statistics."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.codebook import Codes
from jaxcompress.codebook._hessian import (
    Coded,
    feeding_forward,
    given_all_others,
    output_error,
    refit_books,
    refit_scale,
    sweep,
)
from jaxcompress.lift import Statistics, statistics
from jaxcompress.lift._second_moment import factorize

KEY = jax.random.key(0)
INPUTS, OUTPUTS, D = 12, 20, 2
aqlm_weight = functools.partial(
    jc.codebook.aqlm_weight, key=KEY, iterations=4, width=2, steps=8
)


def inputs(rows: int = 64) -> np.ndarray:
    """Correlated, of unlike size."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(INPUTS, INPUTS)) * np.geomspace(0.1, 3.0, INPUTS)
    return (rng.normal(size=(rows, INPUTS)) @ mix).astype(np.float32)


@functools.cache
def stats() -> Statistics:
    return statistics(jnp.asarray(inputs()), gram=True)


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def output(w: jax.Array, leaf: Any) -> float:
    x = inputs().astype(np.float64)
    return float(np.square(x @ np.asarray(w - leaf.materialize(), np.float64)).sum())


def a_problem(books: int = 2) -> tuple[Any, ...]:
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.normal(size=(OUTPUTS, INPUTS // D, D)), jnp.float32)
    coded = Coded(
        jnp.asarray(rng.integers(0, 4, size=(OUTPUTS, books, INPUTS // D)), jnp.int32),
        jnp.asarray(rng.normal(size=(1, books, 4, D)), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2.0, size=OUTPUTS), jnp.float32),
    )
    gram = stats().gram / stats().count
    return w, jnp.ones((INPUTS // D, D)), coded, factorize(gram, 0.01)


def test_the_first_sweep_is_rounding_with_feedback_of_vectors() -> None:
    """Each vector: the cheapest entry where later inputs make up for the rest."""
    w, real, coded, factor = a_problem(books=1)
    found = sweep(w, real, coded, feeding_forward(factor, D), 1, jnp.bool(False))
    h = np.asarray(factor.h, np.float64)
    entries = np.asarray(coded.books[0, 0], np.float64)
    for o in range(OUTPUTS):
        scale = float(coded.scale[o])
        error = np.zeros(INPUTS)
        for s in range(INPUTS // D):
            end = (s + 1) * D
            best = []
            for c in entries:
                fixed = error[:end].copy()
                fixed[s * D :] = np.asarray(w[o, s], np.float64) - scale * c
                # The least error over real values of all inputs after these.
                rest = h[end:, end:]
                free = (
                    -np.linalg.solve(rest, h[end:, :end] @ fixed) if rest.size else []
                )
                whole = np.concatenate([fixed, free])
                best.append(whole @ h @ whole)
            code = int(found[o, 0, s])
            assert best[code] <= min(best) * (1 + 1e-4) + 1e-6
            error[s * D : end] = np.asarray(w[o, s], np.float64) - scale * entries[code]


def test_later_sweeps_choose_the_best_sum_given_all_others() -> None:
    w, real, coded, factor = a_problem()
    found = sweep(w, real, coded, given_all_others(factor.h, D), 4, jnp.bool(True))
    before = output_error(w, real, coded, factor.h)
    after = output_error(w, real, coded._replace(codes=found), factor.h)
    assert after < 0.7 * before
    # No other codes of the last sub-vector, chosen given all others, are better.
    h = np.asarray(factor.h, np.float64)
    books = np.asarray(coded.books[0], np.float64)
    value = np.asarray(coded._replace(codes=found).decode(), np.float64)
    for o in range(OUTPUTS):
        e = (np.asarray(w[o], np.float64) - value[o]).reshape(-1)
        costs = {}
        for a, b in itertools.product(range(4), range(4)):
            e[-D:] = np.asarray(w[o, -1]) - float(coded.scale[o]) * (
                books[0, a] + books[1, b]
            )
            costs[a, b] = e @ h @ e
        mine = costs[int(found[o, 0, -1]), int(found[o, 1, -1])]
        assert mine <= min(costs.values()) * (1 + 1e-4) + 1e-6


def test_codebooks_and_scales_reach_their_least_squares() -> None:
    w, real, coded, factor = a_problem()
    h = np.asarray(factor.h, np.float64)
    fitted = refit_books(w, real, coded, factor.h, 200)
    unit = np.eye(coded.books.size).reshape(-1, *coded.books.shape)
    basis = [
        np.asarray(coded._replace(books=jnp.asarray(u, jnp.float32)).decode())
        for u in unit
    ]
    root = np.linalg.cholesky(h).T
    design = np.stack([(b.reshape(OUTPUTS, -1) @ root.T).ravel() for b in basis], 1)
    wanted = (np.asarray(w, np.float64).reshape(OUTPUTS, -1) @ root.T).ravel()
    solution = np.linalg.lstsq(design, wanted, rcond=None)[0]
    least = np.square(design @ solution - wanted).sum()
    got = float(output_error(w, real, fitted, factor.h))
    assert least * 0.999 <= got <= least * 1.02
    scaled = refit_scale(w, real, coded, factor.h)
    value = np.asarray(coded.unscaled(), np.float64).reshape(OUTPUTS, -1)
    flat = np.asarray(w, np.float64).reshape(OUTPUTS, -1)
    best = np.einsum("ok,kj,oj->o", value, h, flat) / np.einsum(
        "ok,kj,oj->o", value, h, value
    )
    np.testing.assert_allclose(scaled.scale[best > 0], best[best > 0], rtol=1e-3)
    np.testing.assert_array_equal(scaled.scale[best <= 0], coded.scale[best <= 0])


def test_output_error_falls_with_every_kind_of_help() -> None:
    w = weight(INPUTS, OUTPUTS)
    codes = Codes(dims=2, bits=4, scale=True)
    without = output(w, aqlm_weight(w, codes, None, rounds=2))
    first = output(w, aqlm_weight(w, codes, stats(), rounds=0))
    last = output(w, aqlm_weight(w, codes, stats(), rounds=3))
    assert last < 0.8 * first < 0.6 * without
    fmt = jc.quant.integer(2, symmetric=False)
    assert last < 0.7 * output(w, jc.quant.gptq_weight(w, fmt, stats()))


def test_sums_of_two_codes_are_rounded_to_what_is_stored() -> None:
    w = weight(INPUTS, OUTPUTS)
    codes = Codes(dims=2, bits=2, books=2, scale=True, dtype="bfloat16")
    leaf = aqlm_weight(w, codes, stats(), rounds=2)
    assert leaf.codebooks.dtype == leaf.scale.dtype == jnp.bfloat16
    wide = aqlm_weight(w, Codes(dims=2, bits=2, books=2, scale=True), stats(), rounds=2)
    assert output(w, leaf) < 1.1 * output(w, wide)


def test_padding_and_stacks() -> None:
    """Sub-vectors of 5 in 12 inputs; a stack entry is as it is alone."""
    w = weight(2, INPUTS, OUTPUTS)
    both = jax.tree.map(lambda a: jnp.stack([a, a]), stats())
    codes = Codes(dims=5, bits=3)
    stacked = aqlm_weight(w, codes, both, axes=-2, rounds=1)
    assert stacked.shape == w.shape
    plain = aqlm_weight(w, codes, None, axes=-2, rounds=1)
    for i in range(2):
        error = lambda leaf, i=i: output(w[i], jax.tree.map(lambda a: a[i], leaf))
        assert error(stacked) < 0.8 * error(plain)


def test_a_model_is_swept_in_the_order_it_runs() -> None:
    params = {"a": weight(INPUTS, 8), "b": weight(8, 4)}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    x = jnp.asarray(inputs())
    layers: list[Any] = []
    packed = jc.codebook.aqlm(
        fn,
        params,
        [x],
        rules={"*": Codes(dims=2, bits=3)},
        key=KEY,
        iterations=2,
        rounds=1,
        width=1,
        steps=2,
        on_layer=layers.append,
    )
    assert [layer.path for layer in layers] == ["a", "b"]
    assert all(layer.error < layer.error_before for layer in layers)
    out = jc.lift(fn)(packed, x)
    assert jnp.square(out - fn(params, x)).mean() < 0.3 * jnp.square(out).mean()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"codes": Codes(dims=2, blocks=4)}, "blocks must divide"),
        ({"damping": -1.0}, "damping must not be negative"),
        ({"width": 0}, "width must be at least 1"),
        ({"stats": statistics(jnp.ones((2, INPUTS)))}, "have no gram"),
    ],
)
def test_errors_name_the_rule(options: dict[str, Any], rule: str) -> None:
    given = {"codes": Codes(dims=2, bits=2), "stats": stats()} | options
    with pytest.raises(ValueError, match=rule):
        aqlm_weight(weight(INPUTS, OUTPUTS), **given)
