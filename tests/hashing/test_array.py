"""Hashed leaves against loops: values, products, look-ups, gradients, layouts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import stats

import jaxcompress as jc
from jaxcompress import hashing as h
from tests.hashing.oracle import places
from tests.jitted import run
from tests.lift.programs import mesh

N, K, COUNT = 12, 20, 40
FORMS = {
    "elements": h.Hashing(seed=7),
    "blocks": h.Hashing((3, 4), seed=7),
    "rows": h.Hashing((1, 20)),
    "columns": h.Hashing((12, 1)),
    "robe": h.Hashing((1, 8), seed=2, aligned=False),
    "grows": h.Hashing(seed=7, linear=True),
}
forms = pytest.mark.parametrize("hashing", FORMS.values(), ids=FORMS)


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def leaf_of(hashing: h.Hashing, *, stack: int = 0, **options: Any) -> h.HashedArray:
    """A weight ``[*stack, K, N]`` of given buckets."""
    lead = (3,) * (stack > 0)
    blank = jax.ShapeDtypeStruct((*lead, K, N), jnp.float32)
    make = lambda w: h.fit_hashed(
        w, ratio=N * K / COUNT, hashing=hashing, axes=-2, **options
    )
    return jax.eval_shape(make, blank).replace(buckets=draw(5, *lead, COUNT))


@functools.cache
def dense(hashing: h.Hashing) -> np.ndarray:
    """The weight ``[K, N]`` of `leaf_of`, from the definition."""
    at, sign = places(hashing, COUNT, N, K)
    return (sign * np.float64(draw(5, COUNT))[at]).T


@forms
def test_values_and_products_are_those_of_the_definition(hashing: h.Hashing) -> None:
    leaf, x = leaf_of(hashing), draw(1, 4, K)

    def both(leaf: Any, x: jax.Array) -> Any:
        return leaf.materialize(), jc.lift(lambda w, x: x @ w)(leaf, x)

    w, y = run(both, leaf, x)
    np.testing.assert_array_equal(np.float64(w), dense(hashing))
    np.testing.assert_allclose(y, np.float64(x) @ dense(hashing), rtol=1e-5, atol=1e-5)


@forms
def test_the_gradient_is_that_of_the_dense_weight_summed_by_index(
    hashing: h.Hashing,
) -> None:
    leaf, x, dy = leaf_of(hashing), draw(1, 4, K), draw(2, 4, N)
    product = jc.lift(lambda w, x: (x @ w * dy).sum())
    through = lambda w, x: (x @ w.materialize() * dy).sum()

    def grads(leaf: Any, x: jax.Array) -> Any:
        return [jax.grad(f, argnums=(0, 1))(leaf, x) for f in (product, through)]

    at, sign = places(hashing, COUNT, N, K)
    dw = (np.float64(x).T @ np.float64(dy)).T
    wanted = np.zeros(COUNT)
    np.add.at(wanted, at, sign * dw)
    for found, dx in run(grads, leaf, x):
        np.testing.assert_allclose(found.buckets, wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dx, np.float64(dy) @ dense(hashing).T, atol=1e-4)


def test_buckets_fill_evenly_and_signs_are_even() -> None:
    """Chi-squared; a good hash fails each once in 10,000 seeds; the seeds are set."""
    n, k, count = 256, 512, 1024
    rows = jnp.arange(n, dtype=jnp.int32)[:, None]
    columns = jnp.arange(k, dtype=jnp.int32)[None]
    from kernels_pallas.hashed_matmul import places as on_device

    for hashing in (h.Hashing(seed=1), h.Hashing(seed=2**31, linear=True)):
        at, negative = run(
            lambda r, c, hashing=hashing: on_device(r, c, hashing, buckets=count),
            rows,
            columns,
        )
        loads = np.bincount(np.asarray(at).reshape(-1), minlength=count)
        chi = ((loads - n * k / count) ** 2).sum() / (n * k / count)
        assert stats.chi2.sf(chi, count - 1) > 1e-4
        # Sign and bucket together, so that neither tells of the other.
        pair = np.asarray(at) % 16 * 2 + np.asarray(negative)
        loads = np.bincount(pair.reshape(-1), minlength=32)
        chi = ((loads - n * k / 32) ** 2).sum() / (n * k / 32)
        assert stats.chi2.sf(chi, 31) > 1e-4


def test_a_look_up_makes_the_rows_that_are_read_alone() -> None:
    words, width = 5000, 16
    blank = jax.ShapeDtypeStruct((words, width), jnp.float32)
    for axes in (-1, -2):
        make = lambda w, axes=axes: h.fit_hashed(w, ratio=100.0, axes=axes)
        leaf = jax.eval_shape(make, blank).replace(buckets=draw(0, 800))
        index = jnp.array([[0, 4999], [17, 17]])
        look = jc.lift(lambda w, i: w[i])
        found = jax.jit(look).lower(leaf, index).compile()
        memory = found.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < words * width
        np.testing.assert_array_equal(
            found(leaf, index), run(jc.materialize, leaf)[index]
        )


def test_layouts_follow_and_stay_hashed() -> None:
    leaf, x = leaf_of(FORMS["elements"]), draw(1, 4, K)
    w = dense(FORMS["elements"])
    heads = lambda w, x: jnp.einsum(
        "bij,ijo->bo", x.reshape(4, 4, 5), w.reshape(4, 5, N)
    )
    programs = {
        "transposed": (lambda w, x: jnp.einsum("io,bi->ob", w, x), w.T @ x.T),
        "split": (heads, x @ w),
        "tied": (lambda w, x: x[:, :N] @ w.T, x[:, :N] @ w.T),
        "half": (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), None),
    }
    for name, (fn, wanted) in programs.items():
        found = run(jc.lift(fn), leaf, x)
        if wanted is None:
            wanted = run(fn, jnp.float32(w), x)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    stack = leaf_of(FORMS["elements"], stack=1)
    moved = jc.lift(lambda w, x: jnp.einsum("lio,lbi->lbo", w, x))
    values = run(jc.materialize, stack)
    xs = draw(3, 3, 4, K)
    np.testing.assert_allclose(
        run(moved, stack, xs), np.einsum("lio,lbi->lbo", values, xs), atol=1e-5
    )


def test_a_convolution_runs_on_a_hashed_kernel() -> None:
    kernel, x = draw(0, 3, 3, 4, 8), draw(1, 2, 6, 6, 4)
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers
    )
    leaf = h.fit_hashed(kernel, ratio=4.0, axes=(-4, -3, -2))
    assert leaf.buckets.shape == (3 * 3 * 4 * 8 // 4,)
    at, sign = places(h.Hashing(), 72, 8, 36)
    dense = run(jc.materialize, leaf).reshape(36, 8)
    np.testing.assert_array_equal(dense, (sign * np.float32(leaf.buckets)[at]).T)
    found, wanted = run(
        lambda w, x: (jc.lift(conv)(w, x), conv(w.materialize(), x)), leaf, x
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_quantized_and_pruned_buckets_train_as_they_are_stored() -> None:
    for rule in (jc.quant.int8(), jc.prune.magnitude(sparsity=0.5)):
        scheme = jc.select({"w": jc.chain(h.hashed(ratio=8.0), rule)})
        params, state = run(scheme.init, {"w": draw(0, 64, 32)})
        x = draw(1, 4, 64)

        def both(params: Any, state: Any, x: Any = x, scheme: Any = scheme) -> Any:
            product = jc.lift(lambda p, x: x @ p["w"])
            loss = lambda p: jnp.square(product(scheme.view(p, state), x)).sum()
            packed = scheme.compress(params, state)
            return (
                product(scheme.view(params, state), x),
                product(packed, x),
                packed,
                (jax.grad(loss)(params)),
            )

        view, stored, packed, grads = run(both, params, state)
        np.testing.assert_array_equal(view, stored)
        assert grads["w"].buckets.any()
        assert packed["w"].stored_bytes < params["w"].stored_bytes
        assert packed["w"].method.startswith("hashed to 256 buckets, ")


def test_a_bucket_belongs_to_the_whole_weight() -> None:
    leaf = leaf_of(FORMS["elements"])
    with pytest.raises(ValueError, match=r"axes cannot be cut.*Replicate it"):
        jc.shardings({"w": leaf}, {"w": P(None, "d")}, mesh())
    stack = leaf_of(FORMS["elements"], stack=1)
    specs = jc.shardings({"w": stack}, {"w": P("d")}, mesh())
    assert specs["w"].buckets == P("d", None)


def test_training_a_64_times_smaller_layer_never_holds_the_dense_weight() -> None:
    n = 1024
    for hashing, most in ((h.Hashing(), 1.0), (h.Hashing((16, 16)), 0.25)):
        make = lambda w, hashing=hashing: h.fit_hashed(w, ratio=64.0, hashing=hashing)
        leaf = jax.eval_shape(make, jax.ShapeDtypeStruct((n, n), jnp.float32))
        loss = jc.lift(lambda w, x: jnp.square(x @ w).sum())
        step = jax.jit(
            lambda w, x, loss=loss: jax.tree.map(
                lambda a, g: a - 0.1 * g, w, jax.grad(loss)(w, x)
            )
        )
        x = jax.ShapeDtypeStruct((16, n), jnp.float32)
        memory = step.lower(leaf, x).compile().memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < most * 4 * n * n
