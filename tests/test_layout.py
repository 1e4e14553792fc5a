"""Storage order against `numpy.moveaxis`; layout operations against the dense array."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.layout import Axes, Layout, resolve_axes
from jaxcompress.leaf import (
    Cast,
    LayoutOp,
    Reshape,
    Transpose,
    relayout_array,
    relayout_mask,
)


def resolve(shape: tuple[int, ...], stated: Any) -> Axes:
    return resolve_axes(shape, stated, who="who", path="path")


@pytest.mark.parametrize(
    ("shape", "stated", "expected"),
    [
        ((6,), None, Axes(contract=(-1,))),
        ((6, 4), None, Axes(contract=(-2,))),
        ((6, 4), -1, Axes(contract=(-1,))),
        ((3, 6, 4), -2, Axes(contract=(-2,), stack=1)),
        ((2, 3, 6, 4), (-2,), Axes(contract=(-2,), stack=2)),
        ((2, 3, 6, 4), (-2, -3), Axes(contract=(-2, -3), stack=1)),
        ((2, 3, 6, 4), (-4, -3, -2), Axes(contract=(-4, -3, -2))),
        ((6, 4), Axes(contract=(-1,), stack=1), Axes(contract=(-1,), stack=1)),
    ],
    ids=str,
)
def test_axes_are_completed(
    shape: tuple[int, ...], stated: Any, expected: Axes
) -> None:
    assert resolve(shape, stated) == expected


@pytest.mark.parametrize(
    ("shape", "stated", "message"),
    [
        ((3, 6, 4), None, r"who: the contracting axes of 'path'.*\(3, 6, 4\).*fn="),
        ((6, 4), 0, r"negative.* got \(0,\) for shape \(6, 4\)"),
        ((6, 4), -3, r"within the rank of 'path'; got \(-3,\)"),
        ((6, 4), (), r"got \(\)"),
        ((3, 6, 4), (-2, -2), r"distinct.* got \(-2, -2\)"),
        ((3, 6, 4), Axes(contract=(-3,), stack=1), r"within the rank.* got \(-3,\)"),
        ((6, 4), Axes(contract=()), r"got \(\)"),
    ],
    ids=str,
)
def test_axes_that_cannot_be_are_named(
    shape: tuple[int, ...], stated: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(shape, stated)


@st.composite
def weights(draw: Any) -> tuple[np.ndarray, Axes]:
    """A weight of up to four axes of its own and two of stacks, each entry once."""
    core = draw(st.integers(1, 4))
    stack = draw(st.integers(0, 2))
    order = draw(st.permutations(range(-core, 0)))
    contract = tuple(order[: draw(st.integers(1, core))])
    shape = draw(st.tuples(*[st.integers(1, 3)] * (stack + core)))
    return numbered(shape), Axes(contract=contract, stack=stack)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@hypothesis.given(weight=weights())
def test_storage_is_outputs_then_contracting_axes_flattened(
    weight: tuple[np.ndarray, Axes],
) -> None:
    w, axes = weight
    layout = Layout.of(w.shape, axes)
    n = len(axes.contract)
    moved = np.moveaxis(w, axes.contract, range(-n, 0))
    expected = moved.reshape(*moved.shape[: w.ndim - n], -1)
    storage = layout.to_storage(jnp.asarray(w))
    np.testing.assert_array_equal(storage, expected)
    np.testing.assert_array_equal(layout.from_storage(storage), w)
    assert layout.logical_shape(storage.shape) == w.shape
    assert layout.stack_ndim(storage.ndim) == axes.stack
    assert layout.contract == axes.contract


def test_a_layout_serves_a_weight_cut_along_its_first_contracting_axis() -> None:
    w = numbered((6, 3, 4))
    layout = Layout.of(w.shape, Axes(contract=(-3, -2)))
    for half in (w[:3], w[3:]):
        storage = layout.to_storage(jnp.asarray(half))
        assert layout.logical_shape(storage.shape) == (3, 3, 4)
        np.testing.assert_array_equal(layout.from_storage(storage), half)


def test_a_layout_of_a_stack_serves_one_of_its_entries() -> None:
    w = numbered((2, 6, 4))
    layout = Layout.of(w.shape, Axes(contract=(-2,), stack=1))
    np.testing.assert_array_equal(layout.from_storage(layout.to_storage(w[1])), w[1])


def seen_through(op: LayoutOp, w: np.ndarray, axes: Axes) -> np.ndarray | None:
    """What the unmoved storage of `w` reads as in the layout after `op`."""
    layout = Layout.of(w.shape, axes)
    after = layout.relayout(op, w.shape)
    if after is NotImplemented:
        return None
    return np.asarray(after.from_storage(layout.to_storage(jnp.asarray(w))))


@hypothesis.given(weight=weights(), data=st.data())
def test_every_transpose_leaves_the_storage_alone(
    weight: tuple[np.ndarray, Axes], data: Any
) -> None:
    w, axes = weight
    op = Transpose(permutation=tuple(data.draw(st.permutations(range(w.ndim)))))
    np.testing.assert_array_equal(
        seen_through(op, w, axes), np.transpose(w, op.permutation)
    )


@st.composite
def groupings(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that split one run of factors at different places."""
    factors = draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    cut = lambda: [0, *sorted(draw(st.sets(st.integers(1, 3)))), 4]
    group = lambda at: tuple(
        int(np.prod(factors[i:j])) for i, j in itertools.pairwise(at)
    )
    return group(cut()), group(cut())


