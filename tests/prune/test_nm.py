"""N of every M: the mask against loops, and what is stored."""

from __future__ import annotations

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

MATRIX, STACK, CONV, VECTOR = (8, 5), (3, 8, 5), (2, 3, 5, 3), (13,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def roles(shape: tuple[int, ...]) -> jc.Axes:
    return resolve_axes(shape, AXES.get(shape), who="test", path="w")


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
    score = jnp.array([[-jnp.inf, 1.0, -jnp.inf, 2.0, 3.0, -jnp.inf]])
    kept = jax.jit(keep_of_groups, static_argnums=(1, 2))(score, 2, 4)
    assert kept.tolist() == [[False, True, False, True, True, True]]


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_groups_lie_along_the_contracting_axes(shape: tuple[int, ...]) -> None:
    w, axes = normal(*shape), roles(shape)
    layout = Layout.of(shape, axes)
    mask = jax.jit(lambda s: nm(2, 4).keep_one(s, axes))(jnp.abs(w))
    storage = np.asarray(layout.to_storage(jnp.asarray(np.abs(w))))
    expected = expected_mask(storage, 2, 4)
    np.testing.assert_array_equal(layout.to_storage(mask), expected)


def compressed(
    shape: tuple[int, ...], fmt: jc.quant.NumberFormat | None = None
) -> tuple[Any, Any, np.ndarray]:
    """View and stored form, made under jit, and the mask."""
    scheme = jc.prune.magnitude(sparsity=nm(2, 4), axes=AXES.get(shape))
    if fmt is not None:
        scheme = jc.chain(scheme, fmt.replace(axes=AXES.get(shape)))

    @jax.jit
    def run(w: jax.Array) -> tuple[Any, Any]:
        params, state = scheme.init({"w": w})
        return scheme.view(params, state), scheme.compress(params, state)

    view, stored = run(jnp.asarray(normal(*shape)))
    layout = Layout.of(shape, roles(shape))
    scores = np.asarray(layout.to_storage(jnp.abs(normal(*shape))))
    mask = layout.from_storage(jnp.asarray(expected_mask(scores, 2, 4)))
    return view["w"], stored["w"], np.asarray(mask)


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_floats_come_back_in_their_places(shape: tuple[int, ...]) -> None:
    _, leaf, mask = compressed(shape)
    assert isinstance(leaf, NMArray)
    assert (leaf.shape, leaf.dtype, leaf.method) == (shape, jnp.float32, "2:4 dense")
    np.testing.assert_array_equal(leaf.materialize(), np.where(mask, normal(*shape), 0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_in_their_places(symmetric: bool) -> None:
    fmt = jc.quant.int4(group_size=4, symmetric=symmetric)
    view, leaf, mask = compressed(STACK, fmt)
    assert isinstance(leaf, NMArray)
    assert leaf.elements.dtype == jnp.uint8
    assert leaf.elements.shape == (3, 5, 2)  # Four codes of four bits.
    dense = np.asarray(leaf.materialize())
    np.testing.assert_array_equal(view.materialize(), dense)
    assert (dense[~mask] == 0).all()
    assert np.abs(dense - normal(*STACK))[mask].max() < 0.3
    with pytest.raises(jc.OrderError, match="fixes the value of every weight"):
        leaf.map_values(lambda a: a)


def test_bytes_are_the_kept_elements_and_two_bits_each() -> None:
    _, leaf, _ = compressed(MATRIX)
    assert leaf.stored_bytes == 5 * 4 * 4 + 5 * 1
    _, leaf, _ = compressed(MATRIX, jc.quant.int4(group_size=4))
    assert leaf.stored_bytes == 5 * 2 + 5 * 1 + 5 * 2 * 4


def test_it_is_what_the_kernel_reads() -> None:
    w = normal(*MATRIX)
    _, leaf, _ = compressed(MATRIX)
    packed = kernel.pack(jnp.asarray(w.T), n=2, m=4)
    np.testing.assert_array_equal(leaf.elements, packed.values)
    np.testing.assert_array_equal(leaf.places, packed.indices)


def test_groups_that_keep_fewer_are_filled_up_with_zeros() -> None:
    w = normal(*MATRIX)
    mask = np.zeros(MATRIX, bool)
    mask[3], mask[4:6] = True, True
    layout = Layout.of(MATRIX, roles(MATRIX))
    leaf = store_nm(
        MaskedArray(inner=jnp.asarray(w), mask=jnp.asarray(mask)), layout, n=2, m=4
    )
    np.testing.assert_array_equal(leaf.materialize(), np.where(mask, w, 0))
    assert leaf.elements.shape == (5, 4)


def test_a_mask_that_keeps_more_is_refused() -> None:
    ones = MaskedArray(inner=jnp.ones(MATRIX), mask=jnp.ones(MATRIX, bool))
    with pytest.raises(ValueError, match="at most 2 of every 4 inputs; got 4"):
        store_nm(ones, Layout.of(MATRIX, roles(MATRIX)), n=2, m=4)


def test_another_mask_makes_it_bits() -> None:
    w = {"w": jnp.asarray(normal(*MATRIX))}
    half = jc.prune.magnitude(sparsity=0.7)
    for scheme in (
        jc.chain(jc.prune.magnitude(sparsity=nm(2, 4)), half),
        jc.chain(half, jc.prune.magnitude(sparsity=nm(2, 4))),
    ):
        params, state = scheme.init(w)
        leaf, view = scheme.compress(params, state)["w"], scheme.view(params, state)
        assert isinstance(leaf, BitmaskArray)
        np.testing.assert_array_equal(leaf.materialize(), view["w"].materialize())
        dense = np.asarray(leaf.materialize())
        assert (dense != 0).sum() <= 12
        assert (np.count_nonzero(dense.reshape(2, 4, 5), axis=1) <= 2).all()


def test_casts_transposes_and_scans() -> None:
    _, leaf, mask = compressed(STACK)
    dense = np.where(mask, normal(*STACK), 0)
    cast = leaf.relayout(Cast(dtype=np.dtype(jnp.bfloat16)))
    assert isinstance(cast, NMArray)
    assert cast.elements is leaf.elements
    assert cast.dtype == jnp.bfloat16
    assert cast.relayout(Cast(dtype=np.dtype(np.float32))) is NotImplemented
    turned = leaf.relayout(Transpose(permutation=(2, 0, 1)))
    np.testing.assert_array_equal(turned.materialize(), dense.transpose(2, 0, 1))
    assert leaf.stacked(1) is leaf
    _, layers = jax.lax.scan(lambda _, w: (None, w.materialize()), None, leaf)
    np.testing.assert_array_equal(layers, dense)


def test_outputs_and_stacks_are_sharded() -> None:
    _, leaf, _ = compressed(STACK, jc.quant.int4(group_size=4))
    specs = leaf.component_specs(("d", None, "e"), {"d": 3, "e": 5})
    assert (specs.elements, specs.places) == (P("d", "e"), P("d", "e"))
    assert specs.frame.scale == P("d", "e")
    with pytest.raises(ValueError, match="contracting axes cannot be sharded"):
        leaf.component_specs((None, "d", None), {"d": 2})


def test_files_and_reports(tmp_path: Path) -> None:
    _, leaf, _ = compressed(CONV, jc.quant.int3())
    jc.io.save(tmp_path / "m.jc", {"w": leaf})
    loaded = jc.io.load(tmp_path / "m.jc")["w"]
    assert isinstance(loaded, NMArray)
    np.testing.assert_array_equal(loaded.materialize(), leaf.materialize())
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
