"""N of every M: the mask against loops, and what is stored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.layout import Layout, resolve_axes
from jaxcompress.leaf import Cast, Transpose
from jaxcompress.prune import BitmaskArray, MaskedArray, NMArray, nm
from jaxcompress.prune._nm import keep_of_groups
from jaxcompress.prune._nm_array import store_nm
from kernels_pallas import nm_sparse_matmul as kernel
from tests.jitted import run

MATRIX, STACK, CONV, VECTOR = (8, 5), (3, 8, 5), (2, 3, 5, 3), (13,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def roles(shape: tuple[int, ...]) -> jc.Axes:
    return resolve_axes(shape, AXES.get(shape), who="test", path="w")


def storage(a: np.ndarray) -> np.ndarray:
    """``[*stack, *out, K]`` of a weight."""
    axes = roles(a.shape)
    contract = [a.ndim + axis for axis in axes.contract]
    lead = [axis for axis in range(a.ndim) if axis not in contract]
    a = a.transpose(*lead, *contract)
    return a.reshape(*a.shape[: len(lead)], -1)


def expected_mask(score: np.ndarray, n: int, m: int) -> np.ndarray:
    """In storage order, group by group; of equal scores the last are kept."""
    kept = np.zeros(score.shape, bool)
    for row in np.ndindex(score.shape[:-1]):
        for start in range(0, score.shape[-1], m):
            group = score[row][start : start + m]
            order = sorted(range(len(group)), key=lambda i: (group[i], i))
            for i in order[max(len(group) - n, 0) :]:
                kept[row][start + i] = True
    return kept


@jax.jit
def _mask(score: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(keep_of_groups(score, n, m) for n, m in PATTERNS)


PATTERNS = [(2, 4), (1, 2), (3, 8), (5, 16)]


def test_the_mask_keeps_the_n_highest_of_each_group() -> None:
    score = np.abs(normal(6, 21))  # No group size divides 21.
    score[:, ::3] = 0.5  # Ties.
    for (n, m), found in zip(PATTERNS, _mask(jnp.asarray(score)), strict=True):
        np.testing.assert_array_equal(found, expected_mask(score, n, m))


def test_what_is_pruned_already_goes_first() -> None:
    score = np.array([[-np.inf, 1.0, -np.inf, 2.0, 3.0, -np.inf]], np.float32)
    kept = run(lambda score: keep_of_groups(score, 2, 4), score)
    assert kept.tolist() == [[False, True, False, True, True, True]]


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_groups_lie_along_the_contracting_axes(shape: tuple[int, ...]) -> None:
    score, axes = np.abs(normal(*shape)), roles(shape)
    mask = run(lambda s: nm(2, 4).keep_one(s, axes), score)
    expected = expected_mask(storage(score), 2, 4)
    np.testing.assert_array_equal(storage(np.asarray(mask)), expected)


def compressing(shape: tuple[int, ...], fmt: jc.quant.NumberFormat | None) -> Any:
    """The view's values and the stored form, as a function of the weight."""
    scheme = jc.prune.magnitude(sparsity=nm(2, 4), axes=AXES.get(shape))
    if fmt is not None:
        scheme = jc.chain(scheme, fmt.replace(axes=AXES.get(shape)))

    def compress(w: jax.Array) -> tuple[jax.Array, Any]:
        params, state = scheme.init({"w": w})
        view: Any = scheme.view(params, state)["w"]
        return view.materialize(), scheme.compress(params, state)["w"]

    return compress


@functools.cache
def compressed(
    shape: tuple[int, ...], fmt: jc.quant.NumberFormat | None = None
) -> tuple[np.ndarray, Any]:
    """Made under jit."""
    view, stored = run(compressing(shape, fmt), normal(*shape))
    return np.asarray(view), stored


def shapes(shape: tuple[int, ...], fmt: jc.quant.NumberFormat | None = None) -> Any:
    """The stored form without its numbers."""
    return jax.eval_shape(compressing(shape, fmt), jnp.asarray(normal(*shape)))[1]


dense = jax.jit(jc.materialize)


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_floats_come_back_in_their_places(shape: tuple[int, ...]) -> None:
    view, leaf = compressed(shape)
    assert isinstance(leaf, NMArray)
    assert (leaf.shape, leaf.dtype, leaf.method) == (shape, jnp.float32, "2:4 dense")
    found, w = np.asarray(dense(leaf)), storage(normal(*shape))
    expected = np.where(expected_mask(np.abs(w), 2, 4), w, 0)
    np.testing.assert_array_equal(storage(found), expected)
    np.testing.assert_array_equal(view, found)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_in_their_places(symmetric: bool) -> None:
    fmt = jc.quant.int4(group_size=4, symmetric=symmetric)
    view, leaf = compressed(STACK, fmt)
    assert isinstance(leaf, NMArray)
    assert leaf.elements.dtype == jnp.uint8
    assert leaf.elements.shape == (3, 5, 2)  # Four codes of four bits.
    found, w = np.asarray(dense(leaf)), storage(normal(*STACK))
    np.testing.assert_array_equal(view, found)
    mask = expected_mask(np.abs(w), 2, 4)
    assert (storage(found)[~mask] == 0).all()
    assert np.abs(storage(found) - w)[mask].max() < 0.3
    with pytest.raises(jc.OrderError, match="fixes the value of every weight"):
        jax.eval_shape(lambda q: q.map_values(lambda a: a), leaf)