@hypothesis.given(shapes=groupings(), data=st.data())
@hypothesis.settings(max_examples=40)
def test_a_reshape_is_refused_or_right(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: Any
) -> None:
    old, new = shapes
    order = data.draw(st.permutations(range(-len(old), 0)))
    contract = tuple(order[: data.draw(st.integers(1, len(old)))])
    w = numbered(old)
    found = seen_through(Reshape(shape=new), w, Axes(contract=contract))
    hypothesis.event("refused" if found is None else "seen through")
    if found is not None:
        np.testing.assert_array_equal(found, w.reshape(new))


CONV = Axes(contract=(-4, -3, -2))


@pytest.mark.parametrize(
    ("shape", "axes", "new"),
    [
        ((12, 5), Axes(contract=(-2,)), (3, 4, 5)),
        ((5, 12), Axes(contract=(-1,)), (5, 2, 3, 2)),
        ((3, 4, 5), Axes(contract=(-3, -2)), (12, 5)),
        ((3, 4, 5), Axes(contract=(-3, -2)), (2, 6, 5)),
        ((2, 3, 4, 5), CONV, (24, 5)),
        ((2, 3, 4, 5), CONV, (6, 4, 5)),
        ((2, 3, 4, 5), CONV, (2, 12, 5)),
        ((2, 12, 5), Axes(contract=(-2,), stack=1), (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_contracting_axes_split_and_merge(
    shape: tuple[int, ...], axes: Axes, new: tuple[int, ...]
) -> None:
    w = numbered(shape)
    np.testing.assert_array_equal(
        seen_through(Reshape(shape=new), w, axes), w.reshape(new)
    )


@pytest.mark.parametrize(
    ("shape", "axes", "op"),
    [
        ((6, 12), Axes(contract=(-2,)), Reshape(shape=(6, 3, 4))),
        ((3, 4), Axes(contract=(-2,)), Reshape(shape=(12,))),
        ((3, 4, 5), Axes(contract=(-2, -3)), Reshape(shape=(12, 5))),
        ((3, 4, 5), Axes(contract=(-2,), stack=1), Reshape(shape=(12, 5))),
        ((6, 4), Axes(contract=(-2,)), Reshape(shape=(4, 6))),
        ((6, 4), Axes(contract=(-2,)), Cast(dtype=np.dtype(np.float32))),
    ],
    ids=["output split", "all merged", "out of order", "stack", "crossed", "cast"],
)
def test_what_would_move_the_storage_is_refused(
    shape: tuple[int, ...], axes: Axes, op: LayoutOp
) -> None:
    assert seen_through(op, numbered(shape), axes) is None


@pytest.mark.parametrize(
    "op",
    [
        Transpose(permutation=(1, 0)),
        Reshape(shape=(2, 3, 4)),
        Cast(dtype=np.dtype(jnp.bfloat16)),
    ],
    ids=["transpose", "reshape", "cast"],
)
def test_layout_operations_on_arrays_are_those_of_numpy(op: LayoutOp) -> None:
    w = jax.random.normal(jax.random.key(0), (6, 4))
    expected = {
        "Transpose": np.asarray(w).T,
        "Reshape": np.asarray(w).reshape(2, 3, 4),
        "Cast": np.asarray(w).astype(jnp.bfloat16),
    }[type(op).__name__]
    found = relayout_array(w, op)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert relayout_mask(w > 0, op).dtype == bool
