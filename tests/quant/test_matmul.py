"""Matmuls whose weights and activations are both quantized."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q

INT8 = q.Integer(bits=8)
W8A8 = q.int8(activations=q.dynamic(INT8))
quantize = jax.jit(q.quantize, static_argnames=("fmt", "axes"))
materialize = jax.jit(jc.materialize)


class Site(NamedTuple):
    """A contraction of activations (or, on the left, weights) and its axes.

    Attributes:
      subscripts: Of `jnp.einsum`.
      x: Shape of the activations.
      w: Shape of the weight.
      axes: Roles of the weight's axes.
      tokens: Contracted axes of the activations.
      left: The weight is the first operand.
    """

    subscripts: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: Any
    tokens: tuple[int, ...]
    left: bool = False

    def run(self, w: Any, x: Any) -> jax.Array:
        return jnp.einsum(self.subscripts, *((w, x) if self.left else (x, w)))

    def exact(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.einsum(self.subscripts, *((w, x) if self.left else (x, w)))

    def activations(self) -> np.ndarray:
        """Tokens of very different magnitudes."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=self.x)
        kept = tuple(1 if a in self.tokens else n for a, n in enumerate(self.x))
        return (x * 2.0 ** rng.integers(-6, 6, kept)).astype(np.float32)

    def weight(self) -> np.ndarray:
        return np.random.default_rng(1).normal(size=self.w).astype(np.float32)


MATRIX = jc.Axes(contract=(-2,))
SITES = {
    "dense": Site("bi,io->bo", (5, 64), (64, 6), MATRIX, (1,)),
    "two_rows_axes": Site("bti,io->bto", (2, 5, 64), (64, 6), MATRIX, (2,)),
    "transposed": Site("bi,oi->bo", (5, 64), (6, 64), jc.Axes(contract=(-1,)), (1,)),
    "left": Site("io,bi->ob", (5, 64), (64, 6), MATRIX, (1,), left=True),
    "left_first": Site("io,ib->ob", (64, 5), (64, 6), MATRIX, (0,), left=True),
    "two_axes": Site(
        "bthd,hdo->bto",
        (2, 5, 4, 16),
        (4, 16, 6),
        jc.Axes(contract=(-3, -2)),
        (2, 3),
    ),
    "two_axes_apart": Site(
        "hbd,dho->bo", (4, 5, 16), (16, 4, 6), jc.Axes(contract=(-3, -2)), (0, 2)
    ),
    "two_outputs": Site(
        "bi,ihd->bhd", (5, 64), (64, 3, 2), jc.Axes(contract=(-3,)), (1,)
    ),
    "batched": Site(
        "ebi,eio->ebo", (3, 5, 64), (3, 64, 6), jc.Axes(contract=(-2,), stack=1), (2,)
    ),
    "batched_inside": Site(
        "bei,eio->beo", (5, 3, 64), (3, 64, 6), jc.Axes(contract=(-2,), stack=1), (2,)
    ),
    "batched_left": Site(
        "eio,bei->eob",
        (5, 3, 64),
        (3, 64, 6),
        jc.Axes(contract=(-2,), stack=1),
        (2,),
        left=True,
    ),
    "batched_second": Site("ebi,feio->ebfo", (3, 5, 64), (2, 3, 64, 6), MATRIX, (2,)),
    "batched_twice": Site(
        "feb,efbo->efo",
        (2, 3, 16),
        (3, 2, 16, 6),
        jc.Axes(contract=(-2,), stack=2),
        (2,),
    ),
}
sites = pytest.mark.parametrize("name", SITES)


def symmetric(a: np.ndarray, axes: Any, *, top: int) -> np.ndarray:
    """Integers times the scale that takes their largest to `top`."""
    a = np.float64(a)
    scale = np.abs(a).max(axes, keepdims=True) / top
    return np.rint(a / scale) * scale


def stored(site: Site, fmt: q.NumberFormat, **options: Any) -> q.QuantizedArray:
    return quantize(site.weight(), fmt, axes=site.axes, **options)


def run(site: Site, leaf: Any, x: Any) -> tuple[jax.Array, str]:
    """The result, and how it ran."""
    fn = lambda params, x: site.run(params["w"], x)
    (use,) = jc.explain(fn, {"w": leaf}, x)
    return jax.jit(jc.lift(fn))({"w": leaf}, x), use.how


@sites
def test_the_int8_dot_is_the_integer_computation(name: str) -> None:
    site = SITES[name]
    x, leaf = site.activations(), stored(site, W8A8)
    found, how = run(site, leaf, x)
    assert how == "int8 dot"
    w = np.float64(materialize(leaf))
    expected = site.exact(w, symmetric(x, site.tokens, top=127))
    # Sums are exact and scaled twice, so small results keep their digits too.
    np.testing.assert_allclose(found, expected, rtol=5e-7)
    np.testing.assert_allclose(
        w, symmetric(site.weight(), site.axes.contract, top=127), rtol=2**-15
    )