def test_bytes_are_the_kept_elements_and_two_bits_each() -> None:
    leaf = shapes(MATRIX)
    assert leaf.stored_bytes == 5 * 4 * 4 + 5 * 1
    leaf = shapes(MATRIX, jc.quant.int4(group_size=4))
    assert leaf.stored_bytes == 5 * 2 + 5 * 1 + 5 * 2 * 4


def test_it_is_what_the_kernel_reads() -> None:
    leaf = compressed(MATRIX)[1]
    packed = run(lambda w: kernel.pack(w.T, n=2, m=4), normal(*MATRIX))
    np.testing.assert_array_equal(leaf.elements, packed.values)
    np.testing.assert_array_equal(leaf.places, packed.indices)


def test_groups_that_keep_fewer_are_filled_up_with_zeros() -> None:
    w = normal(*MATRIX)
    mask = np.zeros(MATRIX, bool)
    mask[3], mask[4:6] = True, True
    layout = Layout.of(MATRIX, roles(MATRIX))
    leaf = run(
        lambda w, mask: store_nm(MaskedArray(inner=w, mask=mask), layout, n=2, m=4),
        w,
        mask,
    )
    np.testing.assert_array_equal(dense(leaf), np.where(mask, w, 0))
    assert leaf.elements.shape == (5, 4)


def test_a_mask_that_keeps_more_is_refused() -> None:
    ones = np.ones(MATRIX, np.float32)
    ones = MaskedArray(inner=jnp.asarray(ones), mask=jnp.asarray(ones > 0))
    with pytest.raises(ValueError, match="at most 2 of every 4 inputs; got 4"):
        store_nm(ones, Layout.of(MATRIX, roles(MATRIX)), n=2, m=4)


def test_another_mask_makes_it_bits() -> None:
    w = {"w": normal(*MATRIX)}
    half = jc.prune.magnitude(sparsity=0.7)
    for scheme in (
        jc.chain(jc.prune.magnitude(sparsity=nm(2, 4)), half),
        jc.chain(half, jc.prune.magnitude(sparsity=nm(2, 4))),
    ):

        def start(w: Any, scheme: jc.Transform = scheme) -> Any:
            params, state = scheme.init(w)
            return params, state, jc.materialize(scheme.view(params, state))["w"]

        params, state, view = run(start, w)
        leaf = scheme.compress(params, state)["w"]
        assert isinstance(leaf, BitmaskArray)
        found = np.asarray(dense(leaf))
        np.testing.assert_array_equal(found, view)
        assert (found != 0).sum() <= 12
        assert (np.count_nonzero(found.reshape(2, 4, 5), axis=1) <= 2).all()


def test_casts_transposes_and_scans() -> None:
    values, leaf = compressed(STACK)
    cast = leaf.relayout(Cast(dtype=np.dtype(jnp.bfloat16)))
    assert isinstance(cast, NMArray)
    assert cast.elements is leaf.elements
    assert cast.dtype == jnp.bfloat16
    assert cast.relayout(Cast(dtype=np.dtype(np.float32))) is NotImplemented
    assert leaf.stacked(1) is leaf

    def both(leaf: Any) -> tuple[jax.Array, jax.Array]:
        turned = leaf.relayout(Transpose(permutation=(2, 0, 1)))
        _, layers = jax.lax.scan(lambda _, w: (None, w.materialize()), None, leaf)
        return turned.materialize(), layers

    turned, layers = run(both, leaf)
    np.testing.assert_array_equal(turned, values.transpose(2, 0, 1))
    np.testing.assert_array_equal(layers, values)


def test_outputs_and_stacks_are_sharded() -> None:
    leaf = shapes(STACK, jc.quant.int4(group_size=4))
    specs = leaf.component_specs(("d", None, "e"), {"d": 3, "e": 5})
    assert (specs.elements, specs.places) == (P("d", "e"), P("d", "e"))
    assert specs.frame.scale == P("d", "e")
    with pytest.raises(ValueError, match="contracting axes cannot be sharded"):
        leaf.component_specs((None, "d", None), {"d": 2})


def test_files_and_reports(tmp_path: Path) -> None:
    _, leaf = compressed(CONV, jc.quant.int3())
    jc.io.save(tmp_path / "m.jc", {"w": leaf})
    loaded = jc.io.load(tmp_path / "m.jc")["w"]
    assert isinstance(loaded, NMArray)
    np.testing.assert_array_equal(dense(loaded), dense(leaf))
    (row,) = jc.report.size({"w": leaf}).rows
    assert (row.memory_bytes, row.method) == (leaf.stored_bytes, "2:4 int3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2, "m": 5}, r"m must be one of \(2, 4, 8, 16\); got 5"),
        ({"n": 4, "m": 4}, "n must be from 1 to m - 1 = 3; got 4"),
        ({"n": 0, "m": 4}, "got 0"),
    ],
)
def test_patterns_that_are_none(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nm(**options)


def test_a_pattern_has_its_own_scope() -> None:
    with pytest.raises(ValueError, match=r"scope='global' and nm\(2, 4\)"):
        jc.prune.magnitude(sparsity=nm(2, 4), scope="global")
