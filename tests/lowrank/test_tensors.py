"""Tucker, CP and tensor trains: what they stand for, their error, where they run."""

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
from tests.lowrank.weights import (
    CONV,
    MATRIX,
    best_product,
    draw,
    energy,
    run,
    sees,
)

KEY = jax.random.key(0)
KERNEL = (3, 2, 5, 6)
TABLE = (10, 6)
RULES = {
    "tucker": lowrank.tucker(ranks=(3, 4)),
    "cp": lowrank.cp(rank=7, key=KEY, steps=20),
}
TRAIN = lowrank.tensor_train(rows=(3, 2, 2), columns=(1, 3, 2), rank=4)


def compressed(rule: Any, w: jax.Array, axes: Any) -> Any:
    scheme = jc.select({"*": rule}, axes={"w": axes})
    return run(lambda w: scheme.compress(*scheme.init({"w": w}))["w"], w)


def dense(leaf: Any) -> np.ndarray:
    """What a leaf stands for by its definition, in float64."""
    parts = [np.float64(part) for part in leaf.parts()]
    if isinstance(leaf, lowrank.TuckerArray):
        return np.einsum("ip,...pq,qo->...io", *parts)
    if isinstance(leaf, lowrank.CPArray):
        return np.einsum("ar,br,ir,or->abio", *parts)
    rows = [c.shape[1] for c in parts]
    columns = [c.shape[2] for c in parts]
    table = np.zeros(leaf.shape)
    for i in range(leaf.shape[0]):
        for j in range(leaf.shape[1]):
            value = np.ones((1, 1))
            digits = np.unravel_index(i, rows), np.unravel_index(j, columns)
            for core, n, m in zip(parts, *digits, strict=True):
                value = value @ core[:, n, m]
            table[i, j] = value.item()
    return table


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)], ids=["", "strided"])
def test_a_convolution_runs_as_three_small_ones(name: str, strides: Any) -> None:
    w, x = draw(0, *KERNEL), draw(1, 2, 7, 7, 5)
    leaf = compressed(RULES[name], w, CONV)
    np.testing.assert_allclose(leaf.materialize(), dense(leaf), atol=1e-5)

    def fn(w: Any, x: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    expected = run(fn, leaf.materialize(), x)
    np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)
    assert not sees(fn, leaf, x, shape=KERNEL)