def test_batch_axes_may_be_paired_in_any_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 5, 16)).astype(np.float32)
    w = rng.normal(size=(3, 2, 16, 6)).astype(np.float32)
    leaf = quantize(w, W8A8, axes=jc.Axes(contract=(-2,), stack=2))
    numbers = (((3,), (2,)), ((0, 1), (1, 0)))
    dot = jax.jit(lambda leaf, x: leaf.dot_general(x, numbers, leaf_is_lhs=False).out)
    expected = np.einsum(
        "efbi,feio->efbo", symmetric(x, 3, top=127), np.float64(materialize(leaf))
    )
    np.testing.assert_allclose(dot(leaf, x), expected, rtol=5e-7)


@pytest.mark.parametrize(
    ("fmt", "top"),
    [
        (q.int4(activations=q.dynamic(INT8)), 127),
        (q.int8(activations=q.dynamic(q.Integer(bits=4))), 7),
        (q.int8(narrow=False, activations=q.dynamic(INT8)), 127),
        (q.ternary(activations=q.dynamic(INT8)), 127),
        (q.int8(granularity=q.PerTensor(), activations=q.dynamic(INT8)), 127),
    ],
    ids=lambda fmt: getattr(fmt, "name", None),
)
def test_other_integers_go_the_same_way(fmt: q.NumberFormat, top: int) -> None:
    site = SITES["dense"]
    x, leaf = site.activations(), stored(site, fmt)
    found, how = run(site, leaf, x)
    assert how == "int8 dot"
    w = np.float64(materialize(leaf))
    expected = site.exact(w, symmetric(x, site.tokens, top=top))
    np.testing.assert_allclose(found, expected, rtol=5e-7)


@pytest.mark.parametrize("name", ["dense", "left_first", "batched_inside"])
def test_one_scale_for_all_tokens(name: str) -> None:
    site = SITES[name]
    x = site.activations()
    leaf = stored(site, q.int8(activations=q.dynamic(INT8, per="tensor")))
    found, how = run(site, leaf, x)
    assert how == "int8 dot"
    expected = site.exact(np.float64(materialize(leaf)), symmetric(x, None, top=127))
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=1e-30)


@pytest.mark.parametrize("name", ["dense", "left_first", "two_axes"])
def test_a_static_scale_clips_activations(name: str) -> None:
    site = SITES[name]
    x = site.activations()
    fmt = q.int8(activations=q.static(INT8))
    leaf = stored(site, fmt, activation_scale=2.0**-6)
    found, how = run(site, leaf, x)
    assert how == "int8 dot"
    clipped = np.clip(np.rint(np.float64(x) * 64), -127, 127) / 64
    assert (np.abs(x) > 2).any()
    expected = site.exact(np.float64(materialize(leaf)), clipped)
    np.testing.assert_allclose(found, expected, rtol=5e-7)


@pytest.mark.parametrize(
    "fmt",
    [
        q.int8(group_size=8, activations=q.dynamic(INT8)),
        q.int8(symmetric=False, activations=q.dynamic(INT8)),
        q.fp8_e4m3(activations=q.dynamic(INT8)),
        q.mxint8(activations=q.dynamic(INT8)),
    ],
    ids=lambda fmt: fmt.name,
)
@pytest.mark.parametrize("name", ["dense", "left_first"])
def test_where_scales_lie_inside_the_sum_values_are_multiplied(
    name: str, fmt: q.NumberFormat
) -> None:
    site = SITES[name]
    x, leaf = site.activations(), stored(site, fmt)
    found, how = run(site, leaf, x)
    assert how == "fake-quantized dot"
    expected = site.exact(
        np.float64(materialize(leaf)), symmetric(x, site.tokens, top=127)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_matmul_over_the_outputs_quantizes_its_own_tokens() -> None:
    """As in tied embeddings: the stored scales lie inside this sum."""
    over_inputs = Site("bo,io->bi", (5, 6), (64, 6), MATRIX, (1,))
    x, leaf = over_inputs.activations(), stored(over_inputs, W8A8)
    found, how = run(over_inputs, leaf, x)
    assert how == "fake-quantized dot"
    expected = over_inputs.exact(
        np.float64(materialize(leaf)), symmetric(x, 1, top=127)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def gradients(site: Site, leaf: q.QuantizedArray) -> tuple[np.ndarray, np.ndarray]:
    """Of the activations: through the leaf, and through its dense values."""
    x, w = site.activations(), materialize(leaf)
    y, pull_back = jax.vjp(jax.jit(lambda x: jc.lift(site.run)(leaf, x)), x)
    _, dense_pull_back = jax.vjp(lambda x: site.run(w, x), x)
    g = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    return np.asarray(pull_back(g)[0]), np.asarray(dense_pull_back(g)[0])


@pytest.mark.parametrize("name", ["dense", "left_first", "two_axes", "batched_inside"])
def test_the_gradient_is_that_of_the_fake_quantized_dot(name: str) -> None:
    site = SITES[name]
    found, expected = gradients(site, stored(site, W8A8))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "two_axes"])
