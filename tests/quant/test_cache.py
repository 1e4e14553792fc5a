"""A quantized cache decodes as a dense one that holds the rounded vectors."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.layout import Axes
from jaxcompress.lift._tracked import LiftError

q = jc.quant
BATCH, LENGTH, HEADS, DIM, WIDTH, LAYERS = 2, 20, 2, 32, 16, 3
SHAPE = (BATCH, LENGTH, HEADS, DIM)
FORMATS = {
    "int8": q.int8(),
    "int4 groups": q.int4(group_size=8),
    "uint4 groups": q.int4(group_size=16, symmetric=False),
    "fp8": q.fp8_e4m3(scale_dtype=jnp.bfloat16),
    "nvfp4": q.nvfp4(),
}
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params(*stack: int) -> dict[str, jax.Array]:
    names = ("q", "k", "v")
    w = {n: draw(i, *stack, WIDTH, HEADS, DIM) / 4 for i, n in enumerate(names)}
    return {**w, "o": draw(3, *stack, HEADS, DIM, WIDTH) / 8}


def attend(p: Any, caches: Any, x: jax.Array, i: jax.Array, rounded: Any) -> Any:
    """One token ``[batch, width]`` at position `i`; the caches it wrote."""
    read, write = (
        jnp.einsum("bw,whd->bhd", x, p["q"]),
        {n: jnp.einsum("bw,whd->bhd", x, p[n]) for n in ("k", "v")},
    )
    zero = jnp.int32(0)
    caches = {
        n: jax.lax.dynamic_update_slice(
            caches[n], rounded(write[n])[:, None], (zero, i, zero, zero)
        )
        for n in ("k", "v")
    }
    scores = jnp.einsum("bhd,bkhd->bhk", read, caches["k"]) / DIM**0.5
    seen = jnp.broadcast_to(jnp.arange(LENGTH) <= i, scores.shape)
    probabilities = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    mixed = jnp.einsum("bhk,bkhd->bhd", probabilities, caches["v"])
    return caches, x + jnp.einsum("bhd,hdw->bw", mixed, p["o"])


def decode(p: Any, caches: Any, xs: jax.Array, rounded: Any = lambda x: x) -> Any:
    """All tokens in a scan over positions."""

    def step(carry: Any, x: jax.Array) -> Any:
        caches, i = carry
        caches, y = attend(p, caches, x, i, rounded)
        return (caches, i + 1), y

    (caches, _), ys = jax.lax.scan(step, (caches, jnp.int32(0)), xs)
    return caches, ys


def empty(fmt: Any, *stack: int) -> dict[str, Any]:
    return {n: make((*stack, *SHAPE), fmt) for n in ("k", "v")}


make = jax.jit(q.kv_cache, static_argnums=(0, 1), static_argnames="dtype")


read = jax.jit(jc.materialize)


@functools.partial(jax.jit, static_argnums=(1, 2))
def pack(x: jax.Array, fmt: Any, contract: int = -1) -> q.QuantizedArray:
    """Quantized outside of what is tested, in one compilation."""
    axes = Axes(contract=(contract,), stack=x.ndim + min(contract, -1))
    return q.quantize(x, fmt, axes=axes)


def dense(*stack: int) -> dict[str, Any]:
    return {n: jnp.zeros((*stack, *SHAPE)) for n in ("k", "v")}


def rounding(fmt: Any) -> Any:
    """Vectors as `quantize` of each of them gives."""
    return lambda x: q.fake_quantize(x, fmt, axes=Axes(contract=(-1,), stack=2))


def assert_same_form(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def assert_close(actual: Any, expected: Any, atol: float = 2e-5) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=atol)


@functools.cache
def decoded(fmt: Any) -> Any:
    """Caches and outputs of the quantized run, once for all tests."""
    run = jax.jit(jc.lift(decode, on_dense="error"))
    return run(params(), empty(fmt), draw(9, LENGTH, BATCH, WIDTH))


@pytest.mark.parametrize("name", ["int8", "int4 groups"])
def test_decoding_equals_the_dense_function_on_rounded_vectors(name: str) -> None:
    fmt = FORMATS[name]
    caches, ys = decoded(fmt)
    assert_same_form(caches, empty(fmt))
    expected, outs = jax.jit(functools.partial(decode, rounded=rounding(fmt)))(
        params(), dense(), draw(9, LENGTH, BATCH, WIDTH)
    )
    assert_close(ys, outs)
    assert_close(read(caches), expected)
    assert all(np.asarray(a).any() for a in jax.tree.leaves(read(caches)))


@formats
def test_what_is_written_reads_back_as_quantize_gives_it(fmt: Any) -> None:
    new, zero = draw(0, BATCH, 2, HEADS, DIM), jnp.int32(0)
    place = lambda c, u, i: jax.lax.dynamic_update_slice(c, u, (zero, i, zero, zero))
    written = jax.jit(jc.lift(place, on_dense="error"))(
        make(SHAPE, fmt), new, jnp.int32(3)
    )
    values, expected = read(written), read(pack(new, fmt))
    np.testing.assert_allclose(values[:, 3:5], expected, rtol=1e-6)
    assert np.flatnonzero(np.asarray(values).any((0, 2, 3))).tolist() == [3, 4]


step = jax.jit(
    jc.lift(functools.partial(attend, rounded=lambda x: x), on_dense="error"),
    donate_argnums=1,
)


def test_token_by_token_in_place_equals_the_scan() -> None:
    scanned, outs = decoded(FORMATS["int8"])
    caches = empty(FORMATS["int8"])
    for i, x in enumerate(draw(9, LENGTH, BATCH, WIDTH)):
        caches, y = step(params(), caches, x, jnp.int32(i))
        assert_same_form(caches, scanned)
        assert_close(y, outs[i])
    assert_close(read(caches), read(scanned))


def test_error_is_within_half_a_scale_and_ends_in_nearly_the_same_output() -> None:
    xs = draw(9, LENGTH, BATCH, WIDTH)
    true, outs = jax.jit(decode)(params(), dense(), xs)
    errors = []
    for fmt, high in ((FORMATS["int8"], 127), (FORMATS["int4 groups"], 7)):
        caches, ys = decoded(fmt)
        for n in ("k", "v"):
            exact = np.asarray(true[n], np.float64)
            groups = exact.reshape(*SHAPE[:-1], caches[n].scale.shape[-1], -1)
            bound = np.abs(groups).max(-1, keepdims=True) / high / 2
            found = np.abs(np.asarray(read(caches[n])) - exact)
            assert (found.reshape(groups.shape) <= bound * 1.001 + 1e-6).all()
        errors.append(float(jnp.linalg.norm(ys - outs) / jnp.linalg.norm(outs)))
    assert 0 < errors[0] < 0.005 < errors[1] < 0.1


def test_only_the_written_bytes_change() -> None:
    """The definition in NumPy, one vector at a time."""
    fmt = q.int4(group_size=8)
    cache = pack(draw(0, *SHAPE), fmt)
    update = np.asarray(draw(1, BATCH, 3, HEADS, DIM), np.float64)
    write = lambda c, u, i: jax.lax.dynamic_update_slice_in_dim(c, u, i, 1)
    after = jax.jit(jc.lift(write))(
        cache, jnp.asarray(update, jnp.float32), jnp.int32(18)
    )
    start = LENGTH - 3  # Clamped, as the operation says.
    kept = [i for i in range(LENGTH) if i < start]
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:, kept], np.asarray(b)[:, kept])
    values = np.asarray(read(after), np.float64)
    scales = np.asarray(after.scale, np.float64)
    for b, t, h, g in np.ndindex(BATCH, 3, HEADS, DIM // 8):
        group = update[b, t, h, 8 * g : 8 * g + 8]
        scale = scales[b, start + t, h, g]
        assert abs(scale * 7 / np.abs(group).max() - 1) < 2.0**-14
        expected = scale * np.round(group / scale)
        np.testing.assert_array_equal(
            values[b, start + t, h, 8 * g : 8 * g + 8], expected
        )


@pytest.mark.parametrize(
    "place",
    [
        lambda c, u: c.at[:, 4].set(u),
        lambda c, u: c.at[jnp.arange(BATCH), jnp.array([3, 17])].set(u),
        lambda c, u: c.at[jnp.arange(BATCH), jnp.array([3, 99])].set(u),
        lambda c, u: c.at[1, 2:4].set(u, mode="promise_in_bounds"),
        lambda c, u: jax.vmap(lambda c, u, i: c.at[i].set(u))(c, u, jnp.array([5, 6])),
    ],
    ids=["one position", "a position each", "beyond the end", "a window", "vmap"],
)
def test_scattered_tokens_are_written(place: Any) -> None:
    fmt, before, new = q.int8(), draw(0, *SHAPE), draw(1, BATCH, HEADS, DIM)
    cache = pack(before, fmt)
    after = jax.jit(jc.lift(place, on_dense="error"))(cache, new)
    assert_same_form(after, cache)
    expected = place(read(cache), read(pack(new, fmt)))
    np.testing.assert_array_equal(read(after), expected)


def uneven(seed: int) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Vectors with a few large channels, and means and deviations of their channels."""
    keys = np.asarray(draw(seed, LAYERS, *SHAPE), np.float64)
    keys = keys * np.where(np.arange(DIM) % 7, 1.0, 6.0) + 20.0 * (np.arange(DIM) == 3)
    over = {"axis": (1, 2), "keepdims": True}
    sides = {"mean": keys.mean(**over), "deviation": keys.std(**over)}
    return keys, {name: jnp.asarray(a, jnp.float32) for name, a in sides.items()}


