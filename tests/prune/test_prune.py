"""Magnitude and random pruning against a stable sort, over time and over leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.prune import MaskedArray
from jaxcompress.prune._masked import masked
from jaxcompress.values import Oriented

KEY = jax.random.key(0)


def halves(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/2 from -2 to 2: zeros and many ties."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32) / 2


def lower(kept: np.ndarray, w: np.ndarray, count: int) -> np.ndarray:
    """Prune to `count`: what is pruned goes first, then the smallest, then the first.

    A stable sort keeps ties in order of position.
    """
    order = np.argsort(np.where(kept, np.abs(w), -1.0), axis=None, kind="stable")
    mask = np.ones(w.size, bool)
    mask[order[:count]] = False
    return mask.reshape(w.shape)


def pruned(w: np.ndarray, sparsity: float) -> np.ndarray:
    count = int(np.floor(np.float64(sparsity) * w.size + 0.5))
    return lower(np.ones(w.shape, bool), w, count)


def masks(scheme: jc.Transform, params: Any) -> dict[str, np.ndarray]:
    _, state = jax.jit(scheme.init)(params)
    return {path: np.asarray(mask) for path, (mask,) in state.masks.items()}


@pytest.mark.parametrize(
    ("sparsity", "dtype"),
    [
        (0.0, jnp.float32),
        (0.3, jnp.float32),
        (0.5, jnp.bfloat16),
        (0.99, jnp.float32),
    ],
)
def test_the_smallest_weights_go_ties_in_order_of_position(
    sparsity: float, dtype: Any
) -> None:
    w = halves(0, 7, 5)
    found = masks(jc.prune.magnitude(sparsity=sparsity), {"w": jnp.asarray(w, dtype)})
    np.testing.assert_array_equal(found["w"], pruned(w, sparsity))


def test_both_zeros_rank_alike() -> None:
    w = jnp.array([[0.0, 1.0, -0.0, 0.0]])
    found = masks(jc.prune.magnitude(sparsity=0.5), {"w": w})
    assert found["w"].tolist() == [[False, True, False, True]]


def test_each_layer_of_a_stack_is_ranked_apart() -> None:
    w = halves(1, 3, 4, 5) * np.float32([1, 8, 64])[:, None, None]
    found = masks(jc.prune.magnitude(sparsity=0.4, axes=-2), {"w": jnp.asarray(w)})
    np.testing.assert_array_equal(found["w"], [pruned(layer, 0.4) for layer in w])


def test_the_axes_of_a_convolution_are_ranked_together() -> None:
    w = halves(1, 3, 4, 5) * np.float32([1, 8, 64])[:, None, None]
    scheme = jc.prune.magnitude(sparsity=0.4, axes=(-3, -2))
    found = masks(scheme, {"w": jnp.asarray(w)})
    np.testing.assert_array_equal(found["w"], pruned(w, 0.4))


def test_global_scope_ranks_all_leaves_together() -> None:
    a, b = halves(2, 6, 4), 2 * halves(3, 3, 5)
    together = pruned(np.concatenate([a.ravel(), b.ravel()]), 0.5)
    scheme = jc.prune.magnitude(sparsity=0.5, scope="global")
    found = masks(scheme, {"a": jnp.asarray(a), "b": jnp.asarray(b)})
    np.testing.assert_array_equal(found["a"].ravel(), together[: a.size])
    np.testing.assert_array_equal(found["b"].ravel(), together[a.size :])
    assert found["a"].mean() < 0.5 < found["b"].mean()


def lamp_of(w: np.ndarray) -> np.ndarray:
    """Squares over the sum of those that a stable sort puts behind."""
    squares = np.square(w.astype(np.float64)).ravel()
    order = np.argsort(squares, kind="stable")
    share = np.empty(w.size)
    share[order] = squares[order] / np.cumsum(squares[order][::-1])[::-1]
    return share.reshape(w.shape)


def test_lamp_ranks_the_shares_of_all_layers_together() -> None:
    """One layer is a hundred times smaller, one decays fast; none is emptied."""
    rng = np.random.default_rng(8)
    layers = rng.normal(size=(2, 6, 5)).astype(np.float32)
    params = {
        "small": rng.normal(size=(8, 5)).astype(np.float32) / 100,
        "steep": np.float32(0.7) ** np.arange(40, dtype=np.float32).reshape(8, 5),
        "stack": layers * np.float32([1, 50])[:, None, None],
    }
    axes = {"stack": jc.Axes(contract=(-2,), stack=1)}
    scheme = jc.select({"*": jc.prune.lamp(sparsity=0.6)}, axes=axes)
    _, (chosen,) = jax.jit(scheme.init)(jax.tree.map(jnp.asarray, params))
    found = {path: np.asarray(m) for path, (m,) in chosen.state.masks.items()}
    score = {p: lamp_of(w) for p, w in params.items() if p != "stack"}
    score["stack"] = np.stack([lamp_of(w) for w in params["stack"]])
    together = np.sort(np.concatenate([s.ravel() for s in score.values()]))
    for path, s in score.items():
        np.testing.assert_array_equal(found[path], s >= together[84], err_msg=path)
    assert found["small"].sum() > found["steep"].sum() > 0
    with pytest.raises(ValueError, match=r"prune\.lamp: sparsity must be a fraction"):
        jc.prune.lamp(sparsity=jc.prune.nm(2, 4))  # type: ignore[arg-type]


def test_given_scores_decide_on_a_schedule_whatever_the_weights() -> None:
    scores = halves(9, 7, 5)
    cubic, formula = SCHEDULES["cubic"]
    scheme = jc.prune.by_scores({"a": {"w": scores}}, sparsity=cubic, every=2)
    params, state = jax.jit(scheme.init)({"a": {"w": jnp.asarray(halves(4, 7, 5))}})
    update = jax.jit(scheme.update)
    for t in range(1, 7):
        params, state = update(jax.tree.map(lambda w: 1.0 - w, params), state)
        share = np.floor(formula(t - t % 2) * 35 + 0.5)
        order = np.argsort(scores, axis=None, kind="stable")
        gone = np.flatnonzero(~np.asarray(state.masks["a/w"][0]))
        np.testing.assert_array_equal(gone, np.sort(order[: int(share)]))
    assert not np.asarray(params["a"]["w"]).ravel()[gone].any()


def test_scores_must_fit_the_weights() -> None:
    scheme = jc.prune.by_scores({"w": jnp.ones((2, 3))}, sparsity=0.5)
    with pytest.raises(ValueError, match=r"no scores for 'v', only for \['w'\]"):
        scheme.init({"v": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"got \(2, 3\) for 'w' of shape \(3, 2\)"):
        scheme.init({"w": jnp.ones((3, 2))})


def test_random_masks_depend_on_the_path_and_the_key_alone() -> None:
    w = jnp.ones((32, 16))
    scheme = jc.prune.random(sparsity=0.3, key=KEY)
    alone = masks(scheme, {"a": w})["a"]
    beside = masks(scheme, {"0": jnp.ones((3, 2)), "a": -w, "b": w})
    other = masks(jc.prune.random(sparsity=0.3, key=jax.random.key(1)), {"a": w})["a"]
    np.testing.assert_array_equal(beside["a"], alone)
    assert (beside["b"] != alone).any()
    assert (other != alone).any()


def test_random_masks_are_exact_and_spread_evenly() -> None:
    found = masks(jc.prune.random(sparsity=0.25, key=KEY), {"w": jnp.ones((64, 64))})
    gone = ~found["w"]
    assert gone.sum() == 1024
    # A quarter of 512 with a standard deviation below 10, for each of 8 bands.
    assert np.abs(gone.reshape(8, 512).sum(1) - 128).max() < 50
    assert np.abs(gone.T.reshape(8, 512).sum(1) - 128).max() < 50


SCHEDULES: dict[str, tuple[Any, Callable[[int], float]]] = {
    "one_shot": (
        jc.schedules.one_shot(0.6, at=3),
        lambda t: 0.6 if t >= 3 else 0.0,
    ),
    "linear": (
        jc.schedules.linear(0.1, 0.8, begin=1, end=5),
        lambda t: float(np.interp(t, [1, 5], [0.1, 0.8])),
    ),
    "cubic": (
        jc.schedules.cubic(0.0, 0.9, begin=0, end=6),
        lambda t: 0.9 - 0.9 * (1 - min(t / 6, 1.0)) ** 3,
    ),
}


@pytest.mark.parametrize(
    ("name", "every"), [("one_shot", 1), ("linear", 1), ("cubic", 1), ("cubic", 3)]
)
def test_masks_follow_the_schedule_while_weights_move(name: str, every: int) -> None:
    schedule, formula = SCHEDULES[name]
    scheme = jc.prune.magnitude(sparsity=schedule, every=every)
    update = jax.jit(scheme.update)
    w = halves(4, 7, 5)
    params, state = scheme.init({"w": jnp.asarray(w)})
    kept = pruned(w, formula(0))
    for t in range(1, 9):
        w = np.asarray(params["w"]) + halves(10 + t, 7, 5)
        if t % every == 0:
            before = kept
            kept = lower(kept, w, int(np.floor(formula(t) * w.size + 0.5)))
            assert not (kept & ~before).any()
        params, state = update({"w": jnp.asarray(w)}, state)
        np.testing.assert_array_equal(state.masks["w"][0], kept)
        np.testing.assert_array_equal(params["w"], np.where(kept, w, 0))
    assert int(state.step) == 8


@pytest.mark.parametrize(
    "scheme",
    [
        lambda s: jc.prune.magnitude(sparsity=s),
        lambda s: jc.prune.magnitude(sparsity=s, scope="global"),
        lambda s: jc.prune.random(sparsity=s, key=KEY),
    ],
    ids=["magnitude", "global", "random"],
)
def test_what_is_pruned_stays_pruned_when_the_schedule_falls(scheme: Any) -> None:
    falling = scheme(jc.schedules.linear(0.8, 0.2, begin=0, end=2))
    params, state = jax.jit(falling.init)({"w": jnp.asarray(halves(5, 7, 5))})
    first = state.masks["w"][0]
    update = jax.jit(falling.update)
    for _ in range(2):
        params, state = update(params, state)
    assert not (np.asarray(state.masks["w"][0]) & ~np.asarray(first)).any()


def test_a_constant_sparsity_keeps_its_first_masks() -> None:
    scheme = jc.prune.magnitude(sparsity=0.5)
    params, state = scheme.init({"w": jnp.asarray(halves(6, 7, 5))})
    reversed_order = {"w": 3.0 - jnp.abs(params["w"])}
    held, after = scheme.update(reversed_order, state)
    np.testing.assert_array_equal(after.masks["w"][0], state.masks["w"][0])
    np.testing.assert_array_equal(
        held["w"], np.where(state.masks["w"][0], reversed_order["w"], 0)
    )


def test_the_view_is_zero_where_masked_and_has_no_gradient_there() -> None:
    w = halves(7, 7, 5) + np.float32(0.25)
    scheme = jc.prune.magnitude(sparsity=0.6)
    params, state = scheme.init({"w": jnp.asarray(w)})
    forward = lambda p: jc.materialize(scheme.view(p, state))["w"]
    kept = pruned(w, 0.6)
    np.testing.assert_array_equal(forward(params), np.where(kept, w, 0))
    grad = jax.grad(lambda p: (forward(p) ** 3).sum())(params)["w"]
    np.testing.assert_allclose(grad, np.where(kept, 3 * w.astype(np.float64) ** 2, 0))


def test_masks_intersect() -> None:
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    both = masked(masked(jnp.ones(4), jnp.asarray(a)), jnp.asarray(b))
    assert isinstance(both.inner, jax.Array)
    np.testing.assert_array_equal(both.materialize(), a & b)


def test_a_mask_hides_values_that_are_not_finite() -> None:
    leaf = MaskedArray(inner=jnp.array([jnp.inf, 2.0]), mask=jnp.array([False, True]))
    assert leaf.materialize().tolist() == [0.0, 2.0]


def test_a_leaf_that_moves_weights_may_not_go_under_a_mask() -> None:
    moved = Oriented(value=jnp.ones(4), axes=jc.Axes(contract=(-1,)))
    with pytest.raises(jc.OrderError, match="before the mask in the chain"):
        masked(moved, jnp.ones(4, bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -0.1}, r"sparsity .* \[0, 1\); got -0\.1"),
        ({"sparsity": 1.0}, r"sparsity .* \[0, 1\); got 1\.0"),
        ({"sparsity": float("nan")}, r"sparsity .* \[0, 1\); got nan"),
        ({"sparsity": 0.5, "scope": "model"}, "scope must be .* got 'model'"),
        ({"sparsity": 0.5, "every": 0}, "every must be at least 1 update; got 0"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_options_out_of_range_are_named(
    method: str, options: dict[str, Any], message: str
) -> None:
    make = {
        "magnitude": jc.prune.magnitude,
        "random": lambda **o: jc.prune.random(key=KEY, **o),
    }[method]
    with pytest.raises(ValueError, match=rf"prune\.{method}: {message}"):
        make(**options)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_unknown_axes_are_refused_by_init(scope: Any) -> None:
    scheme = jc.prune.magnitude(sparsity=0.5, scope=scope)
    with pytest.raises(ValueError, match=r"prune\.magnitude: the contracting axes of"):
        scheme.init({"conv": jnp.ones((3, 4, 5))})


def test_weights_that_are_not_finite_are_refused_by_init() -> None:
    with pytest.raises(ValueError, match=r"prune\.magnitude: .* 'w' has 1 NaN"):
        jc.prune.magnitude(sparsity=0.5).init({"w": jnp.array([1.0, jnp.inf])})