MATRICES = {
    "tucker": lowrank.tucker(ranks=(3, 3)),
    "cp": lowrank.cp(rank=3, key=KEY, steps=5),
    "tensor_train": lowrank.tensor_train(rows=(3, 3), columns=(4, 2), rank=3),
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matmul_runs_through_the_factors(name: str) -> None:
    """From either side, on either side."""
    w = draw(0, 9, 8)
    leaf = compressed(MATRICES[name], w, MATRIX)
    if name != "tensor_train":
        np.testing.assert_allclose(leaf.materialize(), best_product(w, 3), atol=1e-4)
    for subscripts, width in (("bi,io->bo", 9), ("bo,io->bi", 8), ("io,bi->ob", 9)):
        left = subscripts.startswith("io")
        x = draw(1, 4, width)
        fn = lambda w, x, s=subscripts, left=left: jnp.einsum(
            s, *((w, x) if left else (x, w))
        )
        table = np.float64(leaf.materialize())
        operands = (table, np.float64(x)) if left else (np.float64(x), table)
        expected = np.einsum(subscripts, *operands)
        np.testing.assert_allclose(run(jc.lift(fn), leaf, x), expected, atol=1e-4)
        assert not sees(fn, leaf, x, shape=(9, 8))


def best_of_mode(w: Any, axis: int, rank: int) -> float:
    """What any approximation of that rank along an axis must leave."""
    unfolded = np.moveaxis(np.float64(w), axis, 0).reshape(w.shape[axis], -1)
    return float(np.square(np.linalg.svd(unfolded, compute_uv=False)[rank:]).sum())


def test_tucker_is_between_its_bounds_and_turns_lower_its_error() -> None:
    w = draw(0, *KERNEL)
    errors = [
        energy(
            compressed(lowrank.tucker(ranks=(2, 3), steps=n), w, CONV).materialize() - w
        )
        for n in (0, 10)
    ]
    parts = best_of_mode(w, 2, 2), best_of_mode(w, 3, 3)
    assert max(parts) <= errors[1] < errors[0] <= sum(parts)
    full = compressed(lowrank.tucker(ranks=(5, 6)), w, CONV)
    np.testing.assert_allclose(full.materialize(), w, atol=1e-5)


def test_ranks_of_a_ratio_fit_it() -> None:
    w = draw(0, 3, 3, 16, 32)
    for ratio in (0.1, 0.5):
        leaf = compressed(lowrank.tucker(ratio=ratio, steps=0), w, CONV)
        assert 0.7 * ratio < leaf.stored_bytes / w.nbytes <= ratio


def test_cp_finds_a_sum_of_outer_products_again() -> None:
    rng = np.random.default_rng(3)
    parts = [rng.normal(size=(n, 3)) for n in KERNEL]
    w = jnp.asarray(np.einsum("ar,br,ir,or->abio", *parts), jnp.float32)
    found = compressed(lowrank.cp(rank=3, key=KEY, steps=200), w, CONV)
    assert energy(found.materialize() - w) < 1e-4 * energy(w)
    norms = [np.linalg.norm(np.asarray(f), axis=0) for f in found.factors]
    np.testing.assert_allclose(norms, [norms[0]] * 4, rtol=1e-3)


def test_cp_of_zeros_is_zero_and_more_rounds_lower_its_error() -> None:
    zero = compressed(lowrank.cp(rank=2, key=KEY, steps=2), jnp.zeros(KERNEL), CONV)
    assert not np.asarray(zero.materialize()).any()
    w = draw(0, *KERNEL)
    errors = [
        energy(
            compressed(lowrank.cp(rank=4, key=KEY, steps=n), w, CONV).materialize() - w
        )
        for n in (1, 30)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_a_train_is_its_definition_padded_rows_left_out() -> None:
    leaf = compressed(TRAIN, draw(0, *TABLE), MATRIX)
    assert [c.shape for c in leaf.cores] == [(1, 3, 1, 3), (3, 2, 3, 4), (4, 2, 2, 1)]
    np.testing.assert_allclose(leaf.materialize(), dense(leaf), atol=1e-5)
    whole = lowrank.tensor_train(rows=(3, 2, 2), columns=(1, 3, 2), rank=99)
    exact = compressed(whole, draw(0, *TABLE), MATRIX)
    np.testing.assert_allclose(exact.materialize(), draw(0, *TABLE), atol=1e-5)


def trained_by_definition(w: Any, rank: int) -> np.ndarray:
    """Oseledets, Algorithm 1, of three digits in NumPy."""
    digits = np.float64(w).reshape(3, 2, 2, 1, 3, 2).transpose(0, 3, 1, 4, 2, 5)
    u, s, vt = np.linalg.svd(digits.reshape(3, -1), full_matrices=False)
    a = min(rank, len(s))
    first, rest = u[:, :a], (s[:a, None] * vt[:a]).reshape(a * 6, -1)
    second = best_product(rest, rank).reshape(a, -1)
    whole = (first @ second).reshape(3, 1, 2, 3, 2, 2)
    return whole.transpose(0, 2, 4, 1, 3, 5).reshape(w.shape)


def test_a_train_is_found_digit_by_digit_by_cores_of_equal_norms() -> None:
    """At a rank that truncates both times."""
    w = draw(0, 12, 6)
    rule = lowrank.tensor_train(rows=(3, 2, 2), columns=(1, 3, 2), rank=2)
    leaf = compressed(rule, w, MATRIX)
    expected = trained_by_definition(w, 2)
    np.testing.assert_allclose(leaf.materialize(), expected, atol=1e-4)
    norms = [np.linalg.norm(np.asarray(core)) for core in leaf.cores]
    np.testing.assert_allclose(norms, [norms[0]] * 3, rtol=1e-4)


def test_a_look_up_multiplies_slices_of_the_cores() -> None:
    leaf = compressed(TRAIN, draw(0, *TABLE), jc.Axes(contract=(-1,)))
    ids = jnp.array([[0, 9], [4, 7]])
    fn = lambda w, i: w[i]
    found = run(jc.lift(fn), leaf, ids)
    np.testing.assert_allclose(found, dense(leaf)[np.asarray(ids)], atol=1e-5)
    for shape in (TABLE, (12, 6)):
        assert not sees(fn, leaf, ids, shape=shape)


def test_quantized_factors_keep_the_structure() -> None:
    for rule, w, axes in (
        (RULES["tucker"], draw(0, *KERNEL), CONV),
        (TRAIN, draw(0, *TABLE), MATRIX),
    ):
        plain = compressed(rule, w, axes)
        coded = compressed(jc.chain(rule, jc.quant.int8()), w, axes)
        assert coded.method == f"{plain.method} int8"
        assert coded.stored_bytes < plain.stored_bytes
        scale = float(jnp.abs(plain.materialize()).max())
        np.testing.assert_allclose(
            coded.materialize(), plain.materialize(), atol=0.05 * scale
        )


def test_factors_are_sharded_as_their_axes() -> None:
    w = draw(0, 3, 3, 8, 16)
    spec = P(None, None, None, "d")
    tucker = compressed(lowrank.tucker(ranks=(2, 2), steps=0), w, CONV)
    specs = jc.shardings(tucker, spec, mesh())
    assert (specs.inward, specs.outward) == (P(None, None), P(None, "d"))
    cp = compressed(lowrank.cp(rank=2, key=KEY, steps=1), w, CONV)
    assert jc.shardings(cp, spec, mesh()).factors[3] == P("d", None)


@pytest.mark.parametrize(
    ("rule", "w", "message"),
    [
        (lambda: lowrank.tucker(), None, "one of them"),
        (lambda: lowrank.tucker(ranks=(0, 1)), None, "ranks must be positive"),
        (lambda: lowrank.tucker(ratio=2.0), None, "ratio must be above 0"),
        (lambda: lowrank.tucker(ranks=(9, 1)), (4, 4), "at most"),
        (lambda: lowrank.cp(rank=0, key=KEY), None, "rank must be positive"),
        (lambda: lowrank.cp(rank=1, key=KEY, axes=(-1,)), (4, 4), "all axes but"),
        (
            lambda: lowrank.tensor_train(rows=(2,), columns=(2,), rank=1),
            None,
            "as many digits",
        ),
        (
            lambda: lowrank.tensor_train(rows=(2, 2), columns=(2, 2), rank=1),
            (5, 4),
            "digits must hold",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(rule: Any, w: Any, message: str) -> None:
    params = {"w": jnp.ones((1, 1) if w is None else w)}
    with pytest.raises(ValueError, match=message):
        rule().init(params)
