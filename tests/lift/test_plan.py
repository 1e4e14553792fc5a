"""`plan` foretells bytes, sites and every problem, and runs nothing."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

q = jc.quant
Struct = jax.ShapeDtypeStruct


def struct(*shape: int, dtype: Any = jnp.float32) -> Struct:
    return Struct(shape, dtype)


PARAMS = {
    "conv": struct(3, 3, 2, 8),
    "dense": struct(8, 6),
    "layers": struct(4, 6, 6),
    "embedding": struct(12, 6, dtype=jnp.bfloat16),
    "bias": struct(6),
}
IMAGES, TOKENS = struct(2, 5, 5, 2), struct(2, dtype=jnp.int32)


def model(p: Any, images: jax.Array, tokens: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(
        images, p["conv"], (1, 1), "VALID", dimension_numbers=layout
    )
    x = jnp.tanh(x.mean((1, 2)) @ p["dense"] + p["bias"][None])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return x + p["embedding"][tokens].astype(jnp.float32)


RULES = {
    "conv": q.int8(),
    "dense": jc.chain(jc.prune.magnitude(sparsity=0.5), q.int4()),
    "layers": q.int4(group_size=2),
    "embedding": q.int8(),
}
# Words, masks and scales, counted from the formats.
AFTER = {
    "bias": 6 * 4,
    "conv": 8 * 18 + 8 * 4,
    "dense": 6 * 1 + 24 // 2 + 6 * 4,
    "embedding": 12 * 6 + 12 * 4,
    "layers": 4 * 6 * (3 + 3 * 4),
}


def planned(rules: Any = RULES) -> Any:
    return jc.plan(model, PARAMS, IMAGES, TOKENS, rules=rules)


def test_bytes_are_those_counted_by_hand() -> None:
    plan = planned()
    assert plan.problems == ()
    assert {p.path: p.bytes_after for p in plan.leaves} == AFTER
    before = {"bias": 24, "conv": 576, "dense": 192, "embedding": 144, "layers": 576}
    assert {p.path: p.bytes_before for p in plan.leaves} == before
    assert plan.bytes_before == sum(before.values())
    assert plan.bytes_after == sum(AFTER.values())
    largest = 576
    assert plan.peak_bytes == plan.bytes_before + plan.bytes_after + 4 * largest


def test_bytes_shapes_and_methods_are_those_of_compress() -> None:
    compressed = jax.eval_shape(
        lambda p: jc.compress(p, RULES, fn=model, example=(IMAGES, TOKENS)), PARAMS
    )
    rows = jc.report.size(compressed).rows
    kept = lambda method: "kept" if method == "dense" else method
    assert [(p.path, p.shape, p.method, p.bytes_after) for p in planned().leaves] == [
        (r.path, r.shape, kept(r.method), r.memory_bytes) for r in rows
    ]


def test_concrete_parameters_give_the_same_plan() -> None:
    zeros = lambda s: jnp.zeros(s.shape, s.dtype)
    concrete = jc.plan(
        model,
        jax.tree.map(zeros, PARAMS),
        zeros(IMAGES),
        zeros(TOKENS),
        rules=RULES,
    )
    assert str(concrete) == str(planned())


def test_sites_say_what_each_weight_will_run_as() -> None:
    sites = {p.path: [(s.op, s.times) for s in p.sites] for p in planned().leaves}
    assert sites == {
        "bias": [],
        "conv": [("conv_general_dilated", 1)],
        "dense": [("dot_general", 1)],
        "embedding": [("gather", 1)],
        "layers": [("dot_general", 4)],
    }
    (site,) = planned({"dense": q.int8()}).leaves[2].sites
    assert site.how == "dequantized dot"
    (site,) = planned({"conv": q.int8()}).leaves[2].sites
    assert site.how == "dense"


def test_nothing_is_allocated_or_run() -> None:
    huge = struct(2**22, 2**21)
    plan = jc.plan(
        lambda w, x: x @ w, huge, struct(1, 2**22), rules={"": q.int4(group_size=128)}
    )
    assert plan.bytes_before == 2**45
    assert plan.bytes_after == 2**42 + 2**43 // 128 * 4


def test_bytes_that_depend_on_the_values_are_left_open() -> None:
    by_value = jc.prune.magnitude(sparsity=0.5, scope="global")
    plan = planned({"dense": by_value, "conv": q.int8()})
    after = {p.path: p.bytes_after for p in plan.leaves}
    assert after["dense"] is None
    assert after["conv"] == AFTER["conv"]
    assert plan.bytes_after is None
    assert plan.problems == ()
    assert "by value" in str(plan)
    known = plan.bytes_before + sum(a for a in after.values() if a is not None)
    assert plan.peak_bytes == known + 192 + 4 * 576


def test_what_is_compressed_already_keeps_its_bytes() -> None:
    once = jax.eval_shape(lambda p: jc.compress(p, {"dense": q.int4()}), PARAMS)
    plan = jc.plan(model, once, IMAGES, TOKENS, rules={"conv": q.int8()})
    dense = plan.leaves[2]
    assert (dense.path, dense.method) == ("dense", "int4")
    assert dense.bytes_before == dense.bytes_after == 6 * 4 + 6 * 4
    assert plan.problems == ()


def test_keyword_arguments_reach_the_function() -> None:
    fn = lambda p, x, *, transpose: x @ (p["w"].T if transpose else p["w"])
    params, x, rules = {"w": struct(8, 6)}, struct(1, 8), {"w": q.int8()}
    plan = jc.plan(fn, params, x, rules=rules, transpose=False)
    assert plan.bytes_after == 6 * 8 + 6 * 4
    plan = jc.plan(fn, params, struct(1, 6), rules=rules, transpose=True)
    assert plan.bytes_after == 6 * 8 + 8 * 4


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool], ids=["integers", "booleans"])
def test_numbers_that_the_function_casts(dtype: Any) -> None:
    fn = lambda p, x: x @ p["w"] * p["mask"].astype(jnp.float32)[None]
    params = {"w": struct(8, 6), "mask": struct(6, dtype=dtype)}
    plan = jc.plan(fn, params, struct(1, 8), rules={"w": q.int8()})
    assert plan.problems == ()
    assert plan.bytes_after == 6 * 8 + 6 * 4 + 6 * jnp.dtype(dtype).itemsize


def test_a_typed_key_among_the_parameters() -> None:
    fn = lambda p, x: x @ p["w"] + jax.random.normal(p["key"], (6,))[None]
    params = {"w": struct(8, 6), "key": jax.random.key(0)}
    plan = jc.plan(fn, params, struct(1, 8), rules={"w": q.int8()})
    assert {p.path: p.bytes_before for p in plan.leaves} == {"w": 192, "key": 8}


# -- problems


def troubled(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["grouped"]) @ p["twice"]
    return x @ (p["scaled"] * 2.0) + p["summed"].sum()


TROUBLE = {
    "grouped": struct(16, 8),
    "twice": struct(8, 4),
    "scaled": struct(4, 4),
    "summed": struct(3, 4, 4),
    "numbers": struct(4, dtype=jnp.int32),
    "idle": struct(4, 4),
}
TROUBLED_RULES = {
    "missing/*": q.int8(),
    "grouped": q.int4(group_size=5),
    "twice": q.int8(),
    jc.where("tw*"): q.int4(),
    "scaled": q.int8(),
    "summed": q.int8(),
    "numbers": q.int8(),
    "idle": q.int8(),
}
PROBLEMS = {
    "a rule without a match": r"rule 'missing/\*' matches nothing",
    "two rules for one leaf": "two rules match 'twice'",
    "a group that does not divide": "group_size must divide .* 'grouped', 16; got 5",
    "a weight made dense": "'scaled' is made dense by 'mul'",
    "axes that nothing tells": r"axes of 'summed', of shape \(3, 4, 4\), cannot be",
    "integers": "'numbers' is int32",
    "a weight without a site": "no site uses 'idle'",
}


def trouble(rules: Any = TROUBLED_RULES) -> Any:
    return jc.plan(troubled, TROUBLE, struct(2, 16), rules=rules)


@pytest.mark.parametrize("pattern", PROBLEMS.values(), ids=PROBLEMS)
def test_every_problem_is_reported_at_once(pattern: str) -> None:
    plan = trouble()
    assert len([p for p in plan.problems if re.search(pattern, p)]) == 1
    with pytest.raises(ValueError, match=pattern):
        plan.check()
    assert re.search(pattern, str(plan))


def test_check_counts_the_problems_and_lists_each_on_a_line() -> None:
    plan = trouble()
    with pytest.raises(ValueError, match="plan: ") as error:
        plan.check()
    first, *lines = str(error.value).splitlines()
    assert first == f"plan: {len(plan.problems)} problem(s):"
    assert lines == [f"- {problem}" for problem in plan.problems]


def test_check_of_a_plan_without_problems_is_the_plan() -> None:
    plan = planned()
    assert plan.check() is plan


def test_leaves_with_problems_are_counted_as_kept() -> None:
    plan = trouble({"grouped": q.int4(group_size=5), "twice": q.int8()})
    found = {p.path: (p.method, p.bytes_after) for p in plan.leaves}
    assert found["grouped"] == ("kept", 512)
    assert found["twice"] == ("int8", 4 * 8 + 4 * 4)


def test_a_chain_in_the_wrong_order_is_a_problem() -> None:
    rule = jc.chain(q.int4(), jc.prune.magnitude(sparsity=0.5))
    (problem,) = trouble({"twice": rule}).problems
    assert "at 'twice'" in problem
    assert "would undo it" in problem


def test_a_weight_that_is_used_elementwise_is_not_said_to_be_unused() -> None:
    assert trouble({"scaled": q.int8()}).problems == (
        "'scaled' is made dense by 'mul'",
    )


def test_two_rules_of_which_one_matches_nothing_are_told_apart() -> None:
    problems = trouble({"twic": q.int8(), "twice": q.int8()}).problems
    assert len(problems) == 1
    assert "'twic' matches nothing" in problems[0]
    assert "'twice'" in problems[0]


# -- the table


def test_the_table_has_a_line_for_each_leaf_the_totals_and_the_memory() -> None:
    plan = planned()
    header, *rows, total, memory = (re.split(r"  +", s) for s in str(plan).splitlines())
    assert header == ["weight", "shape", "method", "used by", "bytes", "after"]
    assert rows[0] == ["bias", "6", "kept", "no matmul", "24", "24"]
    assert rows[1][:3] == ["conv", "3x3x2x8", "int8"]
    assert rows[1][-2:] == ["576", "176"]
    assert [r[0] for r in rows] == sorted(PARAMS)
    assert total == ["total", f"{plan.bytes_before:,}", f"{plan.bytes_after:,}"]
    assert memory == [f"memory needed: {plan.peak_bytes:,} bytes"]


def test_problems_stand_at_the_end_of_the_table() -> None:
    plan = trouble()
    lines = str(plan).splitlines()[-len(plan.problems) :]
    assert lines == [f"problem: {problem}" for problem in plan.problems]


def test_shapes_of_numbers_in_the_tree_do_not_matter() -> None:
    fn = lambda p, x: x @ p["w"] * p["factor"]
    plan = jc.plan(
        fn, {"w": struct(8, 6), "factor": 2.0}, struct(1, 8), rules={"w": q.int8()}
    )
    assert plan.problems == ()
    assert plan.bytes_after == np.float32().nbytes + 6 * 8 + 6 * 4
