"""Gates between factors: what they start as, how they close, what is dropped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import lowrank
from tests.lowrank.weights import STACK, decaying, draw, run

SIZE = 6


def start(rank: int | None = None) -> tuple[jc.Transform, Any, Any]:
    scheme = lowrank.gated(rank=rank)
    return scheme, *scheme.init({"w": decaying(0, SIZE, SIZE)})


def test_open_gates_give_the_weight_itself() -> None:
    scheme, params, state = start()
    np.testing.assert_array_equal(params["w"].gate, np.ones(SIZE))
    dense = jc.materialize(scheme.view(params, state))["w"]
    np.testing.assert_allclose(dense, decaying(0, SIZE, SIZE), atol=1e-5)
    assert str(params["w"]) == f"LowRankArray(rank {SIZE} gated, float32[6, 6])"


def test_gates_are_held_to_the_unit_interval_in_view_update_and_storage() -> None:
    scheme, params, state = start(rank=3)
    off = params["w"].replace(gate=jnp.array([1.5, -0.5, 0.25]))
    clipped = jnp.array([1.0, 0.0, 0.25])
    viewed = scheme.view({"w": off}, state)["w"]
    np.testing.assert_array_equal(viewed.gate, clipped)
    after, _ = scheme.update({"w": off}, state)
    np.testing.assert_array_equal(after["w"].gate, clipped)
    stored = scheme.compress({"w": off}, state)["w"]
    np.testing.assert_array_equal(stored.gate, [1.0, 0.25])
    np.testing.assert_allclose(stored.materialize(), viewed.materialize(), atol=1e-6)
    assert stored.stored_bytes == 4 * (2 * SIZE * 2 + 2)


def test_a_stack_drops_what_is_closed_everywhere_and_pads_the_rest() -> None:
    scheme = jc.select({"*": lowrank.gated(rank=4)}, axes={"w": STACK})
    params, state = scheme.init({"w": draw(0, 2, 5, 6)})
    gates = jnp.array([[0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.7, 0.0]])
    params["w"] = params["w"].replace(gate=gates)
    stored = scheme.compress(params, state)["w"]
    assert (stored.rank, stored.shape) == (2, (2, 5, 6))
    np.testing.assert_array_equal(stored.gate[0], [1.0, 0.5])
    np.testing.assert_array_equal(np.sort(stored.gate[1]), np.float32([0.0, 0.7]))
    expected = params["w"].materialize()
    np.testing.assert_allclose(stored.materialize(), expected, atol=1e-5)


def test_the_penalty_counts_weights_and_has_the_same_slope_everywhere() -> None:
    _, params, _ = start(rank=3)
    gate = jnp.array([1.0, 0.5, 0.0])
    penalty = lambda gate: lowrank.gate_penalty({"w": params["w"].replace(gate=gate)})
    assert float(penalty(gate)) == pytest.approx(1.5 * 2 * SIZE)
    np.testing.assert_allclose(jax.grad(penalty)(gate), [2 * SIZE] * 3)
    with pytest.raises(ValueError, match="no gates"):
        lowrank.gate_penalty({"w": jnp.ones(3)})


@pytest.mark.parametrize(("strength", "kept"), [(0.0, 2), (3e-3, 2)])
def test_a_penalty_closes_the_gates_that_the_target_does_not_need(
    strength: float, kept: int
) -> None:
    """Of a target of rank 2 and small noise: but not without the penalty."""
    target = draw(0, SIZE, 2) @ draw(1, 2, SIZE)
    scheme = lowrank.gated()
    params, state = scheme.init({"w": target + 0.05 * draw(2, SIZE, SIZE)})
    factors = params["w"]
    tx = optax.adam(1e-2)

    def loss(gate: jax.Array) -> jax.Array:
        p = {"w": factors.replace(gate=gate)}
        dense = jc.materialize(scheme.view(p, state))["w"]
        return jnp.square(dense - target).sum() + strength * lowrank.gate_penalty(p)

    def steps(gate: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> Any:
            gate, opt = carry
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = tx.update(jax.grad(loss)(gate), opt, gate)
            p = {"w": factors.replace(gate=optax.apply_updates(gate, updates))}
            return (scheme.update(p, state)[0]["w"].gate, opt), None

        return jax.lax.scan(step, (gate, tx.init(gate)), None, length=300)[0][0]

    gate = run(steps, factors.gate)
    stored = scheme.compress({"w": factors.replace(gate=gate)}, state)["w"]
    assert (stored.rank == kept) == (strength > 0)


def test_dropping_ranks_under_jit_says_why_not() -> None:
    scheme, params, state = start(rank=2)
    with pytest.raises(jax.errors.ConcretizationTypeError, match="outside jit"):
        jax.eval_shape(scheme.compress, params, state)


def test_gates_come_first_and_once() -> None:
    w = {"w": draw(0, SIZE, SIZE)}
    with pytest.raises(jc.OrderError, match="factor a weight once"):
        jc.chain(lowrank.svd(rank=2), lowrank.gated()).init(w)
    scheme, params, _ = start(rank=2)
    assert scheme.init(params)[0]["w"] is params["w"]
