"""Language-model metrics against their definitions in NumPy float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import report


def draw(seed: int, *shape: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale


def softmax(z: Any) -> np.ndarray:
    powers = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


Z, Z_Q = draw(0, 2, 5, 7), draw(1, 2, 5, 7)
LABELS = np.random.default_rng(2).integers(0, 7, (2, 5)).astype(np.int32)
MASK = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]], bool)


def kl_by_hand(z: Any, z_q: Any, mask: Any) -> float:
    p, q = softmax(z), softmax(z_q)
    each = [
        sum(p[i][v] * np.log(p[i][v] / q[i][v]) for v in range(p.shape[-1]))
        for i in np.ndindex(mask.shape)
        if mask[i]
    ]
    return float(np.mean(each))


def nll_by_hand(z: Any, labels: Any, mask: Any) -> float:
    p = softmax(z)
    return float(
        np.mean([-np.log(p[i][labels[i]]) for i in np.ndindex(mask.shape) if mask[i]])
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_values_are_the_definitions(mask: Any) -> None:
    counted = np.ones_like(MASK) if mask is None else mask
    given = None if mask is None else jnp.asarray(mask)
    z, z_q, labels = map(jnp.asarray, (Z, Z_Q, LABELS))
    found = jax.jit(
        lambda z, z_q, labels: (
            report.kl_divergence(z, z_q, mask=given),
            report.mean_nll(z, labels, mask=given),
            report.perplexity(z, labels, mask=given),
            report.top1_agreement(z, z_q, mask=given),
        )
    )(z, z_q, labels)
    nll = nll_by_hand(Z, LABELS, counted)
    agree = (Z.argmax(-1) == Z_Q.argmax(-1))[counted].mean()
    expected = (kl_by_hand(Z, Z_Q, counted), nll, np.exp(nll), agree)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_masked_is_not_looked_at() -> None:
    mask = jnp.array([True, False])
    z = jnp.array([[0.0, 1.0], [5.0, 6.0]])
    labels = jnp.array([1, -100], jnp.int32)
    one = nll_by_hand(np.asarray(z[:1]), np.array([1]), np.array([True]))
    assert report.mean_nll(z, labels, mask=mask) == pytest.approx(one)
    assert report.kl_divergence(z, z * z, mask=mask) == 0


def test_equal_up_to_a_constant_is_zero_and_nothing_counted_is_zero() -> None:
    z, none = jnp.asarray(np.round(Z)), jnp.zeros((2, 5), bool)
    found = jax.jit(
        lambda: (
            report.kl_divergence(z, z + 8.0),
            report.kl_divergence(z, -z, mask=none),
            report.mean_nll(z, jnp.asarray(LABELS), mask=none),
            report.top1_agreement(z, z, mask=none),
        )
    )()
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


def test_excluded_tokens() -> None:
    z = jnp.array([[0.0, 0.0, -jnp.inf]])
    assert report.kl_divergence(z, jnp.zeros((1, 3))) == pytest.approx(np.log(1.5))
    assert report.kl_divergence(jnp.zeros((1, 3)), z) == np.inf
    assert report.kl_divergence(z, z) == 0


def test_low_precision_logits_are_read_in_float32() -> None:
    z = jnp.asarray(draw(3, 3000, 4), jnp.bfloat16)
    labels = jnp.zeros(3000, jnp.int32)
    exact = nll_by_hand(np.asarray(z, np.float64), np.asarray(labels), np.ones(3000))
    found = report.mean_nll(z, labels)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_shapes_that_disagree_are_named() -> None:
    z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
    for fn in (report.kl_divergence, report.top1_agreement):
        with pytest.raises(ValueError, match="logits of one shape"):
            fn(z, z[:, :3])
        with pytest.raises(ValueError, match="mask must have the shape"):
            fn(z, z, mask=jnp.ones(3, bool))
    for wrong in (labels[:, :3], labels.astype(jnp.float32)):
        with pytest.raises(ValueError, match="labels must be integers of shape"):
            report.mean_nll(z, wrong)
