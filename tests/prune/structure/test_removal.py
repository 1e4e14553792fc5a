"""What is removed: smaller trees, the function that runs them, and bad requests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcompress import prune
from tests.jitted import run

RNG = np.random.default_rng(0)


def arrays(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}


def mlp(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]


PARAMS = arrays(a=(3, 5), b=(5,), c=(5, 4))
X = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
GRAPH = prune.dependency_graph(mlp, PARAMS, X)
(HIDDEN,) = (g.number for g in GRAPH.removable)
GONE = {HIDDEN: np.array([0, 1, 0, 1, 0], bool)}


def test_the_same_positions_of_every_member_go() -> None:
    smaller = prune.Removal.of(GRAPH, GONE).take(PARAMS)
    left = np.array([0, 2, 4])
    np.testing.assert_array_equal(smaller["a"], PARAMS["a"][:, left])
    np.testing.assert_array_equal(smaller["b"], PARAMS["b"][left])
    np.testing.assert_array_equal(smaller["c"], PARAMS["c"][left])


def test_moments_of_an_optimizer_shrink_alike() -> None:
    removal = prune.Removal.of(GRAPH, GONE)
    with jax.numpy_dtype_promotion("standard"):
        state = optax.adam(1e-3).init(PARAMS)
    moments = removal.take(state[0].mu)
    shapes = lambda t: jax.tree.map(jnp.shape, t)
    assert shapes(moments) == shapes(removal.take(PARAMS))


def test_untouched_leaves_are_the_same_objects() -> None:
    params = {**PARAMS, "other": jnp.ones(3)}
    graph = prune.dependency_graph(lambda p, x: mlp(p, x), params, X)
    smaller = prune.Removal.of(graph, {graph.removable[0].number: GONE[HIDDEN]})
    assert smaller.take(params)["other"] is params["other"]


def test_other_arguments_and_gradients_work_as_before() -> None:
    def fn(p: Any, x: jax.Array, *, scale: float) -> jax.Array:
        return scale * mlp(p, x)

    removal = prune.Removal.of(GRAPH, GONE)
    smaller, x = removal.take(PARAMS), jnp.tile(X, (3, 1))
    loss = lambda f: lambda p: (f(p, x, scale=2.0) ** 2).sum()
    found = run(jax.grad(loss(removal.smaller(fn))), smaller)
    masked = run(jax.grad(loss(fn)), removal.mask(PARAMS))
    expected = removal.take(masked)
    for name in ("a", "b", "c"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_relu_keeps_its_derivative_at_zero() -> None:
    removal = prune.Removal.of(GRAPH, GONE)
    smaller = jax.tree.map(jnp.zeros_like, removal.take(PARAMS))
    smaller["c"] = jnp.ones_like(smaller["c"])
    grads = run(jax.grad(lambda p: removal.smaller(mlp)(p, X).sum()), smaller)
    assert not grads["b"].any()


def test_layers_of_a_scan_keep_features_of_their_own() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None)
        return jax.lax.scan(step, x, (p["b"], p["c"]))[0]

    params = arrays(b=(3, 3, 6), c=(3, 6, 3))
    graph = prune.dependency_graph(fn, params, X)
    (group,) = (g for g in graph.removable if g.layers == 3)
    gone = np.zeros((3, 6), bool)
    gone[0, [0, 1]] = gone[1, [2, 5]] = gone[2, [1, 3]] = True
    removal = prune.Removal.of(graph, {group.number: gone})
    smaller = removal.take(params)
    np.testing.assert_array_equal(
        smaller["b"][1], np.asarray(params["b"])[1][:, [0, 1, 3, 4]]
    )
    np.testing.assert_array_equal(
        smaller["c"][2], np.asarray(params["c"])[2][[0, 2, 4, 5]]
    )
    found, expected = run(
        lambda s, m: (removal.smaller(fn)(s, X), fn(m, X)),
        smaller,
        removal.mask(params),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_whole_layers_of_a_scan_go() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, w: (h + jnp.tanh(h @ w[0]) * w[1], h.sum())
        return jax.lax.scan(step, x, (p["b"], jnp.arange(4.0)))[0]

    params = arrays(b=(4, 3, 3))
    graph = prune.dependency_graph(fn, params, X)
    (group,) = graph.removable
    removal = prune.Removal.of(
        graph, {group.number: np.array([False, True, False, False])}
    )
    found = run(removal.smaller(fn), removal.take(params), X)
    h = X
    for i in (0, 2, 3):
        h = h + jnp.tanh(h @ params["b"][i]) * i
    np.testing.assert_allclose(found, h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (np.ones(5, bool), r"would lose all of its 5 units"),
        (np.ones(4, bool), r"must be bool\[5\].*got shape \(4,\)"),
    ],
)
def test_bad_units_are_refused(units: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"remove: .*{message}"):
        prune.Removal.of(GRAPH, {HIDDEN: units})


def test_a_fixed_group_is_refused_with_its_reason() -> None:
    fixed = next(g for g in GRAPH.groups if g.fixed)
    gone = np.zeros(fixed.size, bool)
    gone[0] = True
    with pytest.raises(ValueError, match="cannot be removed: an argument has this"):
        prune.Removal.of(GRAPH, {fixed.number: gone})


def test_layers_must_lose_equally_many() -> None:
    step = lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None)
    fn = lambda p, x: jax.lax.scan(step, x, (p["b"], p["c"]))[0]
    graph = prune.dependency_graph(fn, arrays(b=(2, 3, 4), c=(2, 4, 3)), X)
    (group,) = (g for g in graph.removable if g.layers == 2)
    gone = np.array([[True, False, False, False], [True, True, False, False]])
    with pytest.raises(ValueError, match=r"must lose as many units; got \[1, 2\]"):
        prune.Removal.of(graph, {group.number: gone})


def test_a_tree_of_other_shapes_is_refused() -> None:
    removal = prune.Removal.of(GRAPH, GONE)
    with pytest.raises(ValueError, match=r"'a' must have the shape \(3, 5\)"):
        removal.take(removal.take(PARAMS))


def test_an_operation_without_a_rule_is_named_when_it_is_met() -> None:
    removal = prune.Removal.of(GRAPH, GONE)
    other = lambda p, x: mlp(p, x).sum() + jnp.fft.fft(p["b"]).real.sum()
    with pytest.raises(ValueError, match=r"the operation 'fft' .* no rule"):
        removal.smaller(other)(removal.take(PARAMS), X)
