"""Large weights run by the kernels' matmul: values, gradients, layouts, reports."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.quant._kernels import kernel_format
from jaxcompress.quant._weight_only import LEAST
from tests.quant.wrapping import quantize, run

K, N = 512, 512


def normal(seed: int, *shape: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


FORMATS = {
    "int8": q.int8(),
    "int4 g128": q.int4(group_size=128),
    "uint3 g32": q.int3(group_size=32, symmetric=False),
    "per tensor": q.int8(granularity=q.PerTensor()),
    "blocks": q.int4(granularity=q.Block2D(out=64, contract=32)),
    "nf4": q.nf4(),
    "mxfp4": q.mxfp4(),
    "nvfp4": q.nvfp4(),
    "fp8": q.fp8_e4m3(),
}
FEW = ("int4 g128", "uint3 g32", "blocks", "nvfp4")


def test_agrees_with_the_dense_matmul_and_says_so() -> None:
    w, x = normal(0, K, N), normal(1, 3, K)
    assert w.size == LEAST
    leaves = run(lambda w: {n: q.quantize(w, fmt) for n, fmt in FORMATS.items()}, w)
    apply = lambda leaves, x: {
        n: jc.lift(jnp.matmul)(x, leaf) for n, leaf in leaves.items()
    }
    found, dense = run(
        lambda leaves, x: (
            apply(leaves, x),
            {n: x @ leaf.materialize() for n, leaf in leaves.items()},
        ),
        leaves,
        x,
    )
    for name in FEW:
        bound = 2.0**-24 * 2 * (K + 4) * (np.abs(x) @ np.abs(w)).max() * 1.5
        np.testing.assert_allclose(found[name], dense[name], atol=bound, rtol=0)
    ran = [site.how for site in jc.explain(apply, leaves, x)]
    assert all("dequantized by planes" in how for how in ran), ran


STACK = jc.Axes(contract=(-2,), stack=1)
SITES = {
    "left": ("oi,bi->ob", (256, 1024), (5, 1024), jc.Axes(contract=(-1,))),
    "heads": ("hdo,bhd->bo", (8, 128, 256), (3, 8, 128), jc.Axes(contract=(-3, -2))),
    "stack": (
        "sio,bsi->bso",
        (2, 512, 512),
        (3, 2, 512),
        jc.Axes(contract=(-2,), stack=1),
    ),
}
"""Product, shapes of weight and activations, roles of the weight's axes."""


@pytest.mark.parametrize("name", SITES)
def test_axes_and_batches(name: str) -> None:
    product, w, x, axes = SITES[name]
    leaf = quantize(normal(2, *w), q.int4(group_size=64), axes=axes)
    apply = lambda w, x: jnp.einsum(product, w, x)
    both = lambda leaf, x: (jc.lift(apply)(leaf, x), apply(leaf.materialize(), x))
    found, dense = run(both, leaf, normal(3, *x))
    assert leaf.traits.own_matmul
    np.testing.assert_allclose(found, dense, atol=3e-4)


def test_training_view_and_stored_form_are_bit_identical() -> None:
    params, x = {"w": 0.02 * normal(4, K, N)}, normal(5, 3, K)
    scheme = q.weights(q.int4(group_size=64))
    apply = jc.lift(lambda p, x: jnp.tanh(x @ p["w"]))

    def forward(params: Any) -> Any:
        params, state = scheme.init(params)
        loss = lambda p: apply(scheme.view(p, state), x).sum()
        gradient = jax.grad(loss)(params)
        packed = scheme.compress(params, state)
        return apply(scheme.view(params, state), x), apply(packed, x), gradient

    view, stored, gradient = run(forward, params)
    np.testing.assert_array_equal(view, stored)
    assert (gradient["w"] != 0).mean() > 0.9


def test_gradients_reach_what_is_before_a_frozen_base() -> None:
    w, x = normal(6, K, N), normal(7, 3, K)
    leaf = quantize(w, q.int4(group_size=64))
    loss = lambda leaf, x: jnp.sin(jc.lift(jnp.matmul)(x, leaf)).sum()
    dense = lambda leaf, x: jnp.sin(x @ leaf.materialize()).sum()
    both = lambda leaf, x: (jax.grad(loss, 1)(leaf, x), jax.grad(dense, 1)(leaf, x))
    found, wanted = run(both, leaf, x)
    np.testing.assert_allclose(found, wanted, atol=2e-3)


@pytest.mark.parametrize(("rows", "how"), [(32, "by planes"), (33, "dequantized dot")])
def test_many_rows_of_a_small_weight_are_multiplied_dense(rows: int, how: str) -> None:
    leaf = jax.eval_shape(lambda w: q.quantize(w, q.int8()), normal(8, K, N))
    x = jax.ShapeDtypeStruct((rows, K), jnp.float32)
    (site,) = jc.explain(lambda w, x: x @ w, leaf, x)
    assert how in site.how


