"""Whole blocks: the mask against loops, and what is stored."""

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
from jaxcompress.leaf import Transpose
from jaxcompress.prune import BitmaskArray, BlockSparseArray, blocks
from jaxcompress.prune._block_array import store_blocks
from kernels_pallas import block_sparse_matmul as kernel
from tests.jitted import run

MATRIX, STACK, CONV, VECTOR = (10, 7), (3, 10, 7), (2, 3, 5, 3), (13,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}
BLOCK = (2, 4)
SPARSITY = 0.6


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def roles(shape: tuple[int, ...]) -> jc.Axes:
    return resolve_axes(shape, AXES.get(shape), who="test", path="w")


def matrices(w: np.ndarray) -> np.ndarray:
    """``[S, N, K]`` of a weight."""
    axes = roles(w.shape)
    contract = [w.ndim + a for a in axes.contract]
    out = [a for a in range(axes.stack, w.ndim) if a not in contract]
    entries = int(np.prod(w.shape[: axes.stack]))
    k = int(np.prod([w.shape[a] for a in contract]))
    return w.transpose(*range(axes.stack), *out, *contract).reshape(entries, -1, k)


def sums(score: np.ndarray) -> np.ndarray:
    """``[S, R, B]`` of ``[S, N, K]``, edges as they are."""
    (bn, bk), (s, n, k) = BLOCK, score.shape
    found = np.zeros((s, -(-n // bn), -(-k // bk)))
    for i, r, c in np.ndindex(found.shape):
        cut = score[i, r * bn : (r + 1) * bn, c * bk : (c + 1) * bk]
        found[i, r, c] = cut.sum(dtype=np.float64)
    return found


def lowest(flat: np.ndarray) -> np.ndarray:
    """True at the fraction of lowest sums."""
    count = int(np.floor(SPARSITY * flat.size + 0.5))
    out = np.zeros(flat.size, bool)
    out[np.argsort(flat.ravel(), kind="stable")[:count]] = True
    return out.reshape(flat.shape)


def expected_mask(w: np.ndarray, scope: str) -> np.ndarray:
    """``bool[S, N, K]``, where blocks are kept."""
    scores = matrices(np.abs(w))
    cost = sums(scores)
    pruned = np.zeros(cost.shape, bool)
    if scope == "global":
        pruned = lowest(cost)
    for i in range(len(cost) * (scope != "global")):
        if scope == "layer":
            pruned[i] = lowest(cost[i])
        for r in range(cost.shape[1] * (scope == "row")):
            pruned[i, r] = lowest(cost[i, r])
    kept = ~np.repeat(np.repeat(pruned, BLOCK[0], 1), BLOCK[1], 2)
    return kept[:, : scores.shape[1], : scores.shape[2]]


def places(kept: np.ndarray) -> int:
    """Blocks in the fullest row of ``bool[S, N, K]``."""
    return int((sums(kept) > 0).sum(-1).max())


def scheme_of(shape: tuple[int, ...], scope: Any, fmt: Any = None) -> jc.Transform:
    pattern = blocks(sparsity=SPARSITY, shape=BLOCK, scope=scope)
    scheme = jc.prune.magnitude(sparsity=pattern, axes=AXES.get(shape))
    if fmt is not None:
        scheme = jc.chain(scheme, fmt.replace(axes=AXES.get(shape)))
    return scheme


@functools.cache
def compressed(
    shape: tuple[int, ...], scope: Any = "layer", fmt: Any = None
) -> tuple[np.ndarray, Any]:
    """The view's values and the stored form, made under jit, of the stated capacity."""
    scheme = scheme_of(shape, scope, fmt)
    w = normal(*shape)
    most = places(expected_mask(w, scope))

    def compress(w: jax.Array) -> tuple[jax.Array, Any]:
        params, state = scheme.init({"w": w})
        view: Any = scheme.view(params, state)["w"]
        if scope == "row":
            return view.materialize(), scheme.compress(params, state)["w"]
        layout = Layout.of(shape, roles(shape))
        stored = store_blocks(view, layout, block=BLOCK, capacity=most)
        return view.materialize(), stored

    view, stored = run(compress, w)
    return np.asarray(view), stored


dense = jax.jit(jc.materialize)


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("shape", [MATRIX, STACK], ids=str)
def test_the_blocks_of_smallest_sums_go(shape: tuple[int, ...], scope: str) -> None:
    w = normal(*shape)
    view, leaf = compressed(shape, scope)
    assert isinstance(leaf, BlockSparseArray)
    assert (leaf.shape, leaf.method) == (shape, "blocks 2x4 dense")
    found = np.asarray(dense(leaf))
    expected = np.where(expected_mask(w, scope), matrices(w), 0)
    np.testing.assert_array_equal(matrices(found), expected)
    np.testing.assert_array_equal(view, found)


def test_convolutions_and_vectors() -> None:
    for shape in (CONV, VECTOR):
        w = normal(*shape)
        leaf = compressed(shape, "row")[1]
        expected = np.where(expected_mask(w, "row"), matrices(w), 0)
        np.testing.assert_array_equal(matrices(np.asarray(dense(leaf))), expected)


def test_it_is_what_the_kernel_reads() -> None:
    leaf = compressed(MATRIX)[1]
    pack = functools.partial(kernel.pack, block=BLOCK, capacity=leaf.columns.shape[-1])
    packed = run(pack, np.asarray(dense(leaf)).T)
    np.testing.assert_array_equal(leaf.elements, packed.values)
    np.testing.assert_array_equal(leaf.columns, packed.columns)


def test_bytes_are_the_places_of_the_fullest_row() -> None:
    """Where the mask is concrete; the same is stored as under jit."""
    scheme = scheme_of(STACK, "layer")
    params, state = run(scheme.init, {"w": normal(*STACK)})
    leaf = scheme.compress(params, state)["w"]
    most = places(expected_mask(normal(*STACK), "layer"))
    assert leaf.columns.shape == (3, 4, most)
    assert leaf.stored_bytes == 3 * 4 * most * (2 * 4 * 4 + 4)
    jax.tree.map(np.testing.assert_array_equal, leaf, compressed(STACK)[1])


CODES = jc.quant.int4(group_size=5, symmetric=False)


def test_codes_come_back_in_their_places() -> None:
    view, leaf = compressed(STACK, "row", CODES)
    assert isinstance(leaf, BlockSparseArray)
    assert leaf.elements.dtype == jnp.uint8
    assert leaf.elements.shape[-2:] == (2, 2)
    found = np.asarray(dense(leaf))
    np.testing.assert_array_equal(view, found)
    kept = expected_mask(normal(*STACK), "row")
    assert (matrices(found)[~kept] == 0).all()
    off = np.abs(matrices(found) - matrices(normal(*STACK)))
    assert off[kept].max() < 0.3
    with pytest.raises(jc.OrderError, match="fixes the value of every weight"):
        jax.eval_shape(lambda q: q.map_values(lambda a: a), leaf)


def test_a_count_that_is_not_static_needs_compress_outside_jit() -> None:
    scheme = jc.prune.magnitude(sparsity=blocks(sparsity=0.5, shape=BLOCK))
    params, state = jax.eval_shape(scheme.init, {"w": jnp.asarray(normal(*MATRIX))})
    with pytest.raises(jax.errors.ConcretizationTypeError, match="scope='row'"):
        jax.jit(scheme.compress)(params, state)


def test_a_schedule_takes_more_blocks_with_time() -> None:
    schedule = jc.schedules.linear(0.0, 0.5, begin=0, end=2)
    scheme = jc.prune.magnitude(
        sparsity=blocks(sparsity=schedule, shape=(1, 1), scope="row")
    )
    params, state = run(scheme.init, {"w": normal(*MATRIX)})
    update = jax.jit(scheme.update)
    counts = [10]
    for _ in range(2):
        params, state = update(params, state)
        kept = np.asarray(state.masks["w"][0]).sum(0)
        assert (kept == kept[0]).all()
        counts.append(int(kept[0]))
    assert counts == [10, 7, 5]


def test_another_mask_makes_it_bits() -> None:
    w = normal(*STACK)
    more = jc.prune.magnitude(sparsity=0.6, axes=-2)
    scheme = jc.chain(scheme_of(STACK, "layer"), more)
    params, state = run(scheme.init, {"w": w})
    leaf = scheme.compress(params, state)["w"]
    assert isinstance(leaf, BitmaskArray)
    found = np.asarray(dense(leaf))
    view = run(lambda *args: jc.materialize(scheme.view(*args)), params, state)["w"]
    np.testing.assert_array_equal(found, view)
    assert ((found == 0).sum((1, 2)) >= 42).all()
    assert (matrices(found)[~expected_mask(w, "layer")] == 0).all()


def test_transposes_and_scans() -> None:
    leaf = compressed(STACK)[1]
    assert leaf.stacked(1) is leaf

    def both(leaf: Any) -> tuple[jax.Array, jax.Array]:
        turned = leaf.relayout(Transpose(permutation=(2, 0, 1)))
        _, layers = jax.lax.scan(lambda _, w: (None, w.materialize()), None, leaf)
        return turned.materialize(), layers

    turned, layers = run(both, leaf)
    expected = np.asarray(dense(leaf))
    np.testing.assert_array_equal(turned, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(layers, expected)


def test_whole_rows_of_blocks_are_sharded() -> None:
    pattern = blocks(sparsity=0.5, shape=(2, 5), scope="row")
    scheme = jc.prune.magnitude(sparsity=pattern, axes=-2)
    compress = lambda w: scheme.compress(*scheme.init({"w": w}))["w"]
    leaf = jax.eval_shape(compress, jnp.asarray(normal(3, 10, 8)))
    specs = leaf.component_specs(("d", None, "e"), {"d": 3, "e": 4})
    assert (specs.elements, specs.columns) == (P("d", "e"), P("d", "e"))
    for spec, sizes in (((None, "e", None), {"e": 2}), ((None, None, "e"), {"e": 8})):
        with pytest.raises(ValueError, match="divides its 4 whole rows of blocks"):
            leaf.component_specs(spec, sizes)


def test_the_kernel_runs_where_it_was_asked_for() -> None:
    leaf = compressed(STACK)[1]
    tree = jc.prune.use_kernels({"w": leaf, "b": jnp.asarray(np.ones(7, np.float32))})
    assert tree["w"].traits.own_matmul
    assert not leaf.traits.own_matmul
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 5, 10)), jnp.float32)
    layers = lambda p, x: jax.lax.scan(
        lambda c, wx: (c, wx[1] @ wx[0] + p["b"][None]), None, (p["w"], x)
    )[1]
    explained = str(jc.explain(layers, tree, x))
    assert "float32 blocks of 2 x 4 gathered" in explained
    assert "gathered" not in str(jc.explain(layers, {**tree, "w": leaf}, x))
    expected = matrices(np.asarray(dense(leaf))).swapaxes(1, 2)
    expected = np.einsum("smk,skn->smn", np.float64(x), expected) + 1
    found = run(jc.lift(layers), tree, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert tree["w"].portable().kernel is False
    codes = compressed(STACK, "row", CODES)[1]
    assert jc.prune.use_kernels(codes) is codes


def test_files(tmp_path: Path) -> None:
    leaf = compressed(CONV, "row", jc.quant.int4())[1]
    jc.io.save(tmp_path / "m.jc", {"w": leaf})
    loaded = jc.io.load(tmp_path / "m.jc")["w"]
    assert isinstance(loaded, BlockSparseArray)
    np.testing.assert_array_equal(dense(loaded), dense(leaf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"must be in \[0, 1\); got 1.0"),
        ({"sparsity": 0.5, "shape": (0, 4)}, r"at least 1 each; got \(0, 4\)"),
        ({"sparsity": 0.5, "scope": "column"}, "got 'column'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(**options)