def test_channels_are_normalized_before_rounding_and_back_after_it() -> None:
    """The definition, through a write into a layer, its read, and the keys' product."""
    keys, sides = uneven(3)
    cache = q.kv_cache(keys.shape, q.int8(), **sides)
    assert isinstance(cache, q.NormalizedArray)

    def step(c: Any, new: jax.Array, x: jax.Array, layer: jax.Array) -> Any:
        start = (layer, *(jnp.int32(i) for i in (0, 5, 0, 0)))
        c = jax.lax.dynamic_update_slice(c, new[None], start)
        own = jax.lax.dynamic_index_in_dim(c, layer, keepdims=False)
        return c, jnp.einsum("bhd,bkhd->bhk", x, own)

    new = jnp.asarray(keys[1, :, 5:8], jnp.float32)
    x, layer = draw(4, BATCH, HEADS, DIM), jnp.int32(1)
    after, scores = jax.jit(jc.lift(step, on_dense="error"))(cache, new, x, layer)
    assert_same_form(after, cache)
    mean, deviation = (np.float64(a)[1] for a in sides.values())
    normal = (np.float64(new) - mean) / deviation
    scale = np.abs(normal).max(-1, keepdims=True) / 127
    found, means = np.float64(read(after)), np.broadcast_to(sides["mean"], keys.shape)
    error = np.abs(found[1, :, 5:8] - np.float64(new))
    assert (error <= scale / 2 * deviation * 1.001 + 1e-5).all()
    unwritten = np.delete(found[1], range(5, 8), 1)
    np.testing.assert_array_equal(unwritten, np.delete(means[1], range(5, 8), 1))
    np.testing.assert_array_equal(found[::2], means[::2])
    product = np.einsum("bhd,bkhd->bhk", np.float64(x), found[1])
    np.testing.assert_allclose(scores, product, rtol=1e-4, atol=1e-3)
    plain = np.asarray(read(pack(new, q.int8())))
    assert np.square(error).sum() < 0.2 * np.square(plain - new).sum()


