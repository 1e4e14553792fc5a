"""SET against loops over sorted lists, over time, on one device and on eight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.values import Site, leaf_key
from tests.lift.programs import mesh
from tests.prune.regrowth import dropped, moved

KEY = jax.random.key(7)


def weights(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/2, none of them zero: many ties."""
    values = np.float32([-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2])
    return np.random.default_rng(seed).choice(values, shape)


@jax.jit
def drawn(step: jax.Array) -> jax.Array:
    """What grows at a step, for the weight of `run`."""
    key = jax.random.fold_in(leaf_key(KEY, Site("w", 0, None)), step)
    return jax.random.uniform(key, (8, 6), jnp.float32)


def run(scheme: jc.Transform, steps: int) -> list[tuple[np.ndarray, Any, Any]]:
    """At each step the weights before the update, and params and state after."""
    start = {"w": jnp.asarray(weights(0, 8, 6))}
    params, state = jax.jit(scheme.init)(start)
    update = jax.jit(scheme.update)
    history = [(np.zeros(0), params, state)]
    for t in range(1, steps + 1):
        w = np.where(state.masks["w"][0], weights(t, 8, 6), 0).astype(np.float32)
        params, state = update({"w": jnp.asarray(w)}, state)
        history.append((w, params, state))
    return history


def test_the_smallest_are_dropped_and_as_many_others_grow_at_random() -> None:
    falling = jc.schedules.linear(0.5, 0.1, begin=0, end=8)
    scheme = jc.prune.set(sparsity=0.7, key=KEY, fraction=falling, every=2, until=8)
    history = run(scheme, 10)
    kept = np.asarray(history[0][2].masks["w"][0])
    assert kept.sum() == 48 - 34
    for t in range(1, 11):
        w, params, state = history[t]
        before = kept
        if t % 2 == 0 and t < 8:
            score = np.asarray(drawn(jnp.int32(t)))
            rate = float(np.interp(t, [0, 8], [0.5, 0.1]))
            kept = moved(w, kept, score, rate, again=False)
            assert (before != kept).sum() == 2 * len(dropped(w, before, rate)) > 0
        np.testing.assert_array_equal(state.masks["w"][0], kept)
        np.testing.assert_array_equal(params["w"], np.where(kept & before, w, 0))


def test_dropped_weights_come_back_only_where_nothing_else_is_pruned() -> None:
    """Of 48 weights 38 are kept, 19 are dropped and 10 were pruned before."""
    scheme = jc.prune.set(sparsity=0.2, key=KEY, fraction=0.5, every=1)
    (_, _, first), (w, params, state) = run(scheme, 1)
    before, after = np.asarray(first.masks["w"][0]), np.asarray(state.masks["w"][0])
    assert after.sum() == before.sum() == 38
    assert after[~before].all()
    gone = np.zeros(48, bool)
    gone[dropped(w, before, 0.5)] = True
    back = gone.reshape(8, 6) & after
    assert back.sum() == 9
    np.testing.assert_array_equal(np.asarray(params["w"])[back], w[back])


def test_each_layer_of_a_stack_drops_its_own() -> None:
    w = weights(1, 3, 6, 4) * np.float32([1, 8, 64])[:, None, None]
    scheme = jc.prune.set(sparsity=0.5, key=KEY, fraction=0.5, every=1, axes=-2)

    def first_two(w: jax.Array) -> Any:
        params, state = scheme.init({"w": w})
        return state, scheme.update(params, state)[1]

    state, after = jax.jit(first_two)(jnp.asarray(w))
    was, now = np.asarray(state.masks["w"][0]), np.asarray(after.masks["w"][0])
    for layer in range(3):
        gone = np.zeros(24, bool)
        gone[dropped(w[layer], was[layer], 0.5)] = True
        np.testing.assert_array_equal(was[layer] & ~now[layer], gone.reshape(6, 4))
        assert now[layer].sum() == 12


