"""Packed words, layout operations, slices and cuts of a quantized leaf."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import quant as q
from jaxcompress.leaf import Cast, Reshape, Transpose

quantize = jax.jit(q.quantize, static_argnames=("fmt", "axes"))
materialize = jax.jit(jc.materialize)
unpack = jax.jit(lambda leaf: leaf.unpack())
codes_of = jax.jit(lambda leaf: (leaf.elements(), leaf.codes()))


def abstract(*shape: int, fmt: q.NumberFormat, axes: Any = None) -> q.QuantizedArray:
    """A leaf without data, for what follows from shapes alone."""
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: q.quantize(w, fmt, axes=axes), w)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of a little-endian bit stream, read bit by bit."""
    ones = np.unpackbits(words, axis=-1, bitorder="little")[..., : bits * count]
    places = ones.reshape(*words.shape[:-1], count, bits).astype(int)
    return places @ 2 ** np.arange(bits)


# -- storage

PACKED = {
    1: q.binary(),
    2: q.int2(symmetric=False),
    3: q.int3(),
    4: q.fp4_e2m1(),
    5: q.int5(symmetric=False),
    6: q.fp6_e3m2(),
    7: q.int7(),
    8: q.fp8_e4m3(),
}


@pytest.mark.parametrize("bits", PACKED)
def test_words_are_a_bit_stream_along_the_contracting_axis(bits: int) -> None:
    inputs, outputs = 11, 3
    leaf = quantize(draw(inputs, outputs), PACKED[bits])
    assert leaf.bits == bits
    assert leaf.words.dtype == jnp.uint8
    assert leaf.words.shape == (outputs, math.ceil(inputs * bits / 8))
    assert leaf.shape == (inputs, outputs)
    codes = stream(np.asarray(leaf.words), bits, inputs)
    elements, logical = codes_of(leaf)
    np.testing.assert_array_equal(elements, codes)
    np.testing.assert_array_equal(logical, codes.T)


@pytest.mark.parametrize("bits", [3, 8])
def test_unpacking_and_packing_again_changes_nothing(bits: int) -> None:
    leaf = quantize(draw(11, 3), PACKED[bits])
    loose = unpack(leaf)
    assert (loose.packed, loose.words.shape, loose.pad) == (False, (11, 3), 0)
    assert loose.unpack() is loose
    assert leaf.pack() is leaf
    again = jax.jit(lambda leaf: leaf.pack())(loose)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(again.words, leaf.words)
    np.testing.assert_array_equal(materialize(loose), materialize(leaf))