def test_normalized_channels_are_scattered_where_all_entries_share_them() -> None:
    keys, sides = uneven(5)
    one = {name: a[0] for name, a in sides.items()}
    cache = q.kv_cache(SHAPE, q.int8(), **one)
    new = jnp.asarray(keys[0, :, 4], jnp.float32)
    place = lambda c, u: c.at[:, 4].set(u)
    after = jax.jit(jc.lift(place, on_dense="error"))(cache, new)
    assert_same_form(after, cache)
    np.testing.assert_allclose(read(after)[:, 4], new, atol=0.2)
    with pytest.raises(LiftError, match="is made dense"):  # Means of one layer each.
        jc.lift(lambda c, u: c.at[0, :, 4].set(u), on_dense="error")(
            q.kv_cache(keys.shape, q.int8(), **sides), new
        )


@pytest.mark.parametrize("name", ["mean", "deviation"])
def test_sides_of_another_shape_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must have the shape of the cache"):
        q.kv_cache(SHAPE, q.int8(), **{name: jnp.ones((1, LENGTH + 1, 1, DIM))})


def test_a_channel_that_never_varied_is_written_as_it_is() -> None:
    deviation = jnp.ones((1, 1, 1, DIM)).at[..., 5].set(0.0)
    cache = q.kv_cache(SHAPE, q.int8(), deviation=deviation)
    new = draw(2, BATCH, HEADS, DIM)
    after = jax.jit(jc.lift(lambda c, u: c.at[:, 4].set(u)))(cache, new)
    np.testing.assert_array_equal(read(after)[:, 4], read(pack(new, q.int8())))


