"""`BitmaskArray`: what is stored, how many bytes, and what comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.layout import Layout, resolve_axes
from jaxcompress.leaf import Cast, Transpose
from jaxcompress.prune import BitmaskArray, MaskedArray
from jaxcompress.prune._bitmask import store
from jaxcompress.quant import Integer
from jaxcompress.values import Oriented
from tests.jitted import run

MATRIX, STACK, CONV, VECTOR = (7, 5), (3, 7, 5), (2, 3, 5, 3), (13,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}


def example(*shape: int, density: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Weights without a zero, and a mask whose count differs from layer to layer."""
    rng = np.random.default_rng(len(shape))
    w = rng.uniform(0.5, 2.0, shape) * rng.choice([-1.0, 1.0], shape)
    return w.astype(np.float32), rng.random(shape) < density


def layout(shape: tuple[int, ...]) -> Layout:
    axes = resolve_axes(shape, AXES.get(shape), who="test", path="w")
    return Layout.of(shape, axes)


def capacity(mask: np.ndarray) -> int:
    """The largest count of a stack entry."""
    stack = mask.ndim - len(layout(mask.shape).order)
    return int(mask.sum(tuple(range(stack, mask.ndim))).max())


def stored(w: Any, mask: np.ndarray) -> BitmaskArray:
    """Stored under jit, with room for the largest count of a stack entry."""
    masked = MaskedArray(inner=w, mask=jnp.asarray(mask))
    return jit_store(masked, layout(mask.shape), capacity=capacity(mask))


def coded(
    w: np.ndarray, mask: np.ndarray, fmt: jc.quant.NumberFormat, call: Any = run
) -> BitmaskArray:
    """Its codes, stored likewise; of `jax.eval_shape`, without the numbers."""
    own, most = layout(w.shape), capacity(mask)

    def both(w: jax.Array, mask: jax.Array) -> BitmaskArray:
        codes = jc.quant.quantize(w, fmt=fmt, axes=AXES.get(w.shape))
        return store(MaskedArray(inner=codes, mask=mask), own, capacity=most)

    return call(both, w, mask)


jit_store = jax.jit(store, static_argnums=1, static_argnames="capacity")
dense = jax.jit(jc.materialize)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (MATRIX, jnp.float32),
        (STACK, jnp.float32),
        (CONV, jnp.float32),
        (VECTOR, jnp.float32),
        (STACK, jnp.bfloat16),
    ],
)
def test_floats_come_back_in_their_places(shape: tuple[int, ...], dtype: Any) -> None:
    w, mask = example(*shape)
    leaf = stored(jnp.asarray(w.astype(dtype)), mask)
    assert (leaf.shape, leaf.dtype) == (shape, dtype)
    assert leaf.elements.dtype == dtype
    expected = np.where(mask, w.astype(dtype), 0)
    values, kept = run(lambda q: (q.materialize(), q.expand().mask), leaf)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(kept, mask)


FORMATS = [jc.quant.int3(), jc.quant.int4(symmetric=False), jc.quant.int8()]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_codes_come_back_in_their_places(fmt: jc.quant.NumberFormat) -> None:
    w, mask = example(*STACK)
    own, most = layout(STACK), capacity(mask)

    def both(w: jax.Array, mask: jax.Array) -> Any:
        q: Any = jc.quant.quantize(w, fmt=fmt, axes=-2)
        leaves = [MaskedArray(inner=codes, mask=mask) for codes in (q, q.unpack())]
        return q.materialize(), [store(leaf, own, capacity=most) for leaf in leaves]

    values, leaves = run(both, w, mask)
    expected = np.where(mask, values, 0)
    assert np.abs(expected).max() > 0.5
    for found in dense(leaves):
        np.testing.assert_array_equal(found, expected)


def test_bits_and_elements_are_those_of_each_output_in_turn() -> None:
    w, mask = example(*MATRIX)
    leaf = stored(jnp.asarray(w), mask)
    bits = np.packbits(mask.T, axis=-1, bitorder="little")
    np.testing.assert_array_equal(leaf.mask, bits)
    np.testing.assert_array_equal(leaf.elements, w.T[mask.T])


