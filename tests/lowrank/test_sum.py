"""Sums of leaves: corrections of other methods, sparse plus low rank, merging."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import lowrank
from tests.lift.programs import mesh
from tests.lowrank.weights import CONV, MATRIX, best_product, draw, energy, run, sees

OUTLIERS = ((0, 3), (5, 1), (7, 7))


def compressed(rule: Any, w: jax.Array, axes: Any = MATRIX) -> Any:
    scheme = jc.select({"*": rule}, axes={"w": axes})
    return run(lambda w: scheme.compress(*scheme.init({"w": w}))["w"], w)


def outlying() -> jax.Array:
    """Rank 2, and three large entries."""
    w = draw(0, 8, 2) @ draw(1, 2, 8)
    for place in OUTLIERS:
        w = w.at[place].add(20.0)
    return w


def test_the_correction_is_the_best_of_the_error() -> None:
    w = draw(0, 16, 8)
    leaf = compressed(lowrank.corrected(rule=jc.quant.int2(), rank=3), w)
    plain = compressed(jc.quant.int2(), w)
    np.testing.assert_array_equal(leaf.first.words, plain.words)
    error = np.float64(w) - np.float64(plain.materialize())
    found = leaf.second.materialize()
    np.testing.assert_allclose(found, best_product(error, 3), atol=1e-5)
    assert energy(leaf.materialize() - w) < 0.7 * energy(plain.materialize() - w)
    total = plain.stored_bytes + 4 * 3 * (16 + 8)
    assert leaf.stored_bytes == total


def test_any_rule_can_be_corrected_and_its_own_values_trained() -> None:
    rule = lowrank.corrected(rule=jc.prune.magnitude(sparsity=0.5), rank=2)
    leaf = compressed(rule, draw(0, 8, 8))
    assert str(leaf) == "SumArray(bitmask dense + rank 2, float32[8, 8])"
    trained, _ = jc.partition(
        compressed(lowrank.corrected(rule=jc.quant.int4(), rank=2), draw(0, 8, 8))
    )
    assert len(jax.tree.leaves(trained)) == 2


def test_a_matmul_is_the_sum_of_both_by_their_own_rules() -> None:
    w, x = draw(0, 16, 12), draw(1, 5, 16)
    leaf = compressed(lowrank.corrected(rule=jc.quant.int4(), rank=2), w)
    for subscripts in ("bi,io->bo", "io,bi->ob"):
        left = subscripts.startswith("io")
        fn = lambda w, x, s=subscripts, left=left: jnp.einsum(
            s, *((w, x) if left else (x, w))
        )
        dense = np.float64(leaf.materialize())
        operands = (dense, np.float64(x)) if left else (np.float64(x), dense)
        expected = np.einsum(subscripts, *operands)
        np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)
    low = leaf.replace(first=leaf.second)
    assert not sees(lambda w, x: x @ w, low, x, shape=(16, 12))


def test_activations_in_half_precision_are_rounded_once() -> None:
    """Two parts that cancel: rounded before the sum, nothing would be left."""
    w = (draw(0, 16, 4) * 100).astype(jnp.bfloat16)
    leaf = compressed(lowrank.corrected(rule=jc.quant.int8(), rank=2), w)
    assert leaf.dtype == jnp.bfloat16
    x = draw(1, 5, 16).astype(jnp.bfloat16)
    y = run(jc.lift(lambda w, x: x @ w), leaf, x)
    assert y.dtype == jnp.bfloat16
    expected = np.float64(x) @ np.float64(leaf.materialize())
    np.testing.assert_allclose(np.float64(y), expected, rtol=0.05, atol=5.0)


def test_convolutions_look_ups_and_layouts_go_to_both() -> None:
    kernel, x = draw(0, 3, 3, 4, 6), draw(1, 1, 5, 5, 4)
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers
    )
    leaf = compressed(lowrank.corrected(rule=jc.quant.int8(), rank=2), kernel, CONV)
    expected = run(conv, leaf.materialize(), x)
    np.testing.assert_allclose(run(jc.lift(conv), leaf, x), expected, atol=1e-3)

    table, ids = draw(2, 10, 6), jnp.array([1, 9])
    leaf = compressed(
        lowrank.corrected(rule=jc.quant.int8(), rank=2), table, jc.Axes(contract=(-1,))
    )
    look_up = lambda w, i: w[i]
    found = run(jc.lift(look_up), leaf, ids)
    np.testing.assert_allclose(found, leaf.materialize()[ids], atol=1e-5)
    assert not sees(look_up, leaf, ids, shape=(10, 6))
    tied = run(jc.lift(lambda w, x: x @ w.T), leaf, draw(3, 2, 6))
    np.testing.assert_allclose(tied, draw(3, 2, 6) @ leaf.materialize().T, atol=1e-4)


def test_a_sum_is_sharded_part_by_part() -> None:
    leaf = compressed(lowrank.corrected(rule=jc.quant.int8(), rank=2), draw(0, 16, 8))
    specs = jc.shardings(leaf, P(None, "d"), mesh())
    assert specs.second.right == P(None, "d")
    assert specs.first.words == P("d", None)


def test_sparse_plus_finds_outliers_that_no_low_rank_fits() -> None:
    w = outlying()
    leaf = compressed(lowrank.sparse_plus(rank=2, sparsity=1 - 3 / 64), w)
    np.testing.assert_allclose(leaf.materialize(), w, atol=1e-3)
    sparse = np.asarray(leaf.first.materialize())
    assert set(zip(*np.nonzero(sparse), strict=True)) == set(OUTLIERS)
    assert leaf.second.rank == 2


@pytest.mark.parametrize("seed", range(2))
def test_turns_lower_the_error_below_one_after_the_other(seed: int) -> None:
    """Against the truncated decomposition followed by its largest errors."""
    w = draw(seed, 10, 10)
    rest = np.float64(w) - best_product(w, 2)
    kept = np.sort(np.abs(rest).ravel())[-20:]
    in_turn = energy(rest) - energy(kept)
    errors = [
        energy(
            compressed(
                lowrank.sparse_plus(rank=2, sparsity=0.8, steps=steps), w
            ).materialize()
            - w
        )
        for steps in (1, 20)
    ]
    assert errors[1] < errors[0] <= in_turn * 1.0001


def test_a_later_transform_acts_on_both_parts() -> None:
    both = jc.chain(lowrank.sparse_plus(rank=2, sparsity=0.8), jc.quant.int8())
    leaf = compressed(both, outlying())
    assert str(leaf) == "SumArray(bitmask int8 + rank 2 int8, float32[8, 8])"


def test_what_no_longer_pays_is_merged() -> None:
    """At 16 of 32 both forms have the same size: dense; at 15 factors have fewer."""
    w = draw(0, 32, 32)
    tree = {str(r): lowrank.svd_weight(w, r) for r in (15, 16)}
    merged = lowrank.merge(tree)
    assert merged["15"] is tree["15"]
    assert not isinstance(merged["16"], jc.Leaf)
    np.testing.assert_array_equal(merged["16"], tree["16"].materialize())
    assert not isinstance(lowrank.merge(tree, always=True)["15"], jc.Leaf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"in \[0, 1\)"),
        ({"steps": 0}, "steps must be positive"),
        ({"rank": 0}, "positive integer"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowrank.sparse_plus(**{"rank": 1, "sparsity": 0.5} | options)
