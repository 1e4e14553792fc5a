"""Laws of the stored form, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from tests.cases import CASES, PRESETS, Case, methods
from tests.laws.setting import (
    LAYERS,
    assert_same,
    assert_settled,
    cases,
    cases_and_dtypes,
    packed,
    scheme,
    weights,
)


def test_every_public_method_is_a_case() -> None:
    families = (jc.quant, jc.prune, jc.hashing, jc.codebook, jc.lowrank)
    public = set().union(*map(methods, families)) | {"identity", *PRESETS}
    assert {case.fn.__name__ for case in CASES} == public


@cases_and_dtypes
def test_materialize_keeps_structure_shapes_and_dtypes(case: Case, dtype: Any) -> None:
    dense = jc.materialize(packed(case, dtype))
    assert jax.tree.structure(dense) == jax.tree.structure(weights())
    for path, w in weights(dtype).items():
        assert (dense[path].shape, dense[path].dtype) == (w.shape, w.dtype)


@cases
def test_untouched_leaves_are_the_same_objects(case: Case) -> None:
    assert packed(case)["bias"] is weights()["bias"]


@cases
def test_compressing_what_was_compressed_changes_nothing(case: Case) -> None:
    once = packed(case)
    transform = scheme(case.rule())
    twice = transform.compress(*transform.init(jc.materialize(once)))
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert_settled(case, twice, once)


@cases
def test_zeros_stay_zero(case: Case) -> None:
    dense = jc.materialize(packed(case))
    for path, w in weights().items():
        zeros = np.asarray(dense[path])[np.asarray(w) == 0]
        assert zeros.size
        kept = case.keeps_zeros or case.adapts or path == "bias"
        assert (zeros == 0).all() == kept
    leaves = jax.tree.leaves(packed(case), is_leaf=jc.is_leaf)
    leaves = [x for x in leaves if isinstance(x, jc.Leaf)]
    assert all(x.traits.preserves_zeros == case.keeps_zeros for x in leaves)
    blank = jax.tree.map(jnp.zeros_like, weights())
    transform = scheme(case.rule())
    for a in jax.tree.leaves(
        jc.materialize(transform.compress(*transform.init(blank)))
    ):
        assert not a.any()


@cases
def test_stored_bytes_are_those_of_the_buffers(case: Case) -> None:
    tree = packed(case)
    sizes = {row.path: row.memory_bytes for row in jc.report.size(tree).rows}
    for path, leaf in tree.items():
        buffers = sum(np.asarray(a).nbytes for a in jax.tree.leaves(leaf))
        assert sizes[path] == buffers
        if isinstance(leaf, jc.Leaf):
            assert leaf.stored_bytes == buffers < weights()[path].nbytes


@cases
def test_a_stacked_leaf_can_be_sliced_scanned_and_mapped(case: Case) -> None:
    stack = packed(case)["stack"]
    dense = jc.materialize(stack)
    for i in range(LAYERS):
        layer = jax.tree.map(lambda a, i=i: a[i], stack)
        np.testing.assert_array_equal(jc.materialize(layer), dense[i])
    scanned = jax.lax.scan(lambda _, w: (None, jc.materialize(w)), None, stack)[1]
    np.testing.assert_array_equal(scanned, dense)
    mapped = jax.vmap(jc.materialize)(stack)
    np.testing.assert_array_equal(mapped, dense)


@cases_and_dtypes
def test_save_and_load_give_the_same_bits(
    case: Case, dtype: Any, tmp_path: Path
) -> None:
    jc.io.save(tmp_path / "m.jc", packed(case, dtype))
    assert_same(jc.io.load(tmp_path / "m.jc"), packed(case, dtype))