def test_layers_exchange_weights_in_global_scope() -> None:
    params = {"a": jnp.asarray(weights(2, 16, 8)), "b": jnp.asarray(weights(3, 8, 8))}
    scheme = jc.prune.set(sparsity=0.75, key=KEY, fraction=0.5, every=1, scope="global")

    def count(params: Any) -> jax.Array:
        def step(state: Any, _: Any) -> tuple[Any, jax.Array]:
            sizes = jnp.stack([m.sum() for (m,) in state.masks.values()])
            return scheme.update(params, state)[1], sizes

        return jax.lax.scan(step, scheme.init(params)[1], length=3)[1]

    sizes = np.asarray(jax.jit(count)(params))
    assert (sizes.sum(1) == 48).all()
    assert len(np.unique(sizes, axis=0)) > 1


def test_an_allocation_gives_each_layer_its_size_for_good() -> None:
    params = {"a": jnp.asarray(weights(2, 32, 16)), "b": jnp.asarray(weights(3, 8, 8))}
    scheme = jc.prune.set(
        sparsity=0.7, key=KEY, fraction=0.5, every=1, scope=jc.prune.erk()
    )

    def first_two(params: Any) -> Any:
        params, state = scheme.init(params)
        return state, scheme.update(params, state)[1]

    state, after = jax.jit(first_two)(params)
    sizes = [[int(m.sum()) for (m,) in s.masks.values()] for s in (state, after)]
    assert sizes[0] == sizes[1]
    assert abs(sum(sizes[0]) - 0.3 * 576) <= 1
    assert sizes[0][0] / 512 < 0.28 < sizes[0][1] / 64
    assert (np.asarray(state.masks["a"][0]) != np.asarray(after.masks["a"][0])).any()


def test_groups_of_a_pattern_keep_their_number_of_weights() -> None:
    scheme = jc.prune.set(sparsity=jc.prune.nm(2, 4), key=KEY, fraction=0.5, every=1)
    history = run(scheme, 2)
    masks = [np.asarray(state.masks["w"][0]) for _, _, state in history]
    for (w, _, _), before, after in zip(
        history[1:], masks[:-1], masks[1:], strict=True
    ):
        assert (after.reshape(2, 4, 6).sum(1) == 2).all()
        stays = before.copy()
        stays.flat[dropped(w, before, 0.5)] = False
        assert after[stays].all()
        assert (after != before).sum() > 8
    stored = jax.eval_shape(scheme.compress, *history[-1][1:])
    assert stored["w"].method == "2:4 dense"


def test_masks_are_the_same_on_eight_devices() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)
    scheme = jc.prune.set(sparsity=0.8, key=KEY, fraction=0.5, every=1)

    def twice(w: jax.Array) -> jax.Array:
        step = lambda _, carry: scheme.update({"w": w}, carry[1])
        return jax.lax.fori_loop(0, 2, step, scheme.init({"w": w}))[1].masks["w"][0]

    spread = jax.device_put(w, NamedSharding(mesh(), P("d", None)))
    assert len(spread.sharding.device_set) == 8
    found = jax.jit(twice)(spread)
    np.testing.assert_array_equal(found, jax.jit(twice)(w))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity .* \[0, 1\); got 1\.0"),
        (
            {"sparsity": jc.schedules.constant(0.5)},
            "sparsity .* masks keep their size; got a sch",
        ),
        (
            {"sparsity": jc.prune.blocks(sparsity=0.5)},
            "sparsity .* come and go alone; got blocks",
        ),
        ({"fraction": 1.5}, r"fraction .* in \[0, 1\], or a schedule; got 1\.5"),
        ({"every": 0}, "every must be at least 1 update; got 0"),
        ({"scope": "model"}, "scope must be .* got 'model'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("method", [jc.prune.set, jc.prune.rigl])
def test_options_out_of_range_are_named(
    method: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"prune\.{method.__name__}: {message}"):
        method(**{"sparsity": 0.5, "key": KEY, **options})