@pytest.mark.parametrize("wrong", [-1.0, np.nan])
def test_deviations_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="deviation must be finite, not negative"):
        q.kv_cache(
            SHAPE, q.int8(), deviation=np.full((1, 1, 1, DIM), wrong, np.float32)
        )


def test_scattering_part_of_a_vector_turns_dense() -> None:
    cache = pack(draw(0, *SHAPE), q.int8())
    part = draw(1, BATCH, LENGTH, HEADS, 3)
    programs: list[Any] = [
        lambda c, u: c.at[..., 2:5].set(u),
        lambda c, u: jax.lax.dynamic_update_slice(c, u, (0, 0, 0, 2)),
        lambda c, u: c.at[:, 1].add(1.0),
    ]
    run = lambda c, u: [fn(c, u) for fn in programs]
    found, expected = jax.jit(jc.lift(run))(cache, part), run(read(cache), part)
    for fn, a, b in zip(programs, found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        with pytest.raises(LiftError, match="is made dense"):
            jc.lift(fn, on_dense="error")(cache, part)


def test_caches_of_scanned_layers_are_scanned() -> None:
    fmt, p = q.int8(), params(LAYERS)

    def step(p: Any, caches: Any, x: jax.Array, i: jax.Array, rounded: Any) -> Any:
        def layer(x: jax.Array, layer: Any) -> Any:
            caches, y = attend(layer[0], layer[1], x, i, rounded)
            return y, caches

        return jax.lax.scan(layer, x, (p, caches))

    run = jax.jit(jc.lift(functools.partial(step, rounded=lambda x: x)))
    expected = jax.jit(functools.partial(step, rounded=rounding(fmt)))
    caches, exact = empty(fmt, LAYERS), dense(LAYERS)
    for i in range(3):
        x = draw(9 + i, BATCH, WIDTH)
        before = caches
        y, caches = run(p, caches, x, jnp.int32(i))
        assert_same_form(caches, before)
        z, exact = expected(p, exact, x, jnp.int32(i))
        assert_close(y, z, atol=1e-3)
    assert_close(read(caches), exact, atol=5e-3)


def test_a_cache_is_carried_through_while_and_cond() -> None:
    fmt, xs = q.int8(), draw(9, LENGTH, BATCH, WIDTH)

    def generate(p: Any, caches: Any, xs: jax.Array, n: jax.Array) -> Any:
        def body(state: Any) -> Any:
            i, caches, _ = state
            caches, y = jax.lax.cond(
                i == 1,  # The second token is not cached.
                lambda c: (c, xs[i]),
                lambda c: attend(p, c, xs[i], i, lambda x: x),
                caches,
            )
            return i + 1, caches, y

        start = (jnp.int32(0), caches, jnp.zeros((BATCH, WIDTH)))
        return jax.lax.while_loop(lambda s: s[0] < n, body, start)

    before = empty(fmt)
    run = jax.jit(jc.lift(generate, on_dense="error"))
    _, caches, y = run(params(), before, xs, jnp.int32(3))
    assert_same_form(caches, before)
    found = read(caches["k"])
    assert np.asarray(found).any((0, 2, 3)).tolist() == [1, 0, 1] + [0] * (LENGTH - 3)
    again = empty(fmt)
    for i in (0, 2):
        again, expected = step(params(), again, xs[i], jnp.int32(i))
    assert_close(y, expected)


def test_keys_and_queries_multiply_as_integers() -> None:
    integers = q.int8(activations=q.dynamic(q.Integer(bits=8)))
    cache = pack(draw(0, *SHAPE), integers)
    x = draw(1, BATCH, HEADS, DIM)
    scores = lambda c, x: jnp.einsum("bhd,bkhd->bhk", x, c)
    (site,) = jc.explain(scores, cache, x)
    assert site.how == "int8 dot"
    exact = np.einsum("bhd,bkhd->bhk", x, read(cache))
    bound = np.abs(x).max(-1)[..., None] / 254 * np.abs(read(cache)).sum(-1).max()
    assert (
        np.abs(np.asarray(jax.jit(jc.lift(scores))(cache, x)) - exact) <= bound
    ).all()


def test_flax_attention_decodes_from_it() -> None:
    model = nn.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=HEADS * DIM, decode=True
    )
    x = draw(0, BATCH, 6, WIDTH)
    variables: Any = jax.jit(model.init)(jax.random.key(0), x)
    weights, cache = variables["params"], variables["cache"]
    quantized = {n: make(c.shape, q.int8()) if c.ndim else c for n, c in cache.items()}
    step = jax.jit(jc.lift(lambda v, x: model.apply(v, x, mutable=("cache",))))
    for i in range(3):
        before = quantized
        y, new = step({"params": weights, "cache": quantized}, x[:, i : i + 1])
        quantized = new["cache"]
        assert_same_form(quantized, before)
        z, new = step({"params": weights, "cache": cache}, x[:, i : i + 1])
        cache = new["cache"]
        np.testing.assert_allclose(y, z, atol=0.02)
        assert np.abs(y - z).max() > 0  # The cache is indeed rounded.
    exact = np.asarray(cache["cached_key"])
    error = np.abs(np.asarray(read(quantized["cached_key"])) - exact)
    assert (error <= np.abs(exact).max(-1, keepdims=True) / 254 * 1.001).all()