def test_a_static_scale_stops_the_gradient_where_it_clips(name: str) -> None:
    site = SITES[name]
    fmt = q.int8(activations=q.static(INT8))
    found, expected = gradients(site, stored(site, fmt, activation_scale=2.0**-6))
    inside = np.abs(site.activations()) <= 127 / 64
    assert not inside.all()
    np.testing.assert_allclose(found, expected * inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["left_first", "two_axes"])
def test_the_gradient_of_scales_sees_the_quantized_activations(name: str) -> None:
    site = SITES[name]
    x, leaf = site.activations(), stored(site, W8A8)
    fake = symmetric(x, site.tokens, top=127).astype(np.float32)
    loss = lambda run, x: lambda scale: run(leaf.replace(scale=scale), x).sum()
    dense = lambda leaf, x: site.run(leaf.materialize(), x)
    found = jax.jit(jax.grad(loss(jc.lift(site.run), x)))(leaf.scale)
    expected = jax.jit(jax.grad(loss(dense, fake)))(leaf.scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def weight_gradient(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of a training view, and as it should be: activations times cotangents."""
    site = SITES[name]
    x, w = site.activations(), jnp.asarray(site.weight())
    scheme = q.weights(W8A8.replace(axes=site.axes))
    loss = lambda w: jc.lift(site.run)(scheme.view(w, state), x).sum()
    _, state = scheme.init(w)
    fake = symmetric(x, site.tokens, top=127).astype(np.float32)
    expected = jax.grad(lambda w: site.run(w, fake).sum())
    return jax.jit(jax.grad(loss))(w), jax.jit(expected)(w)


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "left",
        "batched_inside",
        "left_first",
        "two_axes",
    ],
)
def test_weights_in_training_see_the_quantized_activations(name: str) -> None:
    found, expected = weight_gradient(name)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_outputs_may_share_a_scale() -> None:
    site = SITES["dense"]
    granularity = q.Block2D(out=2, contract=64)
    fmt = q.int8(granularity=granularity, activations=q.dynamic(INT8))
    x, leaf = site.activations(), stored(site, fmt)
    found, _ = run(site, leaf, x)
    w = np.float64(materialize(leaf))
    expected = site.exact(w, symmetric(x, 1, top=127))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "preferred", "expected"),
    [
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, None, jnp.float32),
    ],
)
def test_the_result_has_the_dtype_of_the_dense_dot(
    dtype: Any, preferred: Any, expected: Any
) -> None:
    site = SITES["dense"]
    leaf = quantize(jnp.asarray(site.weight(), dtype), W8A8)
    x = jnp.asarray(site.activations(), dtype)
    fn = lambda w, x: jnp.matmul(x, w, preferred_element_type=preferred)
    found = jax.jit(jc.lift(fn))(leaf, x)
    assert found.dtype == expected == jax.eval_shape(fn, materialize(leaf), x).dtype
    scale = np.abs(np.float64(x)).max(1, keepdims=True) / 127
    codes = np.rint(np.float64(x) / scale)
    w_scale = np.float64(leaf.scale).T
    w = np.rint(np.float64(materialize(leaf)) / w_scale) * w_scale
    np.testing.assert_allclose(
        np.float64(found), codes * scale @ w, rtol=float(jnp.finfo(expected).eps)
    )


def test_a_token_of_zeros_gives_zeros() -> None:
    site = SITES["dense"]
    x = site.activations()
    x[2] = 0
    found, _ = run(site, stored(site, W8A8), x)
    assert not np.asarray(found)[2].any()
    assert np.asarray(found).any(1).sum() == 4


def test_a_convolution_quantizes_its_input_too() -> None:
    rng = np.random.default_rng(3)
    w = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
    x = rng.normal(size=(2, 5, 5, 4)).astype(np.float32)
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    leaf = quantize(w, W8A8, axes=(-4, -3, -2))
    fake = symmetric(x, -1, top=127).astype(np.float32)
    np.testing.assert_allclose(
        jax.jit(jc.lift(conv))(leaf, x),
        jax.jit(conv)(materialize(leaf), fake),
        rtol=1e-5,
        atol=1e-5,
    )
