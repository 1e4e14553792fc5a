"""Hard-concrete gates against the formulas, and against samples of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import prune
from jaxcompress.leaf import GATE
from tests.jitted import run

KEY = jax.random.key(0)
W = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def sigmoid(a: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(a, np.float64)))


def gate(log_alpha: Any, u: Any = None) -> np.ndarray:
    """Equations 10, 11 and 13, with the paper's constants."""
    a = np.asarray(log_alpha, np.float64)
    s = sigmoid(a) if u is None else sigmoid((np.log(u) - np.log(1 - u) + a) * 1.5)
    return np.minimum(1, np.maximum(0, s * 1.2 - 0.1))


def with_gates(params: Any, log_alpha: Any) -> Any:
    new = jnp.asarray(log_alpha, jnp.float32)
    return {"w": params["w"].replace(log_alpha=new)}


def test_gates_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=200).astype(np.float32) * 2
    u = rng.uniform(0.001, 0.999, size=200).astype(np.float32)
    both = run(lambda a, u: [prune.hard_concrete(a), prune.hard_concrete(a, u)], a, u)
    for found, expected in zip(both, (gate(a), gate(a, np.float64(u))), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (expected == 0).any()
        assert (expected == 1).any()


def test_the_penalty_is_how_many_weights_samples_leave() -> None:
    scheme = prune.l0(key=KEY, end=10_000, structures="output")
    log_alpha = np.array([[-2.0, -0.5, 0.5, 2.0]])
    exact = 6 * sigmoid(log_alpha - 2 / 3 * np.log(0.1 / 1.1)).sum()

    def look(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = with_gates(scheme.init({"w": w})[0], log_alpha)
        count = lambda step: (scheme.view(params, step)["w"].materialize() != 0).sum()
        return prune.l0_penalty(params), jax.vmap(count)(jnp.arange(4000))

    penalty, counts = map(np.asarray, run(look, W))
    np.testing.assert_allclose(penalty, exact, rtol=1e-6)
    spread = float(np.std(counts)) / 4000**0.5
    assert abs(float(counts.mean()) - exact) < 4 * spread


SPANS = {
    "matrix": ((6, 4), None, {"weight": (6, 4), "output": (1, 4), "input": (6, 1)}),
    "convolution": (
        (2, 3, 5, 4),
        (-4, -3, -2),
        {"weight": (2, 3, 5, 4), "output": (1, 1, 1, 4), "input": (2, 3, 5, 1)},
    ),
    "stack": (
        (3, 6, 4),
        jc.Axes(contract=(-2,), stack=1),
        {"weight": (3, 6, 4), "output": (3, 1, 4), "input": (3, 6, 1)},
    ),
}


@pytest.mark.parametrize("site", SPANS)
@pytest.mark.parametrize("structures", ["weight", "output", "input"])
def test_gates_span_their_structures(site: str, structures: Any) -> None:
    shape, axes, expected = SPANS[site]
    scheme = prune.l0(key=KEY, end=0, structures=structures, axes=axes)
    gates = expected[structures]
    drawn = np.random.default_rng(2).normal(size=gates).astype(np.float32) * 2

    def look(w: jax.Array, drawn: jax.Array) -> jax.Array:
        params, state = scheme.init({"w": w})
        assert params["w"].log_alpha.shape == gates
        return scheme.view(with_gates(params, drawn), state)["w"].materialize()

    found = run(look, np.ones(shape, np.float32), drawn)
    np.testing.assert_allclose(found, np.broadcast_to(gate(drawn), shape), atol=1e-6)


def test_noise_is_new_at_each_update_and_ends() -> None:
    scheme = prune.l0(key=KEY, end=3, log_alpha=0.0)
    params, state = run(scheme.init, {"w": np.ones((8, 8), np.float32)})
    view = jax.jit(lambda p, s: scheme.view(p, s)["w"].materialize())
    seen = []
    for step in range(5):
        seen.append(np.asarray(view(params, state)))
        np.testing.assert_array_equal(view(params, state), seen[-1])
        params, state = scheme.update(params, state)
        assert int(state) == step + 1
    assert len({v.tobytes() for v in seen[:3]}) == 3
    assert len(np.unique(seen[0])) > 8  # Each weight has noise of its own.
    np.testing.assert_allclose(seen[3], 0.5)
    np.testing.assert_array_equal(seen[3], seen[4])


def test_the_noise_of_a_leaf_depends_on_its_path_alone() -> None:
    scheme = prune.l0(key=KEY, end=3, log_alpha=0.0)

    def view(tree: Any) -> Any:
        return jc.materialize(scheme.view(*scheme.init(tree)))

    w = np.ones((4, 4), np.float32)
    both, alone = run(lambda w: (view({"a": w, "b": w}), view({"b": w})), w)
    assert (np.asarray(both["a"]) != np.asarray(both["b"])).any()
    np.testing.assert_array_equal(alone["b"], both["b"])


def test_gates_and_weights_have_the_gradients_of_the_product() -> None:
    a, u = np.array([-1.0, 0.3, 4.0, -4.0]), np.array([0.4, 0.6, 0.9, 0.1])
    slope = lambda a, u: (gate(a + 1e-6, u) - gate(a - 1e-6, u)) / 2e-6
    w = np.array([[1.0, -2.0, 3.0, 5.0]], np.float32)
    scheme = prune.l0(key=KEY, end=0)

    def gradients(w: jax.Array, a: jax.Array, u: jax.Array) -> tuple[jax.Array, Any]:
        params, state = scheme.init({"w": w})
        total = lambda p: scheme.view(p, state)["w"].materialize().sum()
        grads = jax.grad(total)(with_gates(params, a[None]))["w"]
        return jax.vmap(jax.grad(prune.hard_concrete))(a, u), grads

    found, grads = run(gradients, w, np.float32(a), np.float32(u))
    np.testing.assert_allclose(found, slope(a, u), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads.latent, gate(a)[None], atol=1e-6)
    expected = w * slope(a, None)
    np.testing.assert_allclose(grads.log_alpha, expected, rtol=1e-4, atol=1e-6)


def test_what_was_trained_is_what_is_stored() -> None:
    """Gates half open, bit for bit; shut ones are not stored."""
    rng = np.random.default_rng(4)
    scheme = prune.l0(key=KEY, end=2, structures="weight")
    start = {"w": rng.normal(size=(50, 37)).astype(np.float32)}
    params, state = run(scheme.init, start)
    params = with_gates(params, rng.normal(size=(50, 37)) * 2)
    shut = int((gate(params["w"].log_alpha) == 0).sum())
    view = jax.jit(lambda p, s: scheme.view(p, s)["w"].materialize())
    noisy = np.asarray(view(params, state))
    for _ in range(2):
        params, state = scheme.update(params, state)
    stored = scheme.compress(params, state)["w"]
    assert isinstance(stored, prune.BitmaskArray)
    assert stored.elements.shape == (50 * 37 - shut,)
    assert shut > 100
    quiet, kept = run(jc.materialize, (params["w"], stored))
    np.testing.assert_array_equal(view(params, state), kept)
    assert (noisy != np.asarray(kept)).any()
    np.testing.assert_array_equal(quiet, kept)


def test_only_the_weight_is_decayed_and_both_are_trained_and_sharded() -> None:
    params, _ = run(prune.l0(key=KEY, end=0, structures="output").init, {"w": W})
    assert params["w"].components()["log_alpha"][1] == GATE
    decayed = jc.weight_decay_mask(params)["w"]
    assert (decayed.latent, decayed.log_alpha) == (True, False)
    assert len(jax.tree.leaves(jc.partition(params)[0])) == 2
    specs = params["w"].component_specs(("a", "b"), {"a": 2, "b": 2})
    assert (specs.latent, specs.log_alpha) == (P("a", "b"), P(None, "b"))


def test_inputs_that_do_not_matter_are_closed_in_training() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    y = x[:, :2] @ np.array([[2.0, -1.0], [1.0, 3.0]], np.float32)
    scheme = prune.l0(key=KEY, end=500, structures="input")
    tx = optax.adam(0.05)
    w = {"w": jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)}

    def loss(params: Any, state: Any) -> jax.Array:
        view = jc.materialize(scheme.view(params, state))["w"]
        error = jnp.square(x @ view - y).sum(-1).mean()
        return error + 0.2 * prune.l0_penalty(params)

    def train(w: Any) -> Any:
        params, state = scheme.init(w)

        def step(_: Any, carry: Any) -> Any:
            params, state, moments = carry
            grads = jax.grad(loss)(params, state)
            with jax.numpy_dtype_promotion("standard"):
                updates, moments = tx.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
            params, state = scheme.update(params, state, grads=grads)
            return params, state, moments

        return jax.lax.fori_loop(0, 600, step, (params, state, tx.init(params)))[:2]

    params, state = run(train, w)
    found = np.asarray(run(jc.materialize, scheme.compress(params, state)["w"]))
    assert (found != 0).any(1).tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(found[:2], [[2, -1], [1, 3]], atol=0.05)


def test_gates_of_zeros_start_closed_and_the_others_change_nothing() -> None:
    w = np.zeros((6, 2), np.float32)
    w[0, 0], w[2] = 1.0, [-2.0, 0.5]
    scheme = prune.l0(key=KEY, end=0, structures="input")
    params, state = run(scheme.init, {"w": w})
    start = [[2.5], [-2.5], [2.5], [-2.5], [-2.5], [-2.5]]
    assert params["w"].log_alpha.tolist() == start
    stored = scheme.compress(params, state)["w"]
    mask, dense = run(lambda a: (a.expand().mask, a.materialize()), stored)
    opened = [True, False, True, False, False, False]
    np.testing.assert_array_equal(np.asarray(mask).all(1), opened)
    np.testing.assert_array_equal(dense, w)


def test_attach_keeps_the_gates_that_are_there() -> None:
    scheme = prune.l0(key=KEY, end=1)
    params, _ = run(scheme.init, {"w": W})
    moved = with_gates(params, np.full((6, 4), 0.25))
    again, _ = run(scheme.init, moved)
    np.testing.assert_array_equal(again["w"].log_alpha, np.full((6, 4), 0.25))
    tx = jc.optim.attach(optax.sgd(0.5), scheme)
    grads = jax.tree.map(jnp.ones_like, moved)
    updates, _ = jax.jit(tx.update)(grads, tx.init(moved), moved)
    np.testing.assert_array_equal(updates["w"].log_alpha, np.full((6, 4), -0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prune.l0(key=KEY, end=0, structures="row"),  # type: ignore[arg-type]
            r"structures must be 'weight', 'output' or 'input'; got 'row'",
        ),
        (lambda: prune.l0(key=KEY, end=-1), "end must not be negative; got -1"),
        (
            lambda: prune.l0(key=KEY, end=0, log_alpha=float("inf")),
            "log_alpha must be finite; got inf",
        ),
        (
            lambda: prune.l0(key=KEY, end=0).view({"w": W}, jnp.int32(0)),
            r"prune\.l0 at 'w': there are no gates",
        ),
        (
            lambda: jc.chain(*[prune.l0(key=KEY, end=0)] * 2).init({"w": jnp.ones(3)}),
            r"prune\.l0 at 'w': .* chain prune\.l0 once",
        ),
        (lambda: prune.l0_penalty({"w": W}), "there are no gates in params"),
    ],
)
def test_options_that_do_not_fit_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
