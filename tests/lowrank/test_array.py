"""`LowRankArray`: what it stands for, and where it runs without the dense weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import lowrank
from jaxcompress.leaf import Cast, Reshape, Transpose
from tests.lift.programs import mesh
from tests.lowrank.weights import CONV, MATRIX, STACK, TABLE, draw, run, sees

RANK = 2

SITES = {
    "plain": ("bi,io->bo", (5, 24), (24, 6), MATRIX, False),
    "transposed": ("bi,oi->bo", (5, 24), (6, 24), TABLE, False),
    "against_its_axes": ("bo,io->bi", (5, 6), (24, 6), MATRIX, False),
    "on_the_left": ("io,bi->ob", (5, 24), (24, 6), MATRIX, True),
    "two_axes": ("bhd,hdo->bo", (5, 4, 6), (4, 6, 7), (-3, -2), False),
    "two_axes_apart": ("hbd,dho->bo", (4, 5, 6), (6, 4, 7), (-3, -2), False),
    "two_outputs": ("bi,ihd->bhd", (5, 9), (9, 4, 6), jc.Axes(contract=(-3,)), False),
    "between": ("bi,hid->bhd", (5, 9), (4, 9, 6), jc.Axes(contract=(-2,)), False),
    "batched": ("bei,eio->beo", (5, 3, 24), (3, 24, 6), STACK, False),
    "batched_on_the_left": ("eio,ebi->eob", (3, 5, 24), (3, 24, 6), STACK, True),
}


def leaf_of(w: jax.Array, axes: Any, *, gated: bool = False) -> lowrank.LowRankArray:
    leaf = jax.eval_shape(lambda w: lowrank.svd_weight(w, RANK, axes=axes), w)
    leaf = leaf.replace(
        left=draw(2, *leaf.left.shape), right=draw(3, *leaf.right.shape)
    )
    if not gated:
        return leaf
    stack = w.shape[: leaf.stack]
    return leaf.replace(gate=jnp.broadcast_to(jnp.array([1.0, 0.25]), (*stack, RANK)))


@pytest.mark.parametrize("site", SITES)
def test_a_matmul_runs_through_the_factors(site: str) -> None:
    subscripts, x_shape, w_shape, axes, left = SITES[site]
    w, x = draw(0, *w_shape), draw(1, *x_shape)

    def fn(w: Any, x: Any) -> jax.Array:
        return jnp.einsum(subscripts, *((w, x) if left else (x, w)))

    leaf = leaf_of(w, axes, gated=True)
    dense = np.float64(leaf.materialize())
    operands = (dense, np.float64(x)) if left else (np.float64(x), dense)
    found = run(jc.lift(fn), leaf, x)
    np.testing.assert_allclose(
        found, np.einsum(subscripts, *operands), rtol=1e-4, atol=1e-4
    )
    assert not sees(fn, leaf, x, shape=w_shape)


def test_what_contracts_part_of_a_side_is_dense() -> None:
    w, x = draw(0, 4, 6, 7), draw(1, 5, 6)
    leaf = leaf_of(w, (-3, -2))
    fn = lambda w, x: jnp.einsum("bd,hdo->bho", x, w)
    dense = np.float64(leaf.materialize())
    expected = np.einsum("bd,hdo->bho", np.float64(x), dense)
    np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)


def test_the_value_is_the_gated_product() -> None:
    leaf = leaf_of(draw(0, 3, 8, 6), STACK, gated=True)
    left, right = np.float64(leaf.left), np.float64(leaf.right)
    expected = np.einsum("sir,sr,sro->sio", left, np.float64(leaf.gate), right)
    np.testing.assert_allclose(leaf.materialize(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": "VALID", "rhs_dilation": (1, 2)},
    ],
    ids=["same", "strided"],
)
def test_a_convolution_is_a_thin_one_and_a_pointwise_one(
    options: Any,
) -> None:
    w, x = draw(0, 3, 3, 4, 9), draw(1, 2, 8, 8, 4)
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(w: Any, x: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, **options, dimension_numbers=numbers)

    leaf = leaf_of(w, CONV, gated=True)
    expected = run(fn, leaf.materialize(), x)
    np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)
    assert not sees(fn, leaf, x, shape=w.shape)


def test_a_convolution_of_groups_is_dense() -> None:
    w, x = draw(0, 3, 3, 2, 8), draw(1, 1, 6, 6, 4)
    fn = lambda w, x: jax.lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    leaf = leaf_of(w, CONV)
    expected = run(fn, leaf.materialize(), x)
    np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)


def test_a_look_up_reads_rows_of_the_left_factor_alone() -> None:
    """Out of range as the dense one: NaN of `jnp.take`, the last of an index."""
    table, ids = draw(0, 40, 6), jnp.array([[3, 39], [0, 3]])
    leaf = leaf_of(table, TABLE, gated=True)
    for fn in (lambda w, i: jnp.take(w, i, axis=0, mode="clip"), lambda w, i: w[i]):
        expected = np.asarray(leaf.materialize())[np.asarray(ids)]
        np.testing.assert_allclose(run(jc.lift(fn), leaf, ids), expected, atol=1e-5)
        assert not sees(fn, leaf, ids, shape=(40, 6))


def test_a_look_up_in_quantized_factors_reads_rows_too() -> None:
    scheme = jc.select(
        {"*": jc.chain(lowrank.svd(rank=RANK), jc.quant.int8())}, axes={"w": TABLE}
    )
    packed = scheme.compress(*scheme.init({"w": draw(0, 40, 6)}))
    assert str(packed["w"]) == "LowRankArray(rank 2 int8, float32[40, 6])"
    fn = lambda p, i: p["w"][i]
    ids = jnp.array([7, 0, 39])
    expected = packed["w"].materialize()[ids]
    np.testing.assert_allclose(run(jc.lift(fn), packed, ids), expected, atol=1e-5)
    text = str(jax.make_jaxpr(jc.lift(fn))(packed, ids))
    assert "u8[3,2]" in text
    assert not sees(fn, packed, ids, shape=(40, 6))
    assert not sees(fn, packed, ids, shape=(40, RANK))


OPS = [
    ((8, 6), MATRIX, Transpose(permutation=(1, 0))),
    ((8, 6), MATRIX, Reshape(shape=(2, 4, 3, 2))),
    ((8, 6), MATRIX, Reshape(shape=(1, 8, 1, 6, 1))),
    ((8, 2), MATRIX, Reshape(shape=(8, 1, 2))),
    ((8, 6), MATRIX, Cast(dtype=jnp.dtype("bfloat16"))),
    ((3, 8, 6), STACK, Transpose(permutation=(0, 2, 1))),
    ((3, 8, 6), STACK, Reshape(shape=(3, 2, 4, 6))),
    ((1, 1, 8, 6), CONV, Reshape(shape=(8, 6))),
    ((2, 3, 4, 5), CONV, Reshape(shape=(24, 5))),
    ((2, 3, 4, 5), CONV, Transpose(permutation=(3, 2, 0, 1))),
    ((4, 9, 6), jc.Axes(contract=(-2,)), Transpose(permutation=(1, 2, 0))),
]


@pytest.mark.parametrize(("shape", "axes", "op"), OPS, ids=lambda v: str(v)[:40])
def test_layout_operations_move_the_factors(
    shape: tuple[int, ...], axes: Any, op: Any
) -> None:
    leaf = leaf_of(draw(0, *shape), axes, gated=True)
    moved = leaf.relayout(op)
    dense = leaf.materialize()
    if isinstance(op, Transpose):
        expected = jnp.transpose(dense, op.permutation)
    elif isinstance(op, Reshape):
        expected = dense.reshape(op.shape)
    else:
        expected = dense.astype(op.dtype)
    assert (moved.shape, moved.dtype) == (expected.shape, expected.dtype)
    exact = op.dtype.itemsize > 2 if isinstance(op, Cast) else True
    np.testing.assert_allclose(
        np.float32(moved.materialize()),
        np.float32(expected),
        atol=1e-6 if exact else 0.1,
    )


@pytest.mark.parametrize(
    ("shape", "axes", "op"),
    [
        ((8, 6), MATRIX, Reshape(shape=(48,))),
        ((8, 6), MATRIX, Reshape(shape=(16, 3))),
        ((3, 8, 6), STACK, Transpose(permutation=(1, 0, 2))),
        ((3, 8, 6), STACK, Reshape(shape=(24, 6))),
    ],
)
def test_what_mixes_sides_or_stacks_is_not_followed(
    shape: tuple[int, ...], axes: Any, op: Any
) -> None:
    assert leaf_of(draw(0, *shape), axes).relayout(op) is NotImplemented


def test_gradients_are_those_of_the_product() -> None:
    leaf, x = leaf_of(draw(0, 8, 6), MATRIX, gated=True), draw(1, 5, 8)

    def loss(leaf: Any, x: Any) -> jax.Array:
        return jnp.square(jc.lift(lambda w, x: x @ w)(leaf, x)).sum()

    def by_hand(leaf: Any, x: Any) -> jax.Array:
        return jnp.square(x @ ((leaf.left * leaf.gate[None]) @ leaf.right)).sum()

    for a, b in zip(
        jax.tree.leaves(run(jax.grad(loss, argnums=(0, 1)), leaf, x)),
        jax.tree.leaves(run(jax.grad(by_hand, argnums=(0, 1)), leaf, x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_activations_in_half_precision_give_their_dtype() -> None:
    leaf = leaf_of(draw(0, 8, 6), MATRIX).relayout(Cast(dtype=jnp.dtype("bfloat16")))
    x = draw(1, 5, 8).astype(jnp.bfloat16)
    y = run(jc.lift(lambda w, x: x @ w), leaf, x)
    assert y.dtype == jnp.bfloat16
    expected = np.float64(x) @ np.float64(leaf.materialize())
    np.testing.assert_allclose(np.float64(y), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [((16, 24), MATRIX, P("d")), ((8, 6, 10), STACK, P("d"))],
    ids=["inputs", "stack"],
)
def test_it_is_sharded_as_its_weight(shape: Any, axes: Any, spec: P) -> None:
    leaf = leaf_of(draw(0, *shape), axes, gated=True)
    specs = jc.shardings(leaf, spec, mesh())
    assert specs.left == P("d", *[None] * (leaf.left.ndim - 1))
    placed = jax.tree.map(
        lambda a, s: jax.device_put(a, NamedSharding(mesh(), s)), leaf, specs
    )
    np.testing.assert_allclose(
        jax.jit(jc.materialize)(placed), leaf.materialize(), atol=1e-5
    )


def test_only_the_gate_is_not_decayed() -> None:
    leaf = leaf_of(draw(0, 8, 6), MATRIX, gated=True)
    mask = jc.weight_decay_mask(leaf)
    assert (mask.left, mask.right, mask.gate) == (True, True, False)
    assert jax.tree.leaves(jc.partition(leaf)[1]) == []
