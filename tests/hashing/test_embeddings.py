"""Composed embeddings and hashed features against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import hashing as h
from tests.hashing.oracle import PRIME, digest
from tests.hashing.test_array import draw
from tests.jitted import run
from tests.lift.programs import mesh

KEY, WORDS, WIDTH = jax.random.key(0), 30, 6
COMBINE = {
    "multiply": lambda rows: np.prod(rows, axis=0),
    "add": lambda rows: np.sum(rows, axis=0),
    "concatenate": np.concatenate,
}


def hashed() -> tuple[h.HashEmbedding, np.ndarray]:
    leaf = h.hash_embedding(WORDS, WIDTH, rows=7, hashes=3, seed=5, key=KEY)
    leaf = leaf.replace(importance=draw(1, WORDS, 3))
    table, p = np.float64(leaf.table), np.float64(leaf.importance)
    wanted = np.zeros((WORDS, WIDTH))
    for v, j in np.ndindex(WORDS, 3):
        wanted[v] += p[v, j] * table[digest(5, v, j) % 7]
    return leaf, wanted


def composed(combine: Any) -> tuple[h.ComposedEmbedding, np.ndarray]:
    sizes = (4, 3, 3)
    leaf = h.compositional_embedding(
        WORDS, WIDTH, rows=sizes, combine=combine, key=KEY, stddev=1.0
    )
    wanted = []
    for v in range(WORDS):
        digits = (v % 4, v // 4 % 3, v // 12)
        rows = [np.float64(t)[d] for t, d in zip(leaf.tables, digits, strict=True)]
        wanted.append(COMBINE[combine](rows))
    return leaf, np.array(wanted)


LEAVES = {"hashed": hashed(), **{name: composed(name) for name in COMBINE}}


@pytest.mark.parametrize(("leaf", "wanted"), LEAVES.values(), ids=LEAVES)
def test_rows_are_those_of_the_definition(
    leaf: Any, wanted: np.ndarray, tmp_path: Path
) -> None:
    index = jnp.array([[3, 29], [0, 3]])
    look = jc.lift(lambda w, i: w[i])

    def both(leaf: Any) -> Any:
        loss = lambda leaf: look(leaf, index).sum()
        return leaf.materialize(), look(leaf, index), jax.grad(loss)(leaf)

    dense, found, grads = run(both, leaf)
    np.testing.assert_allclose(dense, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found, np.asarray(dense)[index])
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads))
    jc.io.save(tmp_path / "e.jc", {"e": leaf})
    again = jc.io.load(tmp_path / "e.jc")["e"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    assert leaf.stored_bytes == sum(a.nbytes for a in jax.tree.leaves(leaf))
    with pytest.raises(ValueError, match="every row is read"):
        jc.shardings({"e": leaf}, {"e": P("d")}, mesh())


def test_words_differ_and_are_of_the_size_asked_for() -> None:
    for combine in COMBINE:
        leaf = h.quotient_remainder_embedding(
            500, 32, remainders=25, combine=combine, key=KEY, stddev=0.1
        )
        dense = np.asarray(run(jc.materialize, leaf))
        assert len(np.unique(dense, axis=0)) == 500
        assert dense.std() == pytest.approx(0.1, rel=0.25)
        assert leaf.stored_bytes <= dense.nbytes / 11
    leaf = h.hash_embedding(500, 32, rows=200, key=KEY, stddev=0.1)
    assert np.std(run(jc.materialize, leaf)) == pytest.approx(0.1, rel=0.25)


def test_tables_can_be_quantized() -> None:
    leaf, _ = LEAVES["multiply"]
    rule = jc.quant.int8()
    packed = jc.compress({"e": leaf}, {"e": rule})["e"]
    assert packed.stored_bytes < leaf.stored_bytes
    plain, coded = run(jc.materialize, [leaf, packed])
    np.testing.assert_allclose(coded, plain, atol=0.05)


def test_a_look_up_does_not_make_the_table() -> None:
    words = 100_000
    leaf = h.quotient_remainder_embedding(words, 8, remainders=320, key=KEY)
    look = jax.jit(jc.lift(lambda w, i: w[i]))
    memory = look.lower(leaf, jnp.arange(4)).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < words


def test_hashed_features_are_signed_sums_and_keep_inner_products() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 2**31, (2, 300)).astype(np.int32)
    index[1, :200] = index[0, :200]
    values = rng.normal(size=(2, 300)).astype(np.float32)
    size = 64

    found = run(
        lambda i, v: jnp.stack(
            [h.hash_features(i, v, size=size, seed=s) for s in range(40)]
        ),
        jnp.asarray(index),
        jnp.asarray(values),
    )
    wanted = np.zeros((2, size))
    for i, j in np.ndindex(2, 300):
        word = int(index[i, j])
        sign = -1 if digest(1 + PRIME, word) >> 31 else 1
        wanted[i, digest(1, word) % size] += sign * float(values[i, j])
    np.testing.assert_allclose(found[1], wanted, atol=1e-5)
    products = np.einsum("si,si->s", found[:, 0], found[:, 1])
    exact = (values[0, :200] * values[1, :200]).sum()
    spread = products.std() / np.sqrt(len(products))
    assert abs(products.mean() - exact) < 4 * spread


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "rows must be positive",
            lambda: h.hash_embedding(9, 4, rows=0, key=KEY),
        ),
        (
            ValueError,
            "must combine to 30 words",
            lambda: h.compositional_embedding(30, 4, rows=(4, 4), key=KEY),
        ),
        (
            ValueError,
            "multiple of the 2 tables",
            lambda: h.compositional_embedding(
                9, 5, rows=(3, 3), combine="concatenate", key=KEY
            ),
        ),
        (
            ValueError,
            "tables must be positive; got 0",
            lambda: h.compositional_embedding(9, 4, rows=(), key=KEY),
        ),
        (
            ValueError,
            "combine must be one of .* got 'product'",
            lambda: h.compositional_embedding(
                9, 4, rows=(3, 3), combine=cast("Any", "product"), key=KEY
            ),
        ),
        (TypeError, "int32 or uint32", lambda: h.hash_features(jnp.ones(2), size=4)),
        (ValueError, "size must be", lambda: h.hash_features(jnp.arange(2), size=0)),
        (
            ValueError,
            "shape of index",
            lambda: h.hash_features(jnp.arange(2), jnp.ones(3), size=4),
        ),
    ],
)
def test_what_is_refused(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
