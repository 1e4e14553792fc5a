"""Truncated decompositions, rules of ranks, budgets: against NumPy in float64."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import lowrank
from tests.lift.programs import mesh
from tests.lowrank.weights import (
    CONV,
    STACK,
    best_product,
    decaying,
    draw,
    energy,
    run,
)

factor = jax.jit(lowrank.svd_weight, static_argnames=("rank", "axes"))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((8, 6), None), ((3, 6, 8), STACK), ((3, 3, 2, 7), CONV)],
    ids=["matrix", "stack", "kernel"],
)
def test_the_product_is_the_best_of_its_rank_and_balanced(
    shape: tuple[int, ...], axes: Any
) -> None:
    w = draw(0, *shape)
    leaf = factor(w, rank=2, axes=axes)
    flat = w.reshape(*shape[:1], *shape[1:]) if axes == STACK else w
    matrix = flat if flat.ndim == 3 else flat.reshape(-1, shape[-1])
    found = np.asarray(leaf.materialize()).reshape(matrix.shape)
    np.testing.assert_allclose(found, best_product(matrix, 2), atol=1e-5)
    left = np.asarray(leaf.left).reshape(*matrix.shape[:-1], 2)
    rows = np.linalg.norm(np.asarray(leaf.right), axis=-1)
    np.testing.assert_allclose(np.linalg.norm(left, axis=-2), rows, rtol=1e-4)


def test_random_projections_find_the_leading_triplets() -> None:
    """Two power iterations leave the error near the least; none leave it far."""
    w = decaying(0, 64, 48, rate=0.9)
    least = energy(w - best_product(w, 4))

    def error(power: int) -> float:
        u, s, vt = run(
            lambda w: lowrank.randomized_svd(
                w, 4, key=jax.random.key(0), oversample=2, power_iterations=power
            ),
            w,
        )
        np.testing.assert_allclose(u.T @ u, np.eye(4), atol=1e-4)
        return energy(w - (u * s[None]) @ vt) / least

    assert error(2) < 1.02
    assert error(0) > 1.05


def test_a_sharded_weight_is_not_gathered() -> None:
    """No device sees the whole of it: only thin matrices travel."""
    w = decaying(1, 256, 192)
    place = NamedSharding(mesh(), P(None, "d"))

    @jax.jit
    def fn(w: Any) -> Any:
        leaf = lowrank.svd_weight(w, 8, key=jax.random.key(0))
        return leaf.left, leaf.right

    abstract = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=place)
    compiled = fn.lower(abstract).compile()
    assert "f32[256,192]" not in compiled.as_text()
    left, right = compiled(jax.device_put(w, place))
    np.testing.assert_allclose(left @ right, best_product(w, 8), atol=1e-2)


def tail(s: np.ndarray, rank: int) -> float:
    return float(np.square(s[rank:]).sum() / np.square(s).sum())


@given(seed=st.integers(0, 1000), error=st.floats(0.0, 1.0))
def test_the_smallest_rank_of_an_error_is_the_smallest(seed: int, error: float) -> None:
    drawn = np.random.default_rng(seed).exponential(size=6).astype(np.float32)
    s = np.sort(drawn)[::-1]
    rank = max(lowrank._rank.smallest_rank(jnp.asarray(s), error), 1)
    assert tail(np.float64(s), rank) <= error**2 + 1e-9
    assert rank == 1 or tail(np.float64(s), rank - 1) > error**2 - 1e-9


def test_ranks_of_rules() -> None:
    w = jnp.diag(jnp.array([4.0, 2.0, 1.0, 1.0]))
    rank = lambda rule, w=w, **options: lowrank.rank_of(rule, w, **options)
    assert [rank(lowrank.by_energy(e)) for e in (0.5, 0.9, 0.95, 1.0)] == [1, 2, 3, 4]
    assert [rank(lowrank.by_error(e)) for e in (0.6, 0.4, 0.0, 5.0)] == [1, 2, 4, 1]
    assert rank(lowrank.by_ratio(1.0)) == 2
    assert rank(lowrank.by_ratio(0.01)) == 1
    assert rank(lowrank.by_bytes(3 * 8 * 4)) == 3
    assert rank(lowrank.by_bytes(10**9)) == 4
    stack = jnp.stack([w, jnp.eye(4)])
    assert rank(lowrank.by_energy(0.9), stack, axes=-2) == 4


def test_a_rank_for_each_path_and_one_that_is_missing() -> None:
    params = {"a": draw(0, 6, 6), "b": draw(1, 6, 6)}
    found = lowrank.svd(rank={"a": 1, "b": lowrank.by_ratio(0.7)}).init(params)[0]
    assert [leaf.rank for leaf in found.values()] == [1, 2]
    with pytest.raises(ValueError, match="no rank is given for 'b'"):
        lowrank.svd(rank={"a": 1}).init(params)


def test_rules_that_look_at_values_say_so_under_jit() -> None:
    scheme = lowrank.svd(rank=lowrank.by_energy(0.9))
    with pytest.raises(jax.errors.ConcretizationTypeError, match="outside jit"):
        jax.eval_shape(lambda w: scheme.init({"w": w})[0], draw(0, 6, 6))


def brute_force(values: list[np.ndarray], budget: int) -> float:
    """The least sum of relative errors of 6 x 6 weights, dense ones included."""
    error = lambda s, r: 0.0 if r == 0 else tail(s, r)
    cost = lambda r: 36 if r == 0 else 12 * r
    choices = itertools.product(range(3), repeat=len(values))
    return min(
        sum(error(s, r) for s, r in zip(values, ranks, strict=True))
        for ranks in choices
        if sum(map(cost, ranks)) <= budget
    )


@pytest.mark.parametrize("ratio", [0.6, 0.8])
def test_a_budget_is_met_and_spent_where_it_counts(ratio: float) -> None:
    params = {str(i): decaying(i, 6, 6, rate=r) for i, r in enumerate((0.2, 0.6, 0.9))}
    ranks = lowrank.allocate(params, "*", ratio=ratio)
    values = [np.linalg.svd(np.float64(w), compute_uv=False) for w in params.values()]
    spent = sum(12 * ranks[p] if p in ranks else 36 for p in params)
    assert spent <= ratio * 108
    found = sum(
        tail(s, ranks[p]) for p, s in zip(params, values, strict=True) if p in ranks
    )
    # Greedy: within the last step that no longer fitted.
    assert found <= brute_force(values, int(ratio * 108) - 24) + 1e-6
    assert found >= brute_force(values, int(ratio * 108)) - 1e-6


def test_factors_train_and_survive_an_optimizer() -> None:
    """`attach` calls init again, on weights that are factored already."""
    target = decaying(0, 8, 8) @ decaying(1, 8, 8) / 30
    scheme = lowrank.svd(rank=3)
    params, state = scheme.init({"w": decaying(0, 8, 8)})
    again, _ = scheme.init(params)
    assert again["w"] is params["w"]
    tx = optax.sgd(0.02)

    def loss(p: Any) -> jax.Array:
        return jnp.square(jc.materialize(scheme.view(p, state))["w"] - target).sum()

    def steps(p: Any) -> Any:
        def step(p: Any, _: None) -> Any:
            value, grads = jax.value_and_grad(loss)(p)
            return optax.apply_updates(p, tx.update(grads, tx.init(p))[0]), value

        return jax.lax.scan(step, p, None, length=200)

    trained, losses = run(steps, params)
    assert losses[-1] < 0.2 * losses[0]
    assert losses[-1] >= energy(target - best_product(target, 3)) * 0.99
    assert scheme.compress(trained, state)["w"] is trained["w"]


def test_a_lower_rank_or_another_structure_after_it_is_refused() -> None:
    w = {"w": draw(0, 8, 8)}
    for late in (lowrank.svd(rank=2), lowrank.tucker(ranks=(2, 2))):
        with pytest.raises(jc.OrderError, match="factor a weight once"):
            jc.chain(lowrank.svd(rank=4), late).init(w)
    with pytest.raises(jc.OrderError, match="structure first"):
        jc.chain(jc.prune.magnitude(sparsity=0.5), lowrank.svd(rank=2)).init(w)
    assert jc.chain(jc.identity(), lowrank.svd(rank=2)).init(w)[0]["w"].rank == 2


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (jnp.ones((4, 4)), {"rank": 5}, "rank must be from 1 to 4"),
        (jnp.ones(4), {"rank": 1}, "output axis"),
        (jnp.ones((2, 4, 4)), {"rank": 1}, "cannot be told"),
    ],
)
def test_what_cannot_be_factored_is_refused(w: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowrank.svd(**options).init({"w": w})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lowrank.svd(rank=0), "positive integer"),
        (lambda: lowrank.by_ratio(0.0), "ratio must be above 0"),
        (lambda: lowrank.by_energy(1.1), "energy must be from 0 to 1"),
        (lambda: lowrank.by_error(-0.1), "error must not be negative"),
        (lambda: lowrank.by_bytes(0), "size_bytes must be positive"),
        (lambda: lowrank.allocate({"w": jnp.ones((4, 4))}, "*"), "one of them"),
        (
            lambda: lowrank.allocate({"w": jnp.ones((4, 4))}, "*", size_bytes=1),
            "must hold rank 1",
        ),
        (
            lambda: lowrank.randomized_svd(jnp.ones((4, 4)), 5, key=jax.random.key(0)),
            "rank must be from 1 to 4",
        ),
    ],
)
def test_options_out_of_range_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
