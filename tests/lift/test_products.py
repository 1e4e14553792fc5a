"""Products of two activations: which they are, and what quantizing them does."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.lift._products import find_products
from jaxcompress.lift._tracked import LiftError

q = jc.quant
WIDTH, HEADS, DIM, LENGTH = 8, 2, 4, 6


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params(*stack: int) -> dict[str, jax.Array]:
    w = {n: draw(i, *stack, WIDTH, HEADS, DIM) / 3 for i, n in enumerate("qkv")}
    return {**w, "o": draw(3, *stack, HEADS, DIM, WIDTH) / 3}


def attention(p: Any, x: jax.Array) -> jax.Array:
    with jax.named_scope("attention"):
        a, b, c = (jnp.einsum("tw,whd->thd", x, p[n]) for n in "qkv")
        with jax.named_scope("scores"):
            scores = jnp.einsum("qhd,khd->hqk", a, b)
        probabilities = jax.nn.softmax(scores)
        with jax.named_scope("mix"):
            mixed = jnp.einsum("hqk,khd->qhd", probabilities, c)
        return x + jnp.einsum("qhd,hdw->qw", mixed, p["o"])


def rounded(x: Any, axis: int, *, low: int = -127, high: int = 127) -> np.ndarray:
    """The definition: one step a row along `axis`, in NumPy."""
    x = np.asarray(x, np.float64)
    step = np.abs(x).max(axis, keepdims=True) / high
    return np.clip(np.round(x / np.where(step > 0, step, 1)), low, high) * step


def by_hand(
    p: Any, inputs: Any, *, scores: bool = True, mix: bool = True
) -> np.ndarray:
    """Attention with int8 queries, keys and values, and uint8 probabilities."""
    x, p = np.asarray(inputs, np.float64), jax.tree.map(np.asarray, p)
    a, b, c = (np.einsum("tw,whd->thd", x, p[n]) for n in "qkv")
    if scores:
        a, b = rounded(a, -1), rounded(b, -1)
    logits = np.einsum("qhd,khd->hqk", a, b)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    if mix:
        probabilities = rounded(probabilities, -1, low=0, high=255)
        c = rounded(c, 0)
    mixed = np.einsum("hqk,khd->qhd", probabilities, c)
    return x + np.einsum("qhd,hdw->qw", mixed, p["o"])


def found(fn: Any, *args: Any, custom_vjp: str = "error") -> list[Any]:
    """Products of ``fn(params, *data)``: scope, and which operands are nonnegative."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    flags = [i > 0 for i, a in enumerate(args) for _ in jax.tree.leaves(a)]
    products = find_products(jaxpr, flags, custom_vjp=custom_vjp).values()
    # The innermost scope is einsum's own; einsum may swap its operands.
    return [
        (p.where.rpartition("/")[0], tuple(sorted(p.nonnegative))) for p in products
    ]


PAIR = [("attention/scores", (False, False)), ("attention/mix", (False, True))]


def test_value_is_that_of_the_definition() -> None:
    p, x = params(), draw(9, LENGTH, WIDTH)
    exact = jax.jit(attention)(p, x)
    quantized = jax.jit(q.attention_products(attention))(p, x)
    np.testing.assert_allclose(quantized, by_hand(p, x), rtol=1e-5, atol=1e-5)
    error = np.abs(quantized - exact).max()
    assert 1e-4 < error < 0.02


def test_probabilities_use_the_unsigned_range() -> None:
    """One product alone: with 255 levels the error is about half."""
    logits, values = draw(0, HEADS, 64, 64), draw(1, HEADS, 64, DIM)
    exact = lambda logits, v: jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(logits), v)
    signed = lambda logits, v: jnp.einsum(
        "hqk,hkd->hqd", jnp.where(logits > 99, -1.0, jax.nn.softmax(logits)), v
    )
    transform = functools.partial(q.attention_products, params_argnum=None)
    norm = lambda f: float(jnp.linalg.norm(f(logits, values) - exact(logits, values)))
    four = q.dynamic(q.Integer(bits=4))
    unsigned_error = norm(jax.jit(transform(exact, activations=four)))
    signed_error = norm(jax.jit(transform(signed, activations=four)))
    assert unsigned_error < 0.8 * signed_error
    assert [n for _, n in found(lambda _, *a: exact(*a), {}, logits, values)] == [
        (False, True)
    ]


PROGRAMS = {
    "cond": lambda p, x: jax.lax.cond(x.sum() > 99, lambda p, x: x, attention, p, x),
    "while": lambda p, x: jax.lax.while_loop(
        lambda s: s[0] < 1, lambda s: (s[0] + 1, attention(p, s[1])), (0, x)
    )[1],
    "vmap": lambda p, x: jax.vmap(attention, in_axes=(None, 0))(p, x[None])[0],
}


