"""Leaves that wrap a leaf: they run as the dense weight, alone and nested."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.leaf import Cast, Leaf, Reshape, Transpose
from tests.lift.programs import mesh
from tests.quant.wrapping import KINDS, MATRIX, SITES, draw, make, run

kinds = pytest.mark.parametrize("kind", KINDS)
simple = pytest.mark.parametrize(
    "kind", ["scaled", "normalized", "rotated", "split", "corrected"]
)
INT4 = q.int4()
INT8 = q.Integer(bits=8)
W8A8 = q.int8(activations=q.dynamic(INT8))
GRADIENTS = ("transposed", "two_axes_apart", "batched")
STACK = jc.Axes(contract=(-2,), stack=1)


@functools.cache
def stack_of(kind: str, fmt: q.NumberFormat | None = INT4) -> Leaf:
    """Three layers of 16 x 16."""
    return run(lambda w: make(kind, w, fmt, STACK), draw(0, 3, 16, 16))


@functools.cache
def matrix(kind: str, fmt: q.NumberFormat | None = INT4) -> Leaf:
    return jax.tree.map(lambda a: a[1], stack_of(kind, fmt))


def dense(leaf: Leaf) -> np.ndarray:
    return np.asarray(run(jc.materialize, leaf))


@kinds
def test_a_leaf_runs_as_its_dense_weight(kind: str) -> None:
    """Value, and gradient as the adjoint, at every site, compiled together."""
    few = kind in ("nested", "quantized_factors")
    sites = {"batched": SITES["batched"]} if few else SITES
    ws = {name: draw(i, *site.w) for i, (name, site) in enumerate(sites.items())}
    xs = {name: draw(9, *site.x) for name, site in sites.items()}

    def all_sites(ws: Any, xs: Any) -> Any:
        found = {}
        for name, site in sites.items():
            leaf = make(kind, ws[name], None, site.axes)
            lifted = functools.partial(jc.lift(site.run), leaf)
            value, pull = jax.vjp(lifted, xs[name])
            gradient = pull(value)[0] if name in GRADIENTS else None
            found[name] = value, gradient, jc.materialize(leaf)
        return found

    for name, (value, gradient, w) in run(all_sites, ws, xs).items():
        expected = sites[name].exact(w, xs[name])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            value / scale, expected / scale, atol=2e-6, err_msg=name
        )
        if gradient is None:
            continue
        other = draw(8, *sites[name].x)
        moved = np.vdot(sites[name].exact(w, other), np.float64(value))
        np.testing.assert_allclose(np.vdot(gradient, other), moved, rtol=1e-3)


@simple
@pytest.mark.parametrize("name", ["two_axes_apart", "batched"])
def test_it_runs_by_its_own_rule(kind: str, name: str) -> None:
    site = SITES[name]
    build = lambda w: make(kind, w, W8A8, site.axes)
    leaf = jax.eval_shape(build, draw(0, *site.w).astype(jnp.bfloat16))
    x = jax.ShapeDtypeStruct(site.x, jnp.bfloat16)
    fn = lambda p, x: site.run(p["w"], x)
    (use,) = jc.explain(fn, {"w": leaf}, x)
    assert jax.eval_shape(jc.lift(fn), {"w": leaf}, x).dtype == jnp.bfloat16
    assert use.how.startswith(type(leaf).__name__)
    assert use.how.endswith("int8 dot")


def operand(leaf: Leaf, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a matrix's inner leaf multiplies, and what is added: the definitions."""
    x = np.float64(x)
    none = np.zeros(())
    match leaf:
        case q.ScaledArray():
            return x / np.asarray(leaf.channel_scale)[0], none
        case q.NormalizedArray():
            mean, deviation = np.asarray(leaf.mean)[0], np.asarray(leaf.deviation)[0]
            return x * deviation, (x * mean).sum(1, keepdims=True)
        case q.RotatedArray():
            h = np.ones((1, 1))
            while len(h) < leaf.block:
                h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
            h = np.kron(np.eye(x.shape[1] // leaf.block), h)
            return (x * np.asarray(leaf.signs)[0]) @ h, none
        case q.SplitArray():
            rest, beside = x.copy(), np.zeros((len(x), leaf.shape[1]))
            for slot, k in enumerate(np.asarray(leaf.index)[0]):
                if k < x.shape[1]:
                    rest[:, k] = 0
                    row = np.asarray(leaf.rows, np.float64)[:, slot]
                    beside += np.outer(x[:, k], row)
            return rest, beside
        case q.CorrectedArray():
            down, up = (np.float64(jc.materialize(a)) for a in (leaf.down, leaf.up))
            return x, leaf.scaling * (x @ down[0].T) @ up.T
    raise AssertionError(leaf)


@simple
def test_a_leaf_is_its_definition_and_quantizes_what_its_inner_leaf_takes(
    kind: str,
) -> None:
    leaf, x = matrix(kind, W8A8), draw(1, 5, 16)

    def both(leaf: Any, x: Any) -> Any:
        return jc.materialize((leaf.inner, leaf)), jc.lift(lambda w, x: x @ w)(leaf, x)

    (inner, whole), found = run(both, leaf, x)
    inner = np.float64(inner)
    entered, beside = operand(leaf, np.eye(16))
    np.testing.assert_allclose(whole, entered @ inner + beside, atol=1e-5)
    entered, beside = operand(leaf, x)
    scale = np.abs(entered).max(1, keepdims=True) / 127
    expected = np.rint(entered / scale) * scale @ inner + beside
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_stack_is_scanned_sliced_and_mapped() -> None:
    stack, x = stack_of("nested", None), draw(2, 4, 16)

    def layers(w: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def uses(w: Any, x: Any) -> Any:
        second = jc.lift(lambda w, x: x @ w[1])(w, x)
        mapped = jax.vmap(jc.lift(lambda w, x: x @ w), (0, None))(w, x)
        return jc.lift(layers)(w, x), second, mapped, jc.materialize(w)

    *found, w = run(uses, stack, x)
    each = np.einsum("bi,eio->ebo", x, w)
    through = np.float64(x)
    for layer in np.float64(w):
        through = np.tanh(through @ layer)
    for a, b in zip(found, (through, each[1], each), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    sites = jc.explain(layers, stack, x)
    assert [u.how.split(":")[0] for u in sites] == [type(stack).__name__]


def test_other_uses_run_on_the_dense_weight() -> None:
    """Contracting the outputs, a look-up, and a convolution."""
    leaf, image = matrix("nested", None), draw(3, 1, 3, 3, 4)
    conv_leaf = jax.jit(
        lambda w: make("nested", w, None, jc.Axes(contract=(-4, -3, -2)))
    )(draw(4, 2, 2, 4, 4))
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def fn(w: Any, c: Any, x: Any, image: Any) -> Any:
        return x @ w.T, w[jnp.array([3, 1])], conv(c, image)

    x = draw(5, 2, 16)
    found = run(jc.lift(fn), leaf, conv_leaf, x, image)
    expected = fn(jnp.asarray(dense(leaf)), jnp.asarray(dense(conv_leaf)), x, image)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["scaled", "rotated", "split"])
def test_prepared_activations_are_those_of_the_matmul(kind: str) -> None:
    """So that a ragged dot, and a convolution of one position, mean the same."""
    leaf, x = matrix(kind, W8A8), draw(6, 5, 16)

    def both(leaf: Any, x: Any) -> Any:
        prepared = leaf.prepare_activations(x, (1,))
        return prepared @ jc.materialize(leaf), jc.lift(lambda w, x: x @ w)(leaf, x)

    found, expected = run(both, leaf, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)

    weight_only = matrix(kind, None)

    def plain(x: jax.Array) -> jax.Array:
        assert weight_only.prepare_activations(x, (1,)) is x
        # A window of several positions cannot be divided: it stays as it is.
        assert leaf.prepare_activations(x[:, :8], (1,)).shape == (5, 8)
        return x

    jax.eval_shape(plain, x)


def test_layout_operations_keep_it_compressed() -> None:
    leaf = stack_of("nested", None)
    w = jnp.asarray(dense(leaf))
    moved = leaf.relayout(Transpose(permutation=(2, 0, 1)))
    np.testing.assert_array_equal(dense(moved), jnp.transpose(w, (2, 0, 1)))
    heads = leaf.relayout(Reshape(shape=(3, 4, 4, 16)))
    np.testing.assert_array_equal(dense(heads), w.reshape(3, 4, 4, 16))
    assert leaf.relayout(Reshape(shape=(48, 16))) is NotImplemented
    narrow = leaf.relayout(Cast(dtype=jnp.dtype(jnp.bfloat16)))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(dense(narrow)), w, rtol=2e-2, atol=0.05)


@pytest.mark.parametrize("kind", ["nested", "quantized_factors"])
def test_files_and_reports_hold_every_part(kind: str, tmp_path: Path) -> None:
    leaf = stack_of(kind)
    jc.io.save(tmp_path / "m.jc", {"w": leaf})
    back = jc.io.load(tmp_path / "m.jc")["w"]
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(leaf), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    (row,) = jc.report.size({"w": leaf}).rows
    assert row.memory_bytes == sum(a.nbytes for a in jax.tree.leaves(leaf))
    assert row.method.startswith("int4")


def test_a_sharded_leaf_runs_as_the_whole_one() -> None:
    leaf, x = matrix("nested", None), draw(7, 4, 16)
    specs = jc.shardings({"w": leaf}, {"w": P(None, "d")}, mesh())
    placed = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh(), s)), {"w": leaf}, specs
    )
    product = jax.jit(jc.lift(lambda p, x: x @ p["w"]))
    np.testing.assert_allclose(
        product(placed, x), product({"w": leaf}, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "message"), [("split", "numbered along"), ("rotated", "blocks of 16")]
)
def test_what_cannot_be_cut_is_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jc.shardings({"w": matrix(kind)}, {"w": P("d", None)}, mesh())


def test_contracting_axes_are_cut_where_they_can_be() -> None:
    build = lambda w: make("corrected", w, q.int8(), MATRIX)
    leaf = jax.eval_shape(build, draw(0, 16, 16))
    specs = jc.shardings({"w": leaf}, {"w": P("d", None)}, mesh())["w"]
    assert specs.down == P(None, None, "d")
    assert specs.up == P(None, None)


def test_training_may_change_the_factors_alone() -> None:
    trainable, _ = jc.partition({"w": matrix("corrected")})
    leaf = trainable["w"]
    assert leaf.inner.words is leaf.inner.scale is None
    assert leaf.down is not None
    assert leaf.up is not None
    frozen, _ = jc.partition({"w": matrix("scaled")})
    assert jax.tree.leaves(frozen) == []