@pytest.mark.parametrize(
    ("fmt", "words", "others"),
    [
        (q.int4(), 6 * 32 // 2, 6 * 4),
        (q.int3(group_size=8), 6 * 32 * 3 // 8, 6 * 4 * 4),
        (q.int4(symmetric=False, group_size=16), 6 * 32 // 2, 6 * 2 * (4 + 1)),
        (q.int8(granularity=q.PerTensor(), scale_dtype=jnp.bfloat16), 6 * 32, 2),
        (q.mxfp6(), 6 * 32 * 6 // 8, 6),
        (q.nvfp4(), 6 * 32 // 2, 6 * 2 + 4),
        (q.nf4(granularity=q.Block2D(out=3, contract=8)), 6 * 32 // 2, 2 * 4 * 4),
    ],
    ids=lambda fmt: getattr(fmt, "name", None),
)
def test_stored_bytes_are_words_scales_and_zero_points(
    fmt: q.NumberFormat, words: int, others: int
) -> None:
    leaf = abstract(32, 6, fmt=fmt)
    assert (leaf.words.size, leaf.words.dtype) == (words, jnp.uint8)
    assert leaf.stored_bytes == words + others


def test_a_static_activation_scale_is_stored_too() -> None:
    fmt = q.int8(activations=q.static(q.Integer(bits=8)))
    leaf = quantize(draw(32, 6), fmt, activation_scale=np.float32(0.5))
    assert leaf.stored_bytes == 6 * 32 + 6 * 4 + 4
    assert leaf.activation_scale.shape == (1, 1)


def test_a_stack_stores_a_scale_of_activations_for_each_layer() -> None:
    fmt = q.int8(activations=q.static(q.Integer(bits=8)), axes=-2)
    scales = np.float32([0.5, 0.25, 2.0])
    leaf = quantize(draw(3, 8, 6), fmt, activation_scale=scales)
    np.testing.assert_array_equal(leaf.activation_scale, scales[:, None, None])


@pytest.mark.parametrize(
    ("axes", "storage"),
    [
        (-2, (3, 6, 8)),
        ((-3, -2), (6, 24)),
        ((-3, -1), (8, 18)),
        (-1, (3, 8, 6)),
    ],
)
def test_storage_is_stack_outputs_and_flattened_inputs(
    axes: Any, storage: tuple[int, ...]
) -> None:
    leaf = abstract(3, 8, 6, fmt=q.int8(), axes=axes)
    assert leaf.words.shape == storage
    assert leaf.scale.shape == (*storage[:-1], 1)
    assert leaf.shape == (3, 8, 6)


def test_codes_are_of_the_formula_in_the_docstring() -> None:
    w = draw(3, 8, 6)
    leaf = quantize(w, q.int4(symmetric=False, group_size=4), axes=(-3, -2))
    code, zero, scale = (
        np.float64(a) for a in (codes_of(leaf)[0], leaf.zero_point, leaf.scale)
    )
    expected = [
        [(code[o, k] - zero[o, k // 4]) * scale[o, k // 4] for o in range(6)]
        for k in range(24)
    ]
    np.testing.assert_array_equal(
        materialize(leaf), np.reshape(expected, w.shape).astype(np.float32)
    )


def test_a_leaf_prints_its_method_dtype_and_shape() -> None:
    leaf = quantize(jnp.asarray(draw(8, 6), jnp.bfloat16), q.int4(group_size=4))
    assert repr(leaf) == "QuantizedArray(int4 g4, bfloat16[8, 6])"
    assert (leaf.method, leaf.dtype, leaf.ndim, leaf.size) == (
        "int4 g4",
        jnp.bfloat16,
        2,
        48,
    )


@pytest.mark.parametrize(
    ("fmt", "kept"),
    [
        (q.int4(), True),
        (q.int4(symmetric=False), True),
        (q.ternary(), True),
        (q.nf4(), True),
        (q.binary(), False),
        (q.table((-1.0, 1.0)), False),
    ],
    ids=lambda fmt: getattr(fmt, "name", None),
)
def test_a_leaf_knows_whether_zero_is_on_its_grid(
    fmt: q.NumberFormat, kept: bool
) -> None:
    w = draw(8, 6)
    w[::2] = 0
    leaf = quantize(w, fmt)
    assert leaf.traits.preserves_zeros == kept
    assert (not np.asarray(materialize(leaf))[::2].any()) == kept


# -- corruption is noticed


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_arithmetic_over_the_tree_is_noticed_when_words_are_read(packed: bool) -> None:
    leaf = quantize(draw(8, 6), q.int4())
    leaf = leaf if packed else unpack(leaf)
    halved = jax.tree.map(lambda a: a.astype(jnp.float32) * 0.5, leaf)
    with pytest.raises(TypeError, match=r"words must be uint8; got float32.*averag"):
        halved.materialize()


@pytest.mark.parametrize(
    "operate",
    [
        *(lambda a, f=f: f(a, 2.0) for f in (operator.add, operator.sub, operator.mul)),
        *(lambda a, f=f: f(2.0, a) for f in (operator.add, operator.sub, operator.mul)),
        *(lambda a, f=f: f(a, a) for f in (operator.truediv, operator.matmul)),
        lambda a: 2.0 / a,
        lambda a: a**2,
        lambda a: -a,
        lambda a: a[0],
        lambda a: np.asarray(a),
        lambda a: jnp.ones(8) @ a,
    ],
)
def test_arithmetic_on_a_leaf_is_refused(operate: Callable[[Any], Any]) -> None:
    leaf = quantize(draw(8, 6), q.int4())
    with pytest.raises(TypeError, match=r"int4.*compressed leaf.*materialize"):
        operate(leaf)


def test_a_leaf_cannot_be_iterated() -> None:
    with pytest.raises(TypeError, match="not iterable"):
        iter(quantize(draw(8, 6), q.int4()))


# -- layout operations

CONTRACTS_TWO = jc.Axes(contract=(-3, -2))
MOVES: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "transposed": (-2, (8, 6), Transpose(permutation=(1, 0))),
    "permuted": (CONTRACTS_TWO, (2, 4, 6), Transpose(permutation=(2, 0, 1))),
    "stack_moved": (-2, (3, 8, 6), Transpose(permutation=(1, 0, 2))),
    "merged": (CONTRACTS_TWO, (2, 4, 6), Reshape(shape=(8, 6))),
    "split": (-2, (8, 6), Reshape(shape=(2, 4, 6))),
    "unit_axis": (-2, (8, 6), Reshape(shape=(1, 8, 6))),
}


@pytest.mark.parametrize("view", [False, True], ids=["packed", "unpacked"])
@pytest.mark.parametrize("name", MOVES)
def test_a_layout_operation_moves_the_values_but_not_the_words(
    name: str, view: bool
) -> None:
    axes, shape, op = MOVES[name]
    leaf = quantize(draw(*shape), q.int4(group_size=4), axes=axes)
    dense = np.asarray(materialize(leaf))
    moved = (unpack(leaf) if view else leaf).relayout(op)
    expected = (
        dense.transpose(op.permutation)
        if isinstance(op, Transpose)
        else dense.reshape(op.shape)
    )
    assert moved.shape == expected.shape
    np.testing.assert_array_equal(materialize(moved), expected)
    assert view or moved.words is leaf.words


@pytest.mark.parametrize(
    "op",
    [
        Reshape(shape=(24, 2)),
        Reshape(shape=(48,)),
        Reshape(shape=(8, 2, 3)),
        Cast(dtype=np.dtype("float64")),
    ],
    ids=str,
)
def test_what_would_move_words_is_left_to_dense_arrays(op: Any) -> None:
    assert abstract(8, 6, fmt=q.int4()).relayout(op) is NotImplemented


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrower_cast_rounds_the_float32_values(dtype: Any) -> None:
    leaf = quantize(draw(8, 6), q.int8())
    cast = leaf.relayout(Cast(dtype=np.dtype(dtype)))
    assert cast.dtype == dtype
    expected = np.asarray(materialize(leaf)).astype(dtype)
    np.testing.assert_array_equal(materialize(cast), expected)


def test_a_cast_to_a_wider_dtype_would_invent_digits() -> None:
    leaf = quantize(jnp.asarray(draw(8, 6), jnp.bfloat16), q.int8())
    assert leaf.relayout(Cast(dtype=np.dtype("float32"))) is NotImplemented


# -- leading axes

STACKS = {
    "stack": (-2, 1, q.int4(group_size=4)),
    "outputs": ((-1,), 2, q.int4(symmetric=False)),
    "per_tensor": (jc.Axes(contract=(-2,)), 1, q.int4(granularity=q.PerTensor())),
    "blocks": (
        jc.Axes(contract=(-1,)),
        2,
        q.int4(granularity=q.Block2D(out=2, contract=8)),
    ),
    "two_levels": (jc.Axes(contract=(-1,)), 1, q.nvfp4()),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stacked_leaf_is_sliced_component_by_component(name: str) -> None:
    axes, ndim, fmt = STACKS[name]
    leaf = quantize(draw(3, 4, 16), fmt, axes=axes)
    stacked = leaf.stacked(ndim)
    dense = np.asarray(materialize(leaf))
    assert all(a.shape[:ndim] == leaf.shape[:ndim] for a in jax.tree.leaves(stacked))
    np.testing.assert_array_equal(materialize(stacked), dense)
    index = (2, 1)[:ndim]
    part = jax.tree.map(operator.itemgetter(index), stacked)
    np.testing.assert_array_equal(materialize(part), dense[index])


def test_a_leaf_that_is_stacked_already_stays_the_same() -> None:
    leaf = abstract(3, 8, 6, fmt=q.int4(), axes=-2)
    assert leaf.stacked(1) is leaf


@pytest.mark.parametrize(
    ("axes", "ndim"), [(CONTRACTS_TWO, 1), (-2, 2), ((-3, -1), 1), (-1, 3)]
)
def test_contracting_axes_cannot_be_stacked(axes: Any, ndim: int) -> None:
    leaf = abstract(3, 8, 6, fmt=q.int4(), axes=axes)
    assert leaf.stacked(ndim) is NotImplemented


# -- sharding

MESH = {"x": 2, "y": 4}


@pytest.mark.parametrize(
    ("axes", "fmt", "spec", "words", "scale"),
    [
        (-2, q.int4(), (None, None, "y"), P(None, "y", None), P(None, "y", None)),
        (-2, q.int4(), ("x", "y", None), P("x", None, "y"), P("x", None, None)),
        (
            -2,
            q.int4(group_size=4),
            ("x", "y", None),
            P("x", None, "y"),
            P("x", None, "y"),
        ),
        (
            -2,
            q.int4(),
            (None, ("x", "y"), None),
            P(None, None, ("x", "y")),
            P(None, None, None),
        ),
        ((-3, -2), q.int4(), ("x", None, "y"), P("y", "x"), P("y", None)),
        (
            -2,
            q.int4(granularity=q.PerTensor()),
            (None, None, "y"),
            P(None, "y", None),
            P(None, None, None),
        ),
    ],
)
def test_components_are_cut_like_the_weight(
    axes: Any, fmt: Any, spec: Any, words: Any, scale: Any
) -> None:
    leaf = abstract(2, 16, 8, fmt=fmt, axes=axes)
    specs = leaf.component_specs(spec, MESH)
    assert (specs.words, specs.scale) == (words, scale)
    loose = jax.eval_shape(unpack, leaf).component_specs(spec, MESH)
    assert (loose.words, loose.scale) == (P(*spec), scale)


def test_zero_points_and_tensor_scales_follow_their_scales() -> None:
    spec = ("x", None, "y")
    leaf = abstract(2, 16, 8, fmt=q.int4(symmetric=False), axes=-2)
    assert leaf.component_specs(spec, MESH).zero_point == P("x", "y", None)
    leaf = abstract(2, 16, 8, fmt=q.nvfp4(), axes=-2)
    assert leaf.component_specs(spec, MESH).tensor_scale == P("x", None, None)


@pytest.mark.parametrize(
    ("shape", "axes", "fmt", "spec", "message"),
    [
        (
            (16, 8),
            None,
            q.int4(group_size=8),
            ("y", None),
            r"int4 g8: axis -2 of size 16 cannot be cut in 4 parts .*in \[2\]",
        ),
        (
            (16, 8),
            None,
            q.int3(),
            ("y", None),
            r"int3: axis -2 of size 16 cannot be cut in 4 parts .*in \[2\]",
        ),
        (
            (12, 8),
            None,
            q.int3(),
            ("x", None),
            r"int3: axis -2 of size 12 cannot be cut in 2 parts .*in \[\]",
        ),
        (
            (2, 8, 8),
            (-3, -2),
            q.int4(),
            (None, "x", None),
            r"of the contracting axes \(-3, -2\) only the first may be sharded",
        ),
        (
            (16, 8),
            None,
            q.int4(granularity=q.Block2D(out=4, contract=16)),
            (None, "y"),
            "2 blocks of scales along storage axis 0 cannot be cut in 4 parts",
        ),
    ],
)
def test_a_cut_inside_words_or_groups_is_refused(
    shape: Any, axes: Any, fmt: Any, spec: Any, message: str
) -> None:
    leaf = abstract(*shape, fmt=fmt, axes=axes)
    with pytest.raises(ValueError, match=message):
        leaf.component_specs(spec, MESH)
