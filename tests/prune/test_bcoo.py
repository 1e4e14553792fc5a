"""To `jax.experimental.sparse` and back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import jaxcompress as jc
from jaxcompress.layout import Layout, resolve_axes
from jaxcompress.prune import from_bcoo, to_bcoo
from jaxcompress.prune._block_array import store_blocks
from tests.jitted import run

# All but the stack hold 40 weights, in rows of 8 if any: one program serves several.
MATRIX, STACK, CONV, VECTOR = (8, 5), (3, 8, 5), (2, 2, 2, 5), (40,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}
PATTERNS = {
    "half": 0.5,
    "2:4": jc.prune.nm(2, 4),
    "blocks": jc.prune.blocks(sparsity=0.5, shape=(2, 3)),
}


def normal(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def compressed(shape: tuple[int, ...], sparsity: Any, *others: Any) -> Any:
    """Under jit: in blocks, with room for all that a row has."""
    scheme = jc.prune.magnitude(sparsity=sparsity, axes=AXES.get(shape))
    scheme = jc.chain(scheme, *others) if others else scheme
    axes = resolve_axes(shape, AXES.get(shape), who="test", path="w")

    def compress(w: jax.Array) -> Any:
        params, state = scheme.init({"w": w})
        if sparsity is not PATTERNS["blocks"]:
            return scheme.compress(params, state)["w"]
        view: Any = scheme.view(params, state)["w"]
        layout = Layout.of(shape, axes)
        return store_blocks(view, layout, block=(2, 3), capacity=3)

    return run(compress, normal(shape))


dense = jax.jit(jc.materialize)


@functools.partial(jax.jit, static_argnames="nse")
def converted(leaf: Any, nse: int) -> tuple[BCOO, jax.Array]:
    sparse = to_bcoo(leaf, nse=nse)
    return sparse, sparse.todense()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stack_becomes_a_batch(pattern: str) -> None:
    leaf = compressed(STACK, PATTERNS[pattern])
    expected = np.asarray(dense(leaf))
    nse = int(np.count_nonzero(expected, axis=(1, 2)).max())
    sparse, found = converted(leaf, nse=nse)
    assert (sparse.shape, sparse.n_batch, sparse.n_dense) == (STACK, 1, 0)
    np.testing.assert_array_equal(found, expected)
    for places, own in zip(np.asarray(sparse.indices), expected, strict=True):
        # Ascending, unique, none of them stored in vain.
        flat = places[:, 0] * 5 + places[:, 1]
        inside = flat[(places < 8).all(1)]
        assert (np.diff(inside) > 0).all()
        np.testing.assert_array_equal(inside, np.flatnonzero(own))


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_there_and_back(shape: tuple[int, ...]) -> None:
    leaf = compressed(shape, 0.6)
    back = from_bcoo(converted(leaf, nse=16)[0], axes=AXES.get(shape))
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    jax.tree.map(np.testing.assert_array_equal, back, leaf)


def test_entries_with_fewer_elements_are_filled_up() -> None:
    w = normal(STACK)
    w[:, 3:] = w[0, 3:, 0] = w[1, 2:] = 0
    w[0, 2, 0], w[2, 3, 0] = 7, 8
    counts = np.count_nonzero(w, axis=(1, 2))
    assert counts.tolist() == [15, 10, 16]
    leaf = from_bcoo(run(lambda w: BCOO.fromdense(w, nse=16, n_batch=1), w))
    np.testing.assert_array_equal(dense(leaf), w)
    again = to_bcoo(leaf)
    assert again.nse == 16
    np.testing.assert_array_equal(run(BCOO.todense, again), w)
    for layer, count in enumerate(counts):
        assert (np.asarray(again.indices)[layer, count:] == [8, 5]).all()


def test_equal_indices_add_up_and_zeros_stay_stored() -> None:
    data, rows = np.arange(16.0, -1, -1, np.float32), [0, *range(8), *range(8)]
    where = np.array([rows, [1] * 9 + [2] * 8], np.int32).T
    leaf = from_bcoo(BCOO((jnp.asarray(data), jnp.asarray(where)), shape=MATRIX))
    expected = np.zeros(MATRIX, np.float32)
    np.add.at(expected, tuple(where.T), data)
    assert (expected[0, 1], np.count_nonzero(expected)) == (31, 15)
    np.testing.assert_array_equal(dense(leaf), expected)
    np.testing.assert_array_equal(leaf.elements, expected[:, 1:3].T.ravel())
    masked = run(lambda q: q.expand(), leaf)
    assert to_bcoo(masked).nse == 16


def test_codes_become_floats_and_products_agree() -> None:
    leaf = compressed(MATRIX, 0.5, jc.quant.int4())
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)

    @jax.jit
    def products(leaf: Any, x: jax.Array) -> Any:
        sparse = to_bcoo(leaf, nse=20)
        return sparse.todense(), x @ sparse

    values = np.asarray(dense(leaf))
    found, product = products(leaf, x)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_allclose(
        product, np.float64(x) @ np.float64(values), rtol=1e-5, atol=1e-5
    )


def test_under_jit_the_count_must_be_given() -> None:
    leaf = compressed(MATRIX, 0.5)
    sparse, found = converted(leaf, nse=22)
    assert sparse.nse == 22
    np.testing.assert_array_equal(found, dense(leaf))
    with pytest.raises(ValueError, match="nse must be given where the mask is traced"):
        jax.jit(to_bcoo)(leaf)
    masked = run(lambda q: q.expand(), leaf)
    with pytest.raises(ValueError, match=r"at least the 20 weights .* got 19"):
        to_bcoo(masked, nse=19)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a pruned weight"):
        to_bcoo(jnp.asarray(normal(MATRIX)))  # pyright: ignore[reportArgumentType]
    ones = lambda *shape: jnp.asarray(np.ones(shape, np.int32))
    with pytest.raises(ValueError, match=r"dense axes .* n_dense=1"):
        from_bcoo(BCOO((ones(1, 3), ones(1, 1)), shape=(3, 3)))
    with pytest.raises(ValueError, match="cannot be told from its rank"):
        from_bcoo(BCOO((ones(1), ones(1, 3)), shape=(2, 2, 2)))
