"""SR-STE: equation 9 term by term, and masks from the weights as they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.jitted import run

rng = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def kept(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """The `n` largest of every `m` inputs of an output."""
    mask = np.zeros(w.shape, bool)
    for o in range(w.shape[1]):
        for start in range(0, w.shape[0], m):
            group = range(start, min(start + m, w.shape[0]))
            for i in sorted(group, key=lambda i: -abs(float(w[i, o])))[:n]:
                mask[i, o] = True
    return mask


X, TARGET = draw(16, 12), draw(16, 5)


@pytest.mark.parametrize(("n", "m", "decay"), [(2, 4, 0.3), (1, 4, 0.0), (1, 2, 2e-4)])
def test_the_gradient_is_that_of_equation_9(n: int, m: int, decay: float) -> None:
    w = draw(12, 5)
    scheme = jc.prune.sr_ste(n=n, m=m, decay=decay)

    def gradient(params: Any) -> Any:
        params, state = scheme.init(params)

        def loss(p: Any) -> jax.Array:
            y = jnp.asarray(X) @ scheme.view(p, state)["w"].materialize()
            return ((y - TARGET) ** 2).sum()

        return jax.grad(loss)(params)

    start = {"w": jnp.asarray(w)}
    grad = np.asarray(jax.jit(gradient)(start)["w"])
    mask = kept(w, n, m)
    masked = np.where(mask, w, 0).astype(np.float64)
    dense = 2 * X.T.astype(np.float64) @ (X @ masked - TARGET)
    np.testing.assert_allclose(grad, dense + decay * ~mask * w, rtol=1e-4, atol=1e-5)
    if decay == 0.3:
        assert np.abs(grad - dense)[~mask].max() > 0.1


def test_a_weight_used_twice_decays_once() -> None:
    scheme = jc.prune.sr_ste(decay=0.5)
    params = {"w": jnp.asarray(draw(8, 3))}

    def gradient(params: Any) -> Any:
        params, state = scheme.init(params)
        view = lambda p: scheme.view(p, state)["w"].materialize()
        loss = lambda p: (2.0 * (w := view(p))).sum() + w.sum()
        return jax.grad(loss)(params)["w"]

    grad = jax.jit(gradient)(params)
    w = np.asarray(params["w"])
    np.testing.assert_allclose(grad, 3 + 0.5 * ~kept(w, 2, 4) * w, rtol=1e-6)


def test_masks_follow_the_weights_which_stay_dense() -> None:
    scheme = jc.prune.sr_ste()
    start = {"w": jnp.asarray(draw(12, 5))}
    params, state = jax.jit(scheme.init)(start)
    update = jax.jit(scheme.update)
    for _ in range(3):
        before = np.asarray(state.masks["w"][0])
        w = draw(12, 5)
        params, state = update({"w": jnp.asarray(w)}, state)
        np.testing.assert_array_equal(params["w"], w)
        np.testing.assert_array_equal(state.masks["w"][0], kept(w, 2, 4))
        assert (before != kept(w, 2, 4)).any()

    def stored(params: Any, state: Any) -> tuple[Any, jax.Array]:
        leaf = scheme.compress(params, state)["w"]
        return leaf, leaf.materialize()

    leaf, dense = run(stored, params, state)
    assert leaf.method == "2:4 dense"
    np.testing.assert_array_equal(dense, np.where(kept(w, 2, 4), w, 0))


def test_the_second_term_settles_which_weights_are_masked() -> None:
    """Without it a hidden weight that wants to grow swaps places in every step."""
    target = jnp.asarray(draw(16, 8))
    start = {"w": jnp.asarray(draw(16, 8))}

    def swaps(decay: float) -> int:
        scheme = jc.prune.sr_ste(decay=decay)

        def step(carry: Any, _: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            value = lambda p: scheme.view(p, state)["w"].materialize()
            grads = jax.grad(lambda p: ((value(p) - target) ** 2).sum())(params)
            moved = jax.tree.map(lambda w, g: w - 0.05 * g, params, grads)
            after = scheme.update(moved, state)
            return after, (state.masks["w"][0] != after[1].masks["w"][0]).sum()

        run = lambda start: jax.lax.scan(step, scheme.init(start), length=60)[1]
        return int(jax.jit(run)(start)[30:].sum())

    assert swaps(1.0) < swaps(0.0) / 2


def test_bfloat16_weights_keep_their_dtype() -> None:
    scheme = jc.prune.sr_ste(decay=0.5)

    def gradient(params: Any) -> Any:
        params, state = scheme.init(params)
        return jax.grad(lambda p: scheme.view(p, state)["w"].materialize().sum())(
            params
        )

    params = {"w": jax.ShapeDtypeStruct((8, 3), jnp.bfloat16)}
    assert jax.eval_shape(gradient, params)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -1.0}, r"prune\.sr_ste: decay .* got -1\.0"),
        ({"decay": float("inf")}, r"prune\.sr_ste: decay .* got inf"),
        ({"n": 4}, "n .* got 4"),
        ({"m": 5}, "m .* got 5"),
        ({"every": 0}, r"prune\.sr_ste: every .* got 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jc.prune.sr_ste(**options)