def test_each_layer_is_padded_with_zeros_to_the_largest_count() -> None:
    w, mask = example(*STACK)
    counts = mask.reshape(3, -1).sum(1)
    assert len(set(counts)) > 1
    leaf = store(MaskedArray(inner=jnp.asarray(w), mask=mask), layout(STACK))
    elements = np.asarray(leaf.elements)
    assert elements.shape == (3, counts.max())
    for layer, n in enumerate(counts):
        own = w[layer].T[mask[layer].T]
        np.testing.assert_array_equal(elements[layer, :n], own)
        assert not elements[layer, n:].any()


def test_bytes_are_one_bit_a_weight_and_the_kept_elements() -> None:
    w, mask = example(*MATRIX)
    kept = int(mask.sum())
    assert stored(jnp.asarray(w), mask).stored_bytes == 5 + 4 * kept
    codes = coded(w, mask, jc.quant.int3(), jax.eval_shape)
    scales = 4 * 5
    assert codes.stored_bytes == 5 + -(-3 * kept // 8) + scales


@pytest.mark.parametrize("shape", [MATRIX, STACK], ids=str)
@pytest.mark.parametrize("fmt", [None, jc.quant.int4()], ids=["dense", "int4"])
def test_a_weight_of_which_nothing_is_kept_is_zero(
    shape: tuple[int, ...], fmt: jc.quant.NumberFormat | None
) -> None:
    w, _ = example(*shape)
    mask = np.zeros(shape, bool)
    leaf = stored(jnp.asarray(w), mask) if fmt is None else coded(w, mask, fmt)
    assert leaf.elements.size == 0
    np.testing.assert_array_equal(dense(leaf), np.zeros(shape, np.float32))


def test_a_constant_sparsity_compresses_under_jit() -> None:
    w, _ = example(*STACK)
    scheme = jc.prune.magnitude(sparsity=0.6, axes=-2)
    params, state = run(scheme.init, {"w": w})
    leaf = run(scheme.compress, params, state)["w"]
    assert leaf.elements.shape == (3, 35 - 21)
    np.testing.assert_array_equal(dense(leaf), np.where(state.masks["w"][0], w, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": jc.schedules.linear(0.0, 0.5, begin=0, end=2)},
        {"sparsity": 0.5, "scope": "global"},
    ],
    ids=["schedule", "global"],
)
def test_a_count_that_is_not_static_needs_compress_outside_jit(
    options: dict[str, Any],
) -> None:
    w, _ = example(*STACK)
    scheme = jc.prune.magnitude(**options, axes=-2)
    params, state = run(scheme.init, {"w": w})
    with pytest.raises(jax.errors.ConcretizationTypeError, match="outside jit"):
        jax.jit(scheme.compress)(params, state)
    leaf = scheme.compress(params, state)["w"]
    np.testing.assert_array_equal(dense(leaf), np.where(state.masks["w"][0], w, 0))


def test_a_capacity_may_leave_room_but_not_lack_it() -> None:
    w, mask = example(*STACK)
    most = int(mask.sum((1, 2)).max())
    leaf = MaskedArray(inner=jnp.asarray(w), mask=jnp.asarray(mask))
    roomy = store(leaf, layout(STACK), capacity=most + 3)
    assert roomy.elements.shape == (3, most + 3)
    np.testing.assert_array_equal(dense(roomy), np.where(mask, w, 0))
    with pytest.raises(ValueError, match=rf"the {most} weights .* got {most - 1}"):
        store(leaf, layout(STACK), capacity=most - 1)


def test_a_narrower_cast_keeps_the_storage() -> None:
    w, mask = example(*MATRIX)
    leaf = stored(jnp.asarray(w), mask)
    cast = leaf.relayout(Cast(dtype=np.dtype(jnp.bfloat16)))
    assert isinstance(cast, BitmaskArray)
    assert cast.elements is leaf.elements
    np.testing.assert_array_equal(
        dense(cast), np.where(mask, w, 0).astype(jnp.bfloat16)
    )
    assert cast.relayout(Cast(dtype=np.dtype(np.float32))) is NotImplemented


@pytest.mark.parametrize("fmt", [None, jc.quant.int4()], ids=["dense", "int4"])
def test_a_transpose_expands_to_the_masked_form(
    fmt: jc.quant.NumberFormat | None,
) -> None:
    w, mask = example(*CONV)
    leaf = stored(jnp.asarray(w), mask) if fmt is None else coded(w, mask, fmt)
    op = Transpose(permutation=(3, 0, 2, 1))
    turned = run(lambda q: q.relayout(op), leaf)
    assert isinstance(turned, MaskedArray)
    expected = np.transpose(dense(leaf), (3, 0, 2, 1))
    np.testing.assert_array_equal(dense(turned), expected)


def test_a_stack_can_be_scanned_and_a_matrix_expands_to_one() -> None:
    w, mask = example(*STACK)
    leaf = stored(jnp.asarray(w), mask)
    assert leaf.stacked(1) is leaf
    materialized = lambda _, layer: (None, layer.materialize())
    layers = run(lambda q: jax.lax.scan(materialized, None, q)[1], leaf)
    np.testing.assert_array_equal(layers, np.where(mask, w, 0))
    matrix = stored(jnp.asarray(w[0]), mask[0])
    rows = jax.eval_shape(lambda q: q.stacked(1), matrix)
    assert isinstance(rows, MaskedArray)


def test_only_stack_axes_are_sharded() -> None:
    w, mask = example(*STACK)
    leaf = stored(jnp.asarray(w), mask)
    specs = leaf.component_specs(("d", None, None), {"d": 3})
    assert (specs.mask, specs.elements) == (P("d"), P("d"))
    for spec in [(None, "d", None), (None, None, "d")]:
        with pytest.raises(ValueError, match="only the 1 stack axes can be sharded"):
            leaf.component_specs(spec, {"d": 5})


def test_a_stack_of_codes_is_sharded_with_its_scales() -> None:
    w, mask = example(*STACK)
    leaf = coded(w, mask, jc.quant.int4(), jax.eval_shape)
    specs = leaf.component_specs(("d", None, None), {"d": 3})
    assert (specs.mask, specs.elements) == (P("d"), P("d"))
    assert specs.frame.scale[0] == "d"


def test_what_follows_keeps_the_mask() -> None:
    w, mask = example(*STACK)
    leaf = stored(jnp.asarray(w), mask)
    doubled = run(lambda q: q.map_values(lambda a: 2 * a + 1), leaf)
    np.testing.assert_array_equal(dense(doubled), np.where(mask, 2 * w + 1, 0))
    small = np.abs(w) < 1.0
    again = leaf.map_values(lambda a: stored(a, small))
    np.testing.assert_array_equal(dense(again), np.where(mask & small, w, 0))
    assert again.elements.shape == (3, capacity(mask & small))


def test_a_later_leaf_that_moves_weights_is_refused() -> None:
    w, mask = example(*MATRIX)
    moved = lambda a: Oriented(value=a, axes=jc.Axes(contract=(-2,)))
    with pytest.raises(jc.OrderError, match="before the mask in the chain"):
        jax.eval_shape(lambda q: q.map_values(moved), stored(jnp.asarray(w), mask))


def test_nothing_follows_codes() -> None:
    w, mask = example(*MATRIX)
    leaf = coded(w, mask, jc.quant.int4(), jax.eval_shape)
    with pytest.raises(jc.OrderError, match="int4 fixes the value of every weight"):
        jax.eval_shape(lambda q: q.map_values(lambda a: a), leaf)


def test_the_matmul_of_the_values_is_kept() -> None:
    w, mask = example(*MATRIX)
    dynamic = jc.quant.int8(activations=jc.quant.dynamic(Integer(bits=8)))
    leaf = coded(w, mask, dynamic)
    assert leaf.traits.own_matmul
    assert not coded(w, mask, jc.quant.int8(), jax.eval_shape).traits.own_matmul
    x = example(4, 7)[0]
    product = jc.lift(lambda w, x: x @ w)
    both = lambda q, x: (product(q, x), product(q.expand(), x))
    found, expected = run(both, leaf, x)
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - x @ np.asarray(dense(leaf))).max() > 1e-4
