"""Which weights a mask lets the gradient through to, and what is held at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.leaf import Transpose
from jaxcompress.prune import MaskedArray, PruneState
from jaxcompress.prune._masked import masked
from jaxcompress.prune._pattern import as_pattern
from jaxcompress.prune._training import everywhere, masked_training
from jaxcompress.quant import Integer

rng = np.random.default_rng(0)
W = rng.normal(size=(6, 4)).astype(np.float32)
X = rng.normal(size=(3, 6)).astype(np.float32)
MASK = rng.random((6, 4)) < 0.3
WIDER = MASK | (rng.random((6, 4)) < 0.5)
assert 3 < MASK.sum() < WIDER.sum() - 3 < 18


def slopes(f: Callable[[Any], jax.Array]) -> tuple[np.ndarray, np.ndarray]:
    """Of ``sum(f(w)^3)``: the value of `f`, and the derivative by `w`."""
    cubes = lambda w: ((y := f(w)) ** 3).sum() + 0 * y.sum()
    run = jax.jit(lambda w: (f(w), jax.grad(cubes)(w)))
    value, grad = run(jnp.asarray(W))
    return np.asarray(value), np.asarray(grad)


@pytest.mark.parametrize("backward", [None, WIDER, np.zeros_like(MASK)])
def test_the_forward_value_has_no_part_in_which_weights_get_a_gradient(
    backward: np.ndarray | None,
) -> None:
    allowed = None if backward is None else jnp.asarray(backward)
    leaf = lambda w: MaskedArray(inner=w, mask=MASK, backward=allowed)
    value, grad = slopes(lambda w: leaf(w).materialize())
    np.testing.assert_array_equal(value, np.where(MASK, W, 0))
    through = MASK if backward is None else backward
    expected = np.where(through, 3 * np.where(MASK, W, 0).astype(np.float64) ** 2, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_a_pruned_weight_gets_the_gradient_at_zero() -> None:
    target = jnp.asarray(rng.normal(size=W.shape), jnp.float32)
    leaf = lambda w: MaskedArray(inner=w, mask=MASK, backward=WIDER)
    loss = lambda w: ((leaf(w).materialize() - target) ** 2).sum()
    grad = jax.jit(jax.grad(loss))(jnp.asarray(W))
    expected = np.where(WIDER, 2 * (np.where(MASK, W, 0) - np.asarray(target)), 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)


OTHER = rng.random((6, 4)) < 0.5
OTHER_WIDER = OTHER | (rng.random((6, 4)) < 0.5)


@pytest.mark.parametrize(
    ("first", "second", "through"),
    [
        (WIDER, OTHER_WIDER, WIDER & OTHER_WIDER),
        (WIDER, None, WIDER & OTHER),
        (None, OTHER_WIDER, MASK & OTHER_WIDER),
    ],
    ids=["both", "first", "second"],
)
def test_masks_on_masks_let_through_what_both_do(
    first: Any, second: Any, through: np.ndarray
) -> None:
    def both(w: jax.Array) -> jax.Array:
        inside = MaskedArray(inner=w, mask=MASK, backward=first)
        leaf = inside.map_values(
            lambda a: MaskedArray(inner=a, mask=OTHER, backward=second)
        )
        assert isinstance(leaf, MaskedArray)
        return leaf.materialize()

    value, _ = slopes(both)
    np.testing.assert_array_equal(value, np.where(MASK & OTHER, W, 0))
    grad = jax.jit(jax.grad(lambda w: both(w).sum()))(jnp.asarray(W))
    np.testing.assert_array_equal(grad, through)


def test_a_mask_over_a_masked_value_intersects_backward_too() -> None:
    inside = masked(jnp.asarray(W), jnp.asarray(MASK), jnp.asarray(WIDER))
    assert masked(jnp.asarray(W), jnp.asarray(MASK)).backward is None
    found = masked(inside, jnp.asarray(OTHER))
    np.testing.assert_array_equal(found.backward, WIDER & OTHER)


DYNAMIC = jc.quant.int8(activations=jc.quant.dynamic(Integer(bits=8)))


@pytest.mark.parametrize("fmt", [jc.quant.int8(), DYNAMIC], ids=["weights", "both"])
@pytest.mark.parametrize("backward", [None, WIDER], ids=["kept", "wider"])
def test_a_quantized_weight_under_a_mask_has_no_gradient_outside(
    fmt: Any, backward: np.ndarray | None
) -> None:
    """By the params, and by the view itself, whose latent is what is trained."""
    through = MASK if backward is None else backward
    product = jc.lift(lambda w, x: x @ w)
    plain = MaskedArray(inner=jnp.asarray(W), mask=MASK, backward=backward)
    own = jc.quant.weights(fmt)
    _, state = own.init({"w": jnp.asarray(W)})
    view = lambda leaf: own.view({"w": leaf}, state)["w"]
    assert view(plain).traits.own_matmul == (fmt is DYNAMIC)

    def by_params(w: jax.Array) -> jax.Array:
        return product(view(plain.replace(inner=w)), jnp.asarray(X)).sum()

    def by_latent(latent: jax.Array) -> jax.Array:
        leaf = view(plain)
        return product(
            leaf.replace(inner=leaf.inner.replace(latent=latent)), jnp.asarray(X)
        ).sum()

    both = jax.jit(lambda w: (jax.grad(by_params)(w), jax.grad(by_latent)(w)))
    for grad in both(jnp.asarray(W)):
        np.testing.assert_array_equal(np.asarray(grad) != 0, through)
        sums = np.broadcast_to(X.sum(0)[:, None], W.shape)
        np.testing.assert_allclose(grad[through], sums[through], rtol=0.02, atol=0.02)


def test_layout_operations_and_specs_take_the_backward_mask_along() -> None:
    leaf = MaskedArray(
        inner=jnp.asarray(W), mask=jnp.asarray(MASK), backward=jnp.asarray(WIDER)
    )
    turned = leaf.relayout(Transpose(permutation=(1, 0)))
    assert isinstance(turned, MaskedArray)
    np.testing.assert_array_equal(turned.backward, WIDER.T)
    specs = leaf.component_specs(("d", None), {"d": 2})
    assert specs.backward == specs.mask == P("d", None)
    assert (
        leaf.replace(backward=None).component_specs((None, None), {}).backward is None
    )


def toggling(hold: bool) -> jc.Transform:
    """Masks that are `MASK` and `OTHER` in turn."""
    choose = lambda step: jnp.where(step % 2 == 0, MASK, OTHER)

    def first(params: Any, roles: Any) -> PruneState:
        del params, roles
        return PruneState({"w": (choose(0),)}, jnp.int32(0))

    def following(params: Any, grads: Any, roles: Any, state: PruneState) -> PruneState:
        del params, grads, roles
        return state._replace(masks={"w": (choose(state.step),)})

    pattern = as_pattern(0.5, "layer", "test")
    return masked_training(
        first,
        following,
        pattern,
        by="test",
        axes=None,
        backward=everywhere,
        hold=hold,
    )


@pytest.mark.parametrize("hold", [True, False])
def test_weights_that_come_back_start_at_zero_where_they_are_held(hold: bool) -> None:
    """An optimizer with dense gradients moves what is pruned before the update."""
    scheme = toggling(hold)
    params, state = scheme.init({"w": jnp.asarray(W)})
    moved = {"w": jnp.asarray(W + 1)}
    params, state = jax.jit(scheme.update)(moved, state)
    np.testing.assert_array_equal(state.masks["w"][0], OTHER)
    kept = np.where(MASK & OTHER, W + 1, 0) if hold else W + 1
    np.testing.assert_array_equal(params["w"], kept)


def test_two_states_overlap_by_their_common_weights() -> None:
    state = lambda *masks: PruneState(
        {"a": tuple(map(jnp.asarray, masks))}, jnp.int32(0)
    )
    found = jc.prune.mask_overlap(state(MASK, OTHER), state(OTHER, MASK))
    assert found.keys() == {"a"}
    assert float(found["a"]) == pytest.approx(
        (MASK & OTHER).sum() / (MASK | OTHER).sum()
    )
    nothing = np.zeros_like(MASK)
    assert float(jc.prune.mask_overlap(state(nothing), state(nothing))["a"]) == 1.0
    assert float(jc.prune.mask_overlap(state(nothing), state(MASK))["a"]) == 0.0


def test_masks_are_found_in_any_state_and_intersect() -> None:
    w = {"m": jnp.asarray(W), "b": jnp.ones(4)}
    half = jc.prune.random(sparsity=0.5, key=jax.random.key(0))
    scheme = jc.select({"m": jc.chain(half, jc.prune.magnitude(sparsity=0.5))})
    _, state = jax.jit(scheme.init)(w)
    one, two = (s.masks["m"][0] for s in state[0].state)
    assert jc.prune.masks((1.0, state)).keys() == {"m"}
    np.testing.assert_array_equal(jc.prune.masks((1.0, state))["m"][0], one & two)
    with pytest.raises(ValueError, match=r"prune\.masks: .* found no masks in tuple"):
        jc.prune.masks(())
    _, other = jax.jit(jc.select({"b": half}).init)(w)
    with pytest.raises(ValueError, match=r"prune\.mask_overlap: .* 'b' is in one"):
        jc.prune.mask_overlap(state, other)