@formats
def test_an_empty_cache_is_zero_and_small(fmt: Any) -> None:
    cache = make(SHAPE, fmt, dtype=jnp.bfloat16)
    assert (cache.shape, cache.dtype) == (SHAPE, jnp.bfloat16)
    assert not read(cache).any()
    zeros = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    whole = jax.eval_shape(lambda w: q.quantize(w, fmt, axes=-1), zeros)
    assert_same_form(cache, whole)
    assert cache.stored_bytes == whole.stored_bytes < np.prod(SHAPE) * 2


@pytest.mark.parametrize(
    ("shape", "fmt", "message"),
    [
        ((), q.int8(), "at least one axis"),
        ((2, 0, 4), q.int8(), "no zero"),
        ((2, 12), q.int8(group_size=8), "group_size must divide"),
        ((2, 8), q.int8(rounding="stochastic"), "rounded to nearest"),
        ((2, 8), q.int8(granularity=q.PerTensor()), "own scales"),
        ((2, 8), q.int8(activations=q.static(q.E4M3)), "dynamic activations"),
    ],
)
def test_what_a_cache_cannot_be_is_refused(shape: Any, fmt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        q.kv_cache(shape, fmt)


def test_scales_shared_by_tokens_cannot_be_written_apart() -> None:
    w = draw(0, 4, 8)
    fn = lambda w, row: jax.lax.dynamic_update_slice(w, row, (1, 0))
    tensor = q.int8(granularity=q.PerTensor(), axes=Axes(contract=(-1,)))
    leaves = [pack(w, tensor), pack(w, q.int8(), -2)]
    row = jnp.ones((1, 8))
    found = jax.jit(jc.lift(lambda leaves, row: [fn(w, row) for w in leaves]))
    for leaf, after in zip(leaves, found(leaves, row), strict=True):
        assert isinstance(after, jax.Array)
        np.testing.assert_array_equal(after, fn(read(leaf), row))


def test_a_layer_is_overwritten_and_a_leaf_handed_back_whole_is_the_leaf() -> None:
    stack = pack(draw(0, LAYERS, 16, 8), q.int4(group_size=8), -2)
    new = draw(1, 16, 8)
    run = lambda w, new: (w.at[1].set(new), w, w[1], w[::-1])
    after, whole, part, turned = jax.jit(jc.lift(run))(stack, new)
    assert_same_form(after, stack)
    layers, before = np.asarray(read(after)), np.asarray(read(stack))
    np.testing.assert_array_equal(layers[::2], before[::2])
    expected = read(pack(new, q.int4(group_size=8), -2))
    np.testing.assert_array_equal(layers[1], expected)
    assert_same_form(whole, stack)
    np.testing.assert_array_equal(whole.words, stack.words)
    np.testing.assert_array_equal(part, before[1])
    np.testing.assert_array_equal(turned, before[::-1])


def test_a_layer_of_a_stacked_cache_stays_compressed() -> None:
    def scores(cache: Any, q: jax.Array, layer: jax.Array) -> jax.Array:
        key = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        return jnp.einsum("bth,bsh->bts", q, key)

    values = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 8, 4)), np.float32)
    cache = jc.quant.quantize(values, jc.quant.int8(axes=-1))
    q = jnp.ones((2, 1, 4))
    found = jc.lift(scores, on_dense="error")(cache, q, jnp.int32(1))
    expected = scores(cache.materialize(), q, jnp.int32(1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
