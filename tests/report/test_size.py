"""Sizes counted by hand, from the layout of each format."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

q = jc.quant
half = jc.prune.magnitude(sparsity=0.5)


def weight(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


def abstract(*rules: Any, shape: tuple[int, ...] = (16, 6)) -> Any:
    """The stored form of a weight, as shapes and dtypes alone."""
    scheme = jc.chain(*rules)
    w = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    return jax.eval_shape(lambda p: scheme.compress(*scheme.init(p)), w)


@functools.cache
def tree() -> dict[str, Any]:
    quantize = jax.jit(lambda w: q.quantize(w, q.int4(group_size=8)))
    return {"w": quantize(weight(16, 6)), "b": [weight(6, dtype=jnp.bfloat16)]}


# Six outputs of 16 inputs each: bytes of words and masks, then of scales.
BYTES = {
    "int8": ([q.int8()], 6 * 16 + 6 * 4),
    "int4": ([q.int4()], 6 * 8 + 6 * 4),
    "int3": ([q.int3()], 6 * 6 + 6 * 4),
    "int4 g8": ([q.int4(group_size=8)], 6 * 8 + 6 * 2 * 4),
    "int4 per tensor": ([q.int4(granularity=q.PerTensor())], 6 * 8 + 4),
    "bfloat16 scales": ([q.int4(scale_dtype=jnp.bfloat16)], 6 * 8 + 6 * 2),
    "zero points": ([q.int4(symmetric=False)], 6 * 8 + 6 * 4 + 6),
    "nvfp4": ([q.nvfp4()], 6 * 8 + 6 * 1 + 4),
    "bitmask": ([half], 6 * 2 + 48 * 4),
    "bitmask of int4": ([half, q.int4()], 6 * 2 + 48 // 2 + 6 * 4),
    "nothing": ([jc.identity()], 6 * 16 * 4),
}


@pytest.mark.parametrize(("rules", "expected"), BYTES.values(), ids=BYTES)
def test_memory_is_words_and_scales_and_masks(rules: list[Any], expected: int) -> None:
    report = jc.report.size(abstract(*rules))
    (row,) = report.rows
    assert (row.path, row.shape, row.weights) == ("w", (16, 6), 96)
    assert row.memory_bytes == report.memory_bytes == expected
    assert row.bits_per_weight == report.bits_per_weight == 8 * expected / 96


def test_codes_are_padded_to_whole_bytes_of_each_output() -> None:
    report = jc.report.size(abstract(q.int3(), shape=(13, 5)))
    assert report.memory_bytes == 5 * 5 + 5 * 4


def test_totals_add_up() -> None:
    report = jc.report.size(tree())
    assert [(r.path, r.method, r.shape) for r in report.rows] == [
        ("b/0", "dense", (6,)),
        ("w", "int4 g8", (16, 6)),
    ]
    assert report.weights == 6 + 96
    assert report.memory_bytes == 12 + (48 + 48)
    assert report.dense_bytes == 4 * (6 + 96)
    assert report.bits_per_weight == 8 * 108 / 102


def test_disk_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "all", tree())
    jc.io.save(tmp_path / "one", {"w": tree()["w"]})
    jc.io.save(tmp_path / "none", {})
    size = lambda name: (tmp_path / name).stat().st_size
    report = jc.report.size(tree())
    assert report.disk_bytes == size("all")
    assert report.rows[1].disk_bytes == size("one") - size("none")
    assert report.ratio == 4 * 102 / size("all")


def test_an_abstract_tree_has_the_size_of_a_concrete_one() -> None:
    assert jc.report.size(jax.eval_shape(tree)) == jc.report.size(tree())


def test_a_small_ratio_tells_that_a_file_is_larger_than_the_weights() -> None:
    report = jc.report.size({"w": weight(2)})
    assert report.ratio == 8 / report.disk_bytes < 1


def test_an_empty_tree_has_no_size_but_its_file() -> None:
    report = jc.report.size({})
    assert (report.weights, report.memory_bytes, report.bits_per_weight) == (0, 0, 0.0)
    assert report.disk_bytes == jc.io.file_bytes({})


def test_numbers_and_text_weigh_nothing_in_memory() -> None:
    report = jc.report.size({"n": 0.5, "s": "text", "none": None, "w": weight(2)})
    assert {r.path: r.memory_bytes for r in report.rows} == {"n": 0, "s": 0, "w": 8}


def test_typed_keys_are_counted() -> None:
    report = jc.report.size({"key": jax.random.key(0)})
    assert report.memory_bytes == jax.random.key_data(jax.random.key(0)).nbytes


def test_the_table_has_a_line_for_each_leaf_and_the_total() -> None:
    report = jc.report.size(tree())
    header, *rows, total = (re.split(r"  +", s) for s in str(report).splitlines())
    assert header[:5] == ["weight", "shape", "method", "bits/weight", "memory"]
    assert [r[:5] for r in rows] == [
        ["b/0", "6", "dense", "16.00", "12"],
        ["w", "16x6", "int4 g8", "8.00", "96"],
    ]
    disk = f"{report.disk_bytes:,}"
    assert total == ["total", "102", "8.47", "108", disk, f"{report.ratio:.1f}x"]


def test_the_columns_of_the_table_are_aligned() -> None:
    lines = str(jc.report.size({"a": weight(2), "long/path": weight(16, 6)})).split(
        "\n"
    )
    column = lines[0].index("method")
    assert [line[column : column + 5] for line in lines[1:-1]] == ["dense", "dense"]


def test_the_dict_is_json() -> None:
    report = jc.report.size(tree())
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["rows"][1] == {
        "path": "w",
        "method": "int4 g8",
        "shape": [16, 6],
        "weights": 96,
        "memory_bytes": 96,
        "disk_bytes": report.rows[1].disk_bytes,
        "bits_per_weight": 8.0,
    }
    totals = ("weights", "memory_bytes", "disk_bytes", "dense_bytes", "ratio")
    assert [read[k] for k in totals] == [getattr(report, k) for k in totals]


# -- sparsity


def test_sparsity_counts_exact_zeros_of_either_sign() -> None:
    a = jnp.array([0.0, -0.0, 1e-30, 1.0], jnp.float32)
    b = jnp.array([0, 3, 0, 0], jnp.int8)
    assert jc.report.sparsity({"a": a, "b": [b]}) == {"a": 0.5, "b/0": 0.75}


def test_sparsity_of_a_leaf_is_that_of_its_dense_value() -> None:
    w = jnp.arange(1.0, 17.0, dtype=jnp.float32).reshape(16, 1)
    mask = w % 4 == 0
    masked = jc.prune.MaskedArray(inner=w, mask=mask)
    coarse = jax.jit(lambda w: q.quantize(w, q.int2()))(w)  # Of -1, 0 and 1 times 16.
    found = jc.report.sparsity({"masked": masked, "coarse": coarse})
    assert found == {"masked": 12 / 16, "coarse": 8 / 16}


def test_sparsity_of_many_zeros_is_exact_in_low_precision() -> None:
    w = jnp.concatenate([jnp.zeros(3001), jnp.ones(999)]).astype(jnp.bfloat16)
    assert jc.report.sparsity({"w": w}) == {"w": pytest.approx(3001 / 4000, rel=1e-6)}


@pytest.mark.parametrize(
    "make",
    [lambda: 0.5, lambda: "text", lambda: jax.random.key(0), lambda: jnp.zeros((0,))],
    ids=["number", "text", "typed key", "empty array"],
)
def test_sparsity_of_the_weights_beside_anything_else(make: Any) -> None:
    found = jc.report.sparsity({"w": jnp.array([0.0, 1.0]), "other": make()})
    assert found["w"] == 0.5
