"""`ema`: codebooks that follow trained weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.codebook import ema

KEY = jax.random.key(0)


def weight(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("dims", [1, 2])
def test_updates_are_the_moving_averages(dims: int) -> None:
    """Against the definition in loops, for two updates."""
    w = [{"w": weight(12, 6, seed=i)} for i in range(3)]
    scheme = ema(bits=2, key=KEY, dims=dims, decay=0.8, revive_below=0.0)
    _, state = scheme.init(w[0])
    table = state.tables["w"][0]
    entries = np.asarray(table.entries[0], np.float64)
    vectors = lambda p: np.asarray(p["w"], np.float64).T.reshape(-1, dims)

    def sums(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = ((x[:, None] - entries[None]) ** 2).sum(-1).argmin(1)
        return np.bincount(near, minlength=4), np.stack(
            [x[near == i].sum(0) for i in range(4)]
        )

    n, m = sums(vectors(w[0]))
    for later in w[1:]:
        _, state = scheme.update(later, state)
        new_n, new_m = sums(vectors(later))
        n, m = 0.8 * n + 0.2 * new_n, 0.8 * m + 0.2 * new_m
        entries = m / n[:, None]
        np.testing.assert_allclose(state.tables["w"][0].entries[0], entries, rtol=1e-4)


def test_an_unused_entry_moves_to_a_weight() -> None:
    w = {"w": weight(32, 8)}
    far = {"w": jnp.abs(w["w"]) + 50.0}
    for revive, alive in ((0.0, False), (0.2, True)):
        scheme = ema(bits=3, key=KEY, decay=0.0, revive_below=revive)
        _, state = scheme.init(w)
        for _ in range(3):
            _, state = scheme.update(far, state)
        entries = np.asarray(state.tables["w"][0].entries).ravel()
        assert (entries > 40).all() == alive


def test_the_same_key_gives_the_same_bits() -> None:
    w = {"w": weight(32, 8)}

    def after(key: jax.Array) -> np.ndarray:
        scheme = ema(bits=3, key=key, decay=0.0, revive_below=0.9)
        _, state = scheme.update(w, scheme.init(w)[1])
        return np.asarray(state.tables["w"][0].entries)

    np.testing.assert_array_equal(after(KEY), after(KEY))
    assert (after(KEY) != after(jax.random.key(1))).any()


def test_gradients_pass_straight_through() -> None:
    w, dy = {"w": weight(8, 4)}, weight(8, 4, seed=1)
    scheme = ema(bits=2, key=KEY)
    params, state = scheme.init(w)
    loss = lambda p: (scheme.view(p, state)["w"].materialize() * dy).sum()
    np.testing.assert_array_equal(jax.grad(loss)(params)["w"], dy)


def test_pruned_weights_do_not_pull_the_codebook() -> None:
    rule = jc.chain(jc.prune.magnitude(sparsity=0.8), ema(bits=2, key=KEY, decay=0.5))
    w = {"w": weight(32, 16)}
    params, state = rule.init(w)
    params, state = rule.update(params, state, grads=w)
    dense = np.asarray(rule.compress(params, state)["w"].materialize())
    kept = np.sort(np.abs(np.asarray(w["w"])).ravel())[-102:].min()
    assert np.count_nonzero(dense) == 102
    assert np.abs(dense[dense != 0]).min() > 0.9 * kept


@pytest.mark.parametrize(
    "options",
    [{"bits": 9}, {"bits": 2, "decay": 1.0}, {"bits": 2, "revive_below": -0.1}],
)
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"codebook\.ema"):
        ema(key=KEY, **options)


def test_sub_vectors_must_divide_the_inputs() -> None:
    with pytest.raises(ValueError, match="dims must divide the inputs; got 3 for 8"):
        ema(bits=2, dims=3, key=KEY).init({"w": weight(8, 4)})
