"""Which units go for a target, and structured pruning in one call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import prune

RNG = np.random.default_rng(1)
X = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"a": normal(3, 16), "b": normal(16, 12), "c": normal(12, 2)}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


GRAPH = prune.dependency_graph(mlp, PARAMS, X)


def count(units: dict[int, np.ndarray]) -> list[int]:
    return [int(gone.sum()) for gone in units.values()]


def test_group_norms_are_sums_over_all_members() -> None:
    first, second = GRAPH.removable
    a, b, c = (np.asarray(PARAMS[k], np.float64) for k in "abc")
    none = prune.group_norm(normalize="none")
    expected = (a**2).sum(0) + (b**2).sum(1)
    np.testing.assert_allclose(none(GRAPH, first, PARAMS), expected, rtol=1e-5)
    mean = prune.group_norm(order=1)(GRAPH, second, PARAMS)
    expected = np.abs(b).sum(0) + np.abs(c).sum(1)
    np.testing.assert_allclose(mean, expected / expected.mean(), rtol=1e-5)


def test_filter_norms_are_those_of_what_produces_a_unit() -> None:
    second = GRAPH.removable[1]
    found = prune.filter_norm(normalize="none")(GRAPH, second, PARAMS)
    np.testing.assert_allclose(found, np.abs(PARAMS["b"]).sum(0), rtol=1e-5)


def test_saliencies_are_summed_over_units() -> None:
    scores = jax.tree.map(lambda w: w * 2, PARAMS)
    second = GRAPH.removable[1]
    found = prune.saliency_sum(scores)(GRAPH, second, PARAMS)
    expected = 2 * (np.asarray(PARAMS["b"]).sum(0) + np.asarray(PARAMS["c"]).sum(1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"of 'b'; got nothing"):
        prune.saliency_sum({"a": scores["a"]})(GRAPH, second, PARAMS)


def test_scores_of_members_are_those_of_what_makes_a_unit() -> None:
    median = lambda w, axis: prune.scores.geometric_median(w, axis=axis)
    second = GRAPH.removable[1]
    importance = prune.member_score(median, normalize="none")
    found = importance(GRAPH, second, PARAMS)
    b = np.asarray(PARAMS["b"], np.float64)
    apart = np.linalg.norm(b[:, :, None] - b[:, None], axis=0).sum(0)
    np.testing.assert_allclose(found, apart, rtol=1e-5)
    with pytest.raises(ValueError, match=r"where='c' chooses no parameter that makes"):
        prune.member_score(median, "c")(GRAPH, second, PARAMS)


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("target", [{"parameters": 0.5}, {"flops": 0.4}])
def test_the_least_important_go_until_the_target_is_met(
    scope: Any, target: dict[str, float]
) -> None:
    units = prune.choose_units(GRAPH, PARAMS, scope=scope, **target)
    (name, fraction), cost = next(iter(target.items())), prune.Cost(GRAPH)
    assert getattr(cost(units), name) <= fraction * getattr(cost({}), name)
    importance = prune.group_norm()
    for group in GRAPH.removable:
        score, gone = importance(GRAPH, group, PARAMS), units[group.number]
        assert score[gone].max(initial=0.0) < score[~gone].min()


def test_no_more_goes_than_the_target_needs() -> None:
    units = prune.choose_units(GRAPH, PARAMS, flops=0.4)
    importance, cost = prune.group_norm(), prune.Cost(GRAPH)
    scores = {g.number: importance(GRAPH, g, PARAMS) for g in GRAPH.removable}
    last = max(scores, key=lambda n: scores[n][units[n]].max(initial=0.0))
    kept = scores[last][units[last]].max()
    fewer = {**units, last: units[last] & (scores[last] != kept)}
    assert cost(fewer).flops > 0.4 * cost({}).flops


def test_the_same_fraction_of_every_group_goes() -> None:
    units = prune.choose_units(GRAPH, PARAMS, flops=0.4, scope="group")
    fractions = [n / len(u) for n, u in zip(count(units), units.values(), strict=True)]
    assert abs(fractions[0] - fractions[1]) < 1 / 12 + 1e-9


def test_what_is_left_is_a_multiple() -> None:
    units = prune.choose_units(GRAPH, PARAMS, parameters=0.6, round_to=4)
    assert {len(u) - n for n, u in zip(count(units), units.values(), strict=True)} <= {
        *(4, 8, 12, 16)
    }


def test_where_sizes_are_rounded_what_the_target_leaves_room_for_stays() -> None:
    units = prune.choose_units(GRAPH, PARAMS, parameters=0.55, round_to=4)
    cost = prune.Cost(GRAPH)
    assert cost(units).parameters <= 0.55 * cost({}).parameters
    for number, gone in units.items():
        back = np.flatnonzero(gone)[:4]
        fewer = gone.copy()
        fewer[back] = False
        more = cost({**units, number: fewer}).parameters
        assert not len(back) or more > 0.55 * cost({}).parameters


def test_a_measured_cost_is_a_target_too() -> None:
    cost = prune.Cost(GRAPH)
    seconds = lambda units: float(cost(units).flops) * 1e-9
    measured = prune.choose_units(GRAPH, PARAMS, measured=(0.4, seconds))
    counted = prune.choose_units(GRAPH, PARAMS, flops=0.4)
    assert count(measured) == count(counted)


def test_only_the_groups_asked_for_shrink() -> None:
    second = GRAPH.removable[1]
    units = prune.choose_units(GRAPH, PARAMS, parameters=0.7, groups=[second.number])
    assert set(units) == {second.number}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one target"),
        ({"flops": 0.5, "parameters": 0.5}, "give one target"),
        ({"flops": 1.5}, r"in \(0, 1\); got \[1.5\]"),
        ({"flops": 0.5, "keep_at_least": 1.0}, "keep_at_least must be in"),
        ({"flops": 0.5, "round_to": 0}, "round_to must be positive"),
        ({"flops": 0.5, "scope": "model"}, "scope must be 'global' or 'group'"),
        (
            {"flops": 0.01},
            r"flops=0.01 is out of reach: .* 0\.\d+ of the flops are left",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"prune: .*{message}"):
        prune.choose_units(GRAPH, PARAMS, **options)


def test_a_group_that_cannot_be_removed_is_named() -> None:
    fixed = next(g.number for g in GRAPH.groups if g.fixed)
    with pytest.raises(ValueError, match=rf"group {fixed} \(.*\) cannot be removed: a"):
        prune.choose_units(GRAPH, PARAMS, flops=0.5, groups=[fixed])
    one = {"a": PARAMS["a"]}
    whole = prune.dependency_graph(lambda p, x: x @ p["a"], one, X)
    with pytest.raises(ValueError, match="no group that can be removed"):
        prune.choose_units(whole, one, flops=0.5)


def test_one_call_gives_the_users_own_function_where_it_fits() -> None:
    smaller = prune.structured(mlp, PARAMS, X, parameters=0.5)
    assert smaller.fn is mlp
    left = sum(w.size for w in jax.tree.leaves(smaller.params))
    assert left == smaller.after.parameters <= 0.5 * smaller.before.parameters
    expected = mlp(smaller.removal.mask(PARAMS), X)
    np.testing.assert_allclose(mlp(smaller.params, X), expected, rtol=1e-5, atol=1e-6)


def test_sizes_that_the_function_states_are_replaced() -> None:
    def heads(p: Any, x: jax.Array) -> jax.Array:
        y = (x @ p["a"]).reshape(2, 4, -1)  # With fewer heads: four of other sizes.
        y = y * jax.nn.sigmoid(y[..., :1])
        return y.reshape(2, -1) @ p["d"]

    params = {"a": PARAMS["a"], "d": normal(16, 2)}
    graph = prune.dependency_graph(heads, params, X)
    (number,) = (g.number for g in graph.removable if g.size == 4)
    smaller = prune.structured(heads, params, X, parameters=0.6, groups=[number])
    assert smaller.fn is not heads
    expected = heads(smaller.removal.mask(params), X)
    found = smaller.fn(smaller.params, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
