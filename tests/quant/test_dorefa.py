"""DoReFa against its definition in loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import quant as q


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_hand(w: np.ndarray, bits: int) -> np.ndarray:
    """Eq. 9 and 5, of one weight."""
    levels, out = 2**bits - 1, np.zeros_like(w)
    largest = np.abs(np.tanh(w)).max()
    for i in np.ndindex(w.shape):
        r = np.tanh(w[i]) / (2 * largest) + 0.5
        out[i] = 2 * np.round(levels * r) / levels - 1
    return out


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_stored_values_are_those_of_the_paper_for_each_layer(bits: int) -> None:
    w = draw(2, 6, 5) * jnp.array([1.0, 0.1])[:, None, None]
    scheme = q.dorefa(bits=bits, axes=-2)
    params, state = scheme.init({"w": w})
    packed = jax.jit(scheme.compress)(params, state)["w"]
    expected = [by_hand(layer, bits) for layer in np.asarray(w, np.float64)]
    np.testing.assert_allclose(packed.materialize(), np.stack(expected), atol=1e-6)
    assert packed.bits == bits


def test_the_gradient_is_that_of_the_squashing() -> None:
    scheme = q.dorefa(bits=2)
    w, g = draw(4, 3), draw(4, 3, seed=1)
    params, state = scheme.init({"w": w})
    loss = lambda p: (jc.materialize(scheme.view(p, state))["w"] * g).sum()
    found = np.asarray(jax.jit(jax.grad(loss))(params)["w"])

    def smooth(w: np.ndarray) -> float:
        t = np.tanh(w)
        return float((t / np.abs(t).max() * np.asarray(g, np.float64)).sum())

    w64, eps = np.asarray(w, np.float64), 1e-6
    for i in np.ndindex(w64.shape):
        change = np.zeros_like(w64)
        change[i] = eps
        slope = (smooth(w64 + change) - smooth(w64 - change)) / (2 * eps)
        np.testing.assert_allclose(found[i], slope, rtol=1e-3, atol=1e-5)


def test_activations_are_clipped_to_the_unit_interval() -> None:
    scheme = q.dorefa(bits=2, activation_bits=2)
    params, state = scheme.init({"w": draw(5, 2)})
    x = jnp.array([[-0.5, 0.1, 0.4, 0.9, 1.7]])

    @jax.jit
    def seen(x: jax.Array) -> Any:
        prepare = scheme.view(params, state)["w"].prepare_activations
        return prepare(x), jax.grad(lambda x: prepare(x).sum())(x)

    value, slope = seen(x)
    np.testing.assert_allclose(value, [[0, 0, 1 / 3, 1, 1]], atol=1e-6)
    assert slope.tolist() == [[0, 1, 1, 1, 0]]


def test_a_weight_of_zeros_stays_zero_and_has_a_gradient() -> None:
    scheme = q.dorefa(bits=2)
    params, state = scheme.init({"w": jnp.zeros((3, 2))})
    view = lambda p: jc.materialize(scheme.view(p, state))["w"]
    assert not jax.jit(view)(params).any()
    slope = jax.jit(jax.grad(lambda p: view(p).sum()))(params)["w"]
    assert (np.asarray(slope) == 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.dorefa(bits=1), "binary"),
        (lambda: q.dorefa(bits=9), "2 to 8; got 9"),
        (lambda: q.dorefa(bits=2, activation_bits=1), "activation_bits must be 2"),
        (lambda: q.dorefa(bits=2).init({"w": draw(2, 3, 4)}), "contracting axes"),
    ],
)
def test_what_is_out_of_range_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
