"""To `jax.experimental.sparse` and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

import jaxcompress as jc
from jaxcompress.prune import from_bcoo, to_bcoo

MATRIX, STACK, CONV, VECTOR = (8, 5), (3, 8, 5), (2, 3, 5, 3), (13,)
AXES: dict[tuple[int, ...], Any] = {STACK: -2, CONV: (-4, -3, -2)}
PATTERNS = {
    "half": 0.5,
    "2:4": jc.prune.nm(2, 4),
    "blocks": jc.prune.blocks(sparsity=0.5, shape=(2, 3)),
}


def compressed(shape: tuple[int, ...], sparsity: Any, *others: Any) -> Any:
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    scheme = jc.prune.magnitude(sparsity=sparsity, axes=AXES.get(shape))
    scheme = jc.chain(scheme, *others) if others else scheme
    return scheme.compress(*scheme.init({"w": jnp.asarray(w)}))["w"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stack_becomes_a_batch(pattern: str) -> None:
    leaf = compressed(STACK, PATTERNS[pattern])
    dense = np.asarray(leaf.materialize())
    sparse = to_bcoo(leaf)
    assert (sparse.shape, sparse.n_batch, sparse.n_dense) == (STACK, 1, 0)
    np.testing.assert_array_equal(sparse.todense(), dense)
    for layer in range(3):
        # Ascending, unique, none of them stored in vain.
        places = np.asarray(sparse.indices[layer])
        flat = places[:, 0] * 5 + places[:, 1]
        inside = flat[(places < 8).all(1)]
        assert (np.diff(inside) > 0).all()
        np.testing.assert_array_equal(inside, np.flatnonzero(dense[layer]))


@pytest.mark.parametrize("shape", [MATRIX, STACK, CONV, VECTOR], ids=str)
def test_there_and_back(shape: tuple[int, ...]) -> None:
    leaf = compressed(shape, 0.6)
    back = from_bcoo(to_bcoo(leaf), axes=AXES.get(shape))
    assert jax.tree.structure(back) == jax.tree.structure(leaf)
    jax.tree.map(np.testing.assert_array_equal, back, leaf)


def test_entries_with_fewer_elements_are_filled_up() -> None:
    w = np.random.default_rng(0).normal(size=STACK).astype(np.float32)
    w[1, 2:] = 0
    dense = jnp.asarray(w)
    sparse = BCOO.fromdense(dense, n_batch=1)
    leaf = from_bcoo(sparse)
    np.testing.assert_array_equal(leaf.materialize(), w)
    again = to_bcoo(leaf)
    assert again.nse == 40
    np.testing.assert_array_equal(again.todense(), w)
    assert (np.asarray(again.indices[1, 10:]) == [8, 5]).all()


def test_equal_indices_add_up_and_zeros_stay_stored() -> None:
    data, where = jnp.array([1.0, 2.0, 0.0]), jnp.array([[0, 1], [0, 1], [1, 1]])
    leaf = from_bcoo(BCOO((data, where), shape=(2, 2)))
    assert leaf.materialize().tolist() == [[0.0, 3.0], [0.0, 0.0]]
    assert leaf.elements.tolist() == [3.0, 0.0]
    assert to_bcoo(leaf).nse == 2


def test_codes_become_floats_and_products_agree() -> None:
    leaf = compressed(MATRIX, 0.5, jc.quant.int4())
    sparse = to_bcoo(leaf)
    np.testing.assert_array_equal(sparse.todense(), leaf.materialize())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)
    np.testing.assert_allclose(x @ sparse, x @ leaf.materialize(), rtol=1e-5, atol=1e-5)


def test_under_jit_the_count_must_be_given() -> None:
    leaf = compressed(MATRIX, 0.5)
    found = jax.jit(lambda q: to_bcoo(q, nse=22))(leaf)
    assert found.nse == 22
    np.testing.assert_array_equal(found.todense(), leaf.materialize())
    with pytest.raises(ValueError, match="nse must be given where the mask is traced"):
        jax.jit(to_bcoo)(leaf)
    with pytest.raises(ValueError, match=r"at least the 20 weights .* got 19"):
        to_bcoo(leaf, nse=19)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a pruned weight"):
        to_bcoo(jnp.eye(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"dense axes .* n_dense=1"):
        from_bcoo(BCOO.fromdense(jnp.eye(3), n_dense=1))
    with pytest.raises(ValueError, match="cannot be told from its rank"):
        from_bcoo(BCOO.fromdense(jnp.ones((2, 2, 2))))
