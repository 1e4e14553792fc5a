"""`dot_general` on 8-bit operands: an oracle, error bounds, degenerate operands."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.precision import dot_general
from jaxcompress.precision._matmul import round_codes
from jaxcompress.quant import E4M3, E5M2, Binary, Integer

INT8 = Integer(bits=8)
RNG = np.random.default_rng(0)
MATMUL = (((1,), (0,)), ((), ()))
MATMUL_SPEC = "mk,kn->mn"
FORMATS = [(INT8, INT8), (E4M3, E5M2)]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def rounded(a: np.ndarray, axis: int, element: Any) -> np.ndarray:
    """Float64 values of an operand on its grid, from the definition."""
    a = a.astype(np.float64)
    scale = np.abs(a).max(axis, keepdims=True) / element.largest
    if isinstance(element, Integer):
        return np.clip(np.round(a / scale), -127, 127) * scale
    bits, least = (3, -6) if element is E4M3 else (2, -14)
    units = a / scale
    exponent = np.maximum(np.floor(np.log2(np.abs(units) + 1e-300)), least)
    ulp = 2.0 ** (exponent - bits)
    return np.round(units / ulp) * ulp * scale


@functools.cache
def products(spec: str, kind: int) -> Any:
    """Jitted ``(a, b, g) -> (y, (da, db))`` of an einsum, by `dot_general`."""
    forward, backward = FORMATS[kind]
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    batch = [c for c in a if c in b and c in out]
    sums = [c for c in a if c in b and c not in out]
    at = lambda names, letters: tuple(names.index(c) for c in letters)
    numbers = ((at(a, sums), at(b, sums)), (at(a, batch), at(b, batch)))
    dot = functools.partial(
        dot_general, dimension_numbers=numbers, forward=forward, backward=backward
    )

    @jax.jit
    def run(a: Any, b: Any, g: Any) -> Any:
        y, pull = jax.vjp(dot, a, b)
        return y, pull(g)

    return run


def operands(spec: str) -> list[jax.Array]:
    terms = spec.replace("->", ",").split(",")
    return [normal(*(2 + ord(c) % 7 for c in term)) for term in terms]


@pytest.mark.parametrize("kind", [0, 1], ids=["int8", "fp8"])
def test_all_three_products_are_those_of_the_definition(kind: int) -> None:
    forward, backward = FORMATS[kind]
    a, b, g = operands(MATMUL_SPEC)
    y, (da, db) = products(MATMUL_SPEC, kind)(a, b, g)
    assert (da.dtype, db.dtype) == (a.dtype, b.dtype)
    x, w, g = (np.asarray(v) for v in (a, b, g))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(y, rounded(x, 1, forward) @ rounded(w, 0, forward))
    close(da, rounded(g, 1, backward) @ rounded(w, 1, forward).T)
    close(db, rounded(x, 0, forward).T @ rounded(g, 0, backward))


def error(a: np.ndarray, axes: Any, element: Any) -> np.ndarray:
    """The most that rounding moves an entry of an operand."""
    scale = np.abs(a).max(axes, keepdims=True) / element.largest
    if isinstance(element, Integer):
        return np.broadcast_to(scale / 2, a.shape)
    relative, least = (2.0**-4, 2.0**-10) if element is E4M3 else (2.0**-3, 2.0**-17)
    return np.abs(a) * relative + scale * least


def within(got: Any, spec: str, a: Any, b: Any, formats: Any) -> None:
    """``|sum ab - sum QaQb| <= sum |a| eb + ea |b| + ea eb``, in float64."""
    terms = spec.replace("->", ",").split(",")
    sums = [c for c in terms[0] if c in terms[1] and c not in terms[2]]
    ea, eb = (
        error(v, tuple(term.index(c) for c in sums), element)
        for v, term, element in zip((a, b), terms, formats, strict=False)
    )
    e = functools.partial(np.einsum, spec)
    a_, b_ = np.abs(a), np.abs(b)
    limit = e(a_, eb) + e(ea, b_) + e(ea, eb) + 1e-5 * e(a_, b_)
    assert got.shape == limit.shape
    assert (np.abs(got - e(a, b)) <= limit).all()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (MATMUL_SPEC, 0),
        (MATMUL_SPEC, 1),
        ("kmbj,nbjk->bmn", 1),
        ("m,n->mn", 0),
    ],
)
def test_errors_stay_within_those_of_the_operands(spec: str, kind: int) -> None:
    forward, backward = FORMATS[kind]
    left, right, out = spec.replace("->", ",").split(",")
    for power in (-20, 0, 20):
        a, b, g = operands(spec)
        a = a * 2.0**power
        y, (da, db) = products(spec, kind)(a, b, g)
        a, b, g = (np.asarray(v, np.float64) for v in (a, b, g))
        within(y, spec, a, b, (forward, forward))
        within(da, f"{out},{right}->{left}", g, b, (backward, forward))
        within(db, f"{out},{left}->{right}", g, a, (backward, forward))


@pytest.mark.parametrize("element", [E4M3, E5M2], ids=lambda e: e.label)
def test_float8_rounding_is_that_of_the_number_format(element: Any) -> None:
    x = jnp.asarray(
        RNG.normal(size=500) * 2.0 ** RNG.uniform(-18, 18, 500), jnp.float32
    )
    x = jnp.concatenate([x, jnp.array([0.0, 1e9, -1e9, 464.0, 2.0**-10, 3 * 2.0**-17])])
    expected = jax.jit(lambda x: element.decode(element.encode(x, "nearest")))(x)
    got = jax.jit(lambda x: round_codes(x, element).astype(jnp.float32))(x)
    np.testing.assert_array_equal(got, expected)


def test_stochastic_rounding_makes_gradients_unbiased() -> None:
    forward, backward = FORMATS[1]
    x, w, g = normal(4, 6), normal(6, 3), normal(4, 3) * 0.01

    def grads(key: Any) -> Any:
        dot = functools.partial(
            dot_general, forward=forward, backward=backward, key=key
        )
        return jax.vjp(lambda x, w: dot(x, w, MATMUL), x, w)[1](g)

    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4000)
    draws = jax.jit(jax.vmap(grads))(keys)
    # Unbiased in g: expected are the products with the other operand as it is rounded.
    ws, xs = rounded(np.asarray(w), 1, forward), rounded(np.asarray(x), 0, forward)
    for drawn, mean in zip(
        draws, (np.asarray(g) @ ws.T, xs.T @ np.asarray(g)), strict=True
    ):
        drawn = np.asarray(drawn, np.float64)
        deviation = drawn.std(0) / np.sqrt(len(drawn))
        assert (np.abs(drawn.mean(0) - mean) < 5 * deviation + 1e-6).all()
        assert (drawn.std(0) > 0).any()


def test_without_backward_format_gradients_are_those_of_the_dense_product() -> None:
    x, w, g = normal(5, 6), normal(6, 3), normal(5, 3)
    dot = functools.partial(dot_general, forward=INT8, backward=None)
    pull = jax.jit(lambda g: jax.vjp(lambda x, w: dot(x, w, MATMUL), x, w)[1](g))
    x_, w_, g_ = (np.asarray(a) for a in (x, w, g))
    for got, exact in zip(pull(g), (g_ @ w_.T, x_.T @ g_), strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [0, 1], ids=["int8", "fp8"])
def test_zero_slices_and_tiny_values_are_zeros(kind: int) -> None:
    run = products(MATMUL_SPEC, kind)
    x, w, g = operands(MATMUL_SPEC)
    x = x.at[1].set(0.0).at[2].set(1e-38).at[3].set(1e-42)
    y, grads = run(x, w, jnp.zeros_like(g))
    assert not y[1].any()
    np.testing.assert_allclose(y[2:4], 0.0, atol=1e-36)
    assert not any(np.asarray(d).any() for d in grads)


@pytest.mark.parametrize("kind", [0, 1], ids=["int8", "fp8"])
def test_what_is_not_finite_stays_visible_where_it_belongs(kind: int) -> None:
    run = products(MATMUL_SPEC, kind)
    x, w, g = operands(MATMUL_SPEC)
    y, _ = run(x, w, g)
    bad, _ = run(x.at[1, 2].set(jnp.inf), w, g)
    assert not np.isfinite(bad[1]).any()
    np.testing.assert_array_equal(np.delete(bad, 1, 0), np.delete(y, 1, 0))
    _, (dx, dw) = run(x, w, g.at[2, 0].set(-jnp.inf))
    assert np.flatnonzero(~np.isfinite(dx).all(1)).tolist() == [2]
    assert np.flatnonzero(~np.isfinite(dw).all(0)).tolist() == [0]


def test_an_empty_sum_is_zero() -> None:
    dot = functools.partial(dot_general, forward=INT8, backward=INT8)
    y = jax.jit(lambda a, b: dot(a, b, MATMUL))(jnp.zeros((2, 0)), jnp.zeros((0, 3)))
    assert y.tolist() == [[0.0] * 3] * 2


def test_long_sums_do_not_wrap() -> None:
    x = jnp.ones((1, 2**18))
    dot = functools.partial(dot_general, forward=INT8, backward=INT8)
    y = jax.jit(lambda x: dot(x, x, (((1,), (1,)), ((), ()))))(x)
    np.testing.assert_allclose(y, [[2.0**18]], rtol=1e-5)


def test_dtypes_are_kept() -> None:
    x, w = normal(4, 6).astype(jnp.bfloat16), normal(6, 3).astype(jnp.bfloat16)
    dot = functools.partial(dot_general, forward=E4M3, backward=E5M2)

    def shapes(x: jax.Array, w: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, w: dot(x, w, MATMUL), x, w)
        wide = dot(x, w, MATMUL, preferred_element_type=jnp.float32)
        return y, pull(y), wide

    y, grads, wide = jax.eval_shape(shapes, x, w)
    assert {y.dtype, grads[0].dtype, grads[1].dtype} == {jnp.dtype(jnp.bfloat16)}
    assert wide.dtype == jnp.float32


@pytest.mark.parametrize(
    ("forward", "backward", "named"),
    [
        (Integer(bits=8, symmetric=False), INT8, "forward must be a symmetric"),
        (Binary(), INT8, "forward must be a symmetric"),
        (INT8, Binary(), "backward must be a symmetric"),
        (INT8, E5M2, "must both be integers or both floats"),
    ],
)
def test_other_formats_are_refused(forward: Any, backward: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"dot_general: .*{named}"):
        dot_general(
            normal(2, 2), normal(2, 2), MATMUL, forward=forward, backward=backward
        )