@pytest.mark.parametrize("fn", PROGRAMS.values(), ids=PROGRAMS)
def test_products_are_found_and_quantized_wherever_they_stand(fn: Any) -> None:
    p, x = params(), draw(9, LENGTH, WIDTH)
    assert [n for _, n in found(fn, p, x)] == [n for _, n in PAIR]
    expected = by_hand(p, x)
    run = jax.jit(q.attention_products(fn))
    np.testing.assert_allclose(run(p, x), expected, rtol=1e-5, atol=1e-5)


def test_scanned_layers_and_gradients_are_straight_through() -> None:
    p, x = params(3), draw(9, LENGTH, WIDTH)
    layers = lambda p, x: jax.lax.scan(
        lambda x, p: (jax.checkpoint(attention)(p, x), None), x, p
    )[0]

    def loss(fn: Any, p: Any) -> Any:
        y = fn(p, x)
        return jnp.square(y).sum(), y

    run = lambda fn: jax.jit(jax.grad(functools.partial(loss, fn), has_aux=True))(p)
    exact, _ = run(layers)
    found, value = run(q.attention_products(layers))
    y = x
    for i in range(3):
        y = by_hand(jax.tree.map(lambda a, i=i: a[i], p), y)
    np.testing.assert_allclose(value, y, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert 0 < np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_the_gradient_of_a_product_is_that_of_the_rounded_operands() -> None:
    x, y, g = draw(0, 2, 3, 4), draw(1, 2, 5, 4), draw(2, 2, 3, 5)
    fn = lambda x, y: jnp.einsum("bqd,bkd->bqk", x, y)
    run = q.attention_products(fn, params_argnum=None)
    _, vjp = jax.vjp(run, x, y)
    dx, dy = vjp(g)
    np.testing.assert_allclose(
        dx, np.einsum("bqk,bkd->bqd", g, rounded(y, -1)), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        dy, np.einsum("bqk,bqd->bkd", g, rounded(x, -1)), rtol=1e-5, atol=1e-5
    )


def test_error_is_within_the_bound_and_zeros_are_exact() -> None:
    x, y = np.array(draw(0, 2, 3, 16)), np.array(draw(1, 2, 5, 16))
    x[0, 1], y[1] = 0.0, 0.0
    fn = lambda x, y: jnp.einsum("bqd,bkd->bqk", x, y)
    values = jax.jit(q.attention_products(fn, params_argnum=None))(x, y)
    sx, sy = (np.abs(a).max(-1) / 127 for a in (x, y))
    nx, ny = (np.abs(a).sum(-1) for a in (x, y))
    bound = sx[:, :, None] * ny[:, None] + sy[:, None] * nx[:, :, None]
    bound = (bound + sx[:, :, None] * sy[:, None] * 16 / 2) / 2
    assert (np.abs(values - fn(x, y)) <= bound * 1.001).all()
    assert not np.asarray(values)[0, 1].any()
    assert not np.asarray(values)[1].any()


def test_floats_and_one_scale_a_tensor() -> None:
    p, x = params(), draw(9, LENGTH, WIDTH)
    schemes = (
        q.dynamic(q.E4M3),
        q.dynamic(q.Integer(bits=8), per="tensor"),
        q.dynamic(q.Integer(bits=8, symmetric=False, narrow=False)),
    )
    runs = [q.attention_products(attention, activations=a) for a in schemes]
    exact, *found = jax.jit(lambda: [f(p, x) for f in (attention, *runs)])()
    for y in found:
        assert 1e-4 < np.abs(y - exact).max() < 0.2


def test_scopes_choose() -> None:
    p, x = params(), draw(9, LENGTH, WIDTH)
    assert found(attention, p, x) == PAIR
    scores = q.attention_products(attention, where="**/scores/**")
    mix = q.attention_products(attention, where=lambda scope: "/mix/" in scope)
    for run, options in ((scores, {"mix": False}), (mix, {"scores": False})):
        expected = by_hand(p, x, **options)
        np.testing.assert_allclose(jax.jit(run)(p, x), expected, rtol=1e-5, atol=1e-5)
        assert np.abs(expected - by_hand(p, x)).max() > 1e-4
    with pytest.raises(ValueError, match=r"matches none of the scopes \['attention/mi"):
        q.attention_products(attention, where="encoder/**")(p, x)


def test_weights_are_left_alone() -> None:
    """Batched matmuls with a weight, or with what is computed from weights alone."""
    p = {"experts": draw(0, 3, 4, 5), "gain": draw(1, 3)}
    x = draw(2, 3, 7, 4)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        w = p["experts"] * jnp.tanh(p["gain"])[:, None, None]
        return jnp.einsum("ebi,eio->ebo", x, w)

    assert found(fn, p, x) == []
    assert len(found(lambda _, *a: fn(*a), {}, p, x)) == 1
    with pytest.raises(ValueError, match="no matmul with batch axes"):
        q.attention_products(fn)(p, x)
    assert q.attention_products(fn, params_argnum=1)(x=x, p=p) is not None


def test_one_program_called_twice_is_told_apart() -> None:
    """The same jitted product, once with a weight and once with data."""
    multiply = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))
    w, x = draw(0, 2, 4, 4), draw(1, 2, 4, 4)
    fn = lambda w, x: (multiply(x, w), multiply(x, x))
    assert len(found(fn, w, x)) == 1
    with_weight, squared = jax.jit(q.attention_products(fn))(w, x)
    exact = fn(w, x)
    np.testing.assert_allclose(with_weight, exact[0], rtol=1e-6)
    assert np.abs(squared - exact[1]).max() > 1e-4