def ragged(rows_of: str) -> tuple[Any, jc.Axes, tuple[int, ...]]:
    """A ragged dot by experts ``[E, in, out]`` or ``[E, out, in]``, sizes as given."""
    k = {"in": 1, "out": 2}[rows_of]
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (k,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(0,),
    )
    fn = lambda w, x, sizes: jax.lax.ragged_dot_general(x, w, sizes, numbers)
    shape = (3, K, N) if rows_of == "in" else (3, N, K)
    return fn, jc.Axes(contract=(k - 3,), stack=1), shape


@pytest.mark.parametrize("rows_of", ["in", "out"])
def test_experts_run_by_the_ragged_kernel(rows_of: str) -> None:
    fn, axes, shape = ragged(rows_of)
    leaf = quantize(normal(9, *shape), q.int4(group_size=64), axes=axes)
    x, sizes = normal(10, 9, K), jnp.array([2, 0, 5], jnp.int32)
    (site,) = jc.explain(fn, leaf, x, sizes)
    assert site.how == "int4 dequantized by experts"

    def both(leaf: Any, x: Any) -> Any:
        dense = leaf.materialize()
        loss = lambda fn, w: lambda x: jnp.sin(fn(w, x, sizes)).sum()
        found = jc.lift(fn)
        return (
            (found(leaf, x, sizes), jax.grad(loss(found, leaf))(x)),
            (fn(dense, x, sizes), jax.grad(loss(fn, dense))(x)),
        )

    (found, slope), (wanted, true_slope) = run(both, leaf, x)
    np.testing.assert_allclose(found, wanted, atol=3e-4)
    np.testing.assert_allclose(slope, true_slope, atol=2e-3)
    assert not np.asarray(found)[7:].any()


def test_experts_in_training_run_as_they_are_stored() -> None:
    fn, axes, shape = ragged("in")
    params, x = {"w": 0.02 * normal(11, *shape)}, normal(12, 6, K)
    sizes = jnp.array([1, 3, 2], jnp.int32)
    scheme = jc.select({"w": q.weights(q.int4(group_size=64))}, axes={"w": axes})
    apply = jc.lift(lambda p, x: jnp.tanh(fn(p["w"], x, sizes)))

    def forward(params: Any) -> Any:
        params, state = scheme.init(params)
        loss = lambda p: apply(scheme.view(p, state), x).sum()
        packed = scheme.compress(params, state)
        return loss(params), apply(packed, x).sum(), jax.grad(loss)(params)

    view, stored, gradient = run(forward, params)
    np.testing.assert_array_equal(view, stored)
    assert (gradient["w"] != 0).mean() > 0.9


def test_experts_contracted_along_another_axis_are_dequantized() -> None:
    fn, _, shape = ragged("in")
    w, x = normal(14, *shape), normal(15, 7, K)
    sizes = jnp.array([3, 0, 4], jnp.int32)
    for axes in (jc.Axes(contract=(-1,), stack=1), jc.Axes(contract=(-3,))):
        leaf = quantize(w, q.int8(), axes=axes)
        (site,) = jc.explain(fn, leaf, x, sizes)
        assert leaf.traits.own_matmul
        assert site.how == "dequantized"
        both = lambda leaf, x: (jc.lift(fn)(leaf, x, sizes), leaf.materialize())
        found, dense = run(both, leaf, x)
        np.testing.assert_allclose(found, fn(dense, x, sizes), atol=3e-4)


def test_quantized_activations_of_experts_are_dequantized() -> None:
    fn, axes, shape = ragged("in")
    leaf = jax.eval_shape(
        lambda w: q.quantize(w, jc.presets.W8A8, axes=axes), normal(13, *shape)
    )
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
    (site,) = jc.explain(fn, leaf, jax.ShapeDtypeStruct((6, K), jnp.float32), sizes)
    assert site.how == "dequantized"


def test_every_element_has_a_kernel_format() -> None:
    elements = {fmt.element for fmt in FORMATS.values()}
    elements |= {q.binary().element, q.ternary().element, q.mxfp8().element}
    codes = {e: np.arange(2**e.bits, dtype=np.uint8) for e in elements if e.bits < 8}
    assert len(codes) > 4

    def values(codes: list[Any]) -> Any:
        both = zip(wide, codes, strict=True)
        return [(kernel_format(e)[0].decode(c), e.decode(c)) for e, c in both]

    wide = list(codes)
    found = run(values, list(codes.values()))
    for element, (own, expected) in zip(wide, found, strict=True):
        unit = np.float32(kernel_format(element)[1])
        np.testing.assert_array_equal(own * unit, expected)
    for element in elements:
        assert kernel_format(element)[0].bits == element.bits