def test_a_carry_that_becomes_data_and_negative() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        def step(c: Any, _: Any) -> Any:
            a, b = c
            return (jnp.einsum("bij,bjk->bik", a, b), x - 1.0), None

        return jax.lax.scan(step, (jnp.abs(x), jnp.abs(w)), None, length=2)[0][0]

    assert found(fn, draw(0, 2, 4, 4), draw(1, 2, 4, 4)) == [("", (False, False))]


@jax.custom_vjp
def _own_backward(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("bij,bkj->bik", a, b)


_own_backward.defvjp(
    lambda a, b: (_own_backward(a, b), (a, b)), lambda r, g: (7.0 * r[0], 7.0 * r[1])
)


def test_custom_vjp_is_refused_or_as_asked() -> None:
    x = draw(0, 2, 3, 3)
    fn = lambda p, x: _own_backward(x, x) + jnp.einsum("bij,bkj->bik", x, x)
    with pytest.raises(LiftError, match=r"custom_vjp='inline'.*custom_vjp='opaque'"):
        q.attention_products(fn)({}, x)
    assert len(found(fn, {}, x, custom_vjp="inline")) == 2
    assert len(found(fn, {}, x, custom_vjp="opaque")) == 1
    run = lambda mode: q.attention_products(
        lambda p, x: fn(p, x)[0].sum(), custom_vjp=mode
    )
    opaque = jax.grad(run("opaque"), argnums=1)({}, x)
    inline = jax.grad(run("inline"), argnums=1)({}, x)
    assert np.abs(opaque[1]).max() > 1  # Its own backward: 7 times both operands.
    assert not np.asarray(inline)[1].any()


def test_compressed_leaves_inside_outside_and_passed() -> None:
    p, x = params(), draw(9, LENGTH, WIDTH)
    axes = jc.trace_axes(attention, p, x)
    scheme = jc.select({"*": q.int8()}, axes=axes)
    packed = jax.jit(lambda p: scheme.compress(*scheme.init(p)))(p)
    expected = by_hand(jc.materialize(packed), x)
    fns = (
        q.attention_products(attention),
        jc.lift(q.attention_products(attention)),
        q.attention_products(jc.lift(attention)),
    )
    for y in jax.jit(lambda packed, x: [f(packed, x) for f in fns])(packed, x):
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_quantized_cache_keeps_its_own_rule_and_comes_back() -> None:
    def fn(p: Any, cache: Any, x: jax.Array) -> Any:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, x[:, None], 2, 1)
        scores = jnp.einsum("bhd,bkhd->bhk", x, cache)
        return cache, jnp.einsum("bhk,bhk->bh", scores, scores)

    x = draw(0, 2, HEADS, DIM)
    cache = jax.jit(lambda: q.kv_cache((2, LENGTH, HEADS, DIM), q.int8()))()
    run = lambda *args: (q.attention_products(fn)(*args), jc.lift(fn)(*args))
    (after, y), (expected, z) = jax.jit(run)({}, cache, x)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    np.testing.assert_array_equal(after.words, expected.words)
    assert 0 < np.abs(y - z).max() < 0.05 * np.abs(z).max()


def test_static_arguments_and_one_trace() -> None:
    traces = []

    def fn(p: Any, x: jax.Array, scale: float, mode: str) -> jax.Array:
        traces.append(mode)
        return attention(p, x) * scale

    run, args = q.attention_products(fn), (params(), draw(9, LENGTH, WIDTH))
    first = run(*args, 2.0, mode="a")
    np.testing.assert_array_equal(run(*args, 2.0, mode="a"), first)
    assert traces == ["a"]
    np.testing.assert_allclose(first, 2 * by_hand(*args), rtol=1e-4, atol=1e-4)


def test_long_sums_do_not_overflow() -> None:
    """Sums of more than 2^31 as codes run as rounded values instead."""
    x = jnp.ones((1, 1, 2**18), jnp.float32)
    fn = lambda x, y: jnp.einsum("bqd,bkd->bqk", x, y)
    y = jax.jit(q.attention_products(fn, params_argnum=None))(x, x)
    np.testing.assert_allclose(y, 2.0**18, rtol=1e-4)


def test_static_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="no leaf to keep a calibrated scale in"):
        q.attention_products(attention, activations=q.static(q.E4M3))
