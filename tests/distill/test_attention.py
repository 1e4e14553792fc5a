"""Attention maps, attention matrices and relations: what the shared laws leave out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.distill import feature_oracles as oracle

d = jc.distill
RNG = np.random.default_rng(4)
STUDENT = RNG.normal(size=(3, 4, 2)).astype(np.float32)
TEACHER = RNG.normal(size=(3, 4, 5)).astype(np.float32)


def maps(power: float) -> Any:
    return jax.jit(
        lambda s, t: d.attention_transfer(s, t, power=power, position_axes=1)
    )


def test_maps_do_not_depend_on_the_scale_and_high_powers_do_not_overflow() -> None:
    loss = maps(8.0)(1e6 * STUDENT, 1e-6 * TEACHER)
    wide = [x.astype(np.float64) for x in (STUDENT, TEACHER)]
    expected = oracle.attention_transfer(*wide, np.ones(3, bool), power=8)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_power_matters() -> None:
    assert not np.allclose(maps(1.0)(STUDENT, TEACHER), maps(4.0)(STUDENT, TEACHER))


def test_maps_of_other_sizes_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"same positions; .*jax\.image\.resize"):
        d.attention_transfer(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 8, 8, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"power": 0.5, "position_axes": 1}, "power must be 1 or more; got 0.5"),
        ({"position_axes": 0}, "position_axes must be 1 or more"),
        ({"position_axes": 3}, "position_axes must be 1 or more"),
        (
            {"position_axes": 1, "where": np.ones((3, 3), bool)},
            r"shape \(3,\) or \(3, 4\)",
        ),
    ],
    ids=["power", "no positions", "no channels", "where"],
)
def test_settings_out_of_range_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"distill\.attention_transfer: .*{message}"):
        d.attention_transfer(STUDENT, TEACHER, **settings)


def test_a_mask_of_padded_keys_is_broadcast() -> None:
    """Scores of padded keys are -inf, as models have them before the softmax."""
    s, t = RNG.normal(size=(2, 2, 2, 3, 3)).astype(np.float32)
    keys = np.array([[True, True, False], [True, True, True]])[:, None, None]
    full = np.broadcast_to(keys, s.shape)
    hidden = [np.where(full, x, -np.inf).astype(np.float32) for x in (s, t)]
    loss = jax.jit(
        lambda s, t, w: d.attention_matrices(s, t, divergence="mse", where=w)
    )(*hidden, keys)
    np.testing.assert_allclose(
        loss, oracle.attention_mse(s, t, full), rtol=1e-5, atol=1e-6
    )


def test_keys_without_attention_have_a_finite_loss() -> None:
    s, t = jnp.array([[0.0, 0.5, 0.5]]), jnp.array([[0.5, 0.5, 0.0]])
    f = lambda s: d.attention_matrices(s, t).sum()
    loss, grad = jax.jit(jax.value_and_grad(f))(s)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    np.testing.assert_allclose(loss, 0.5 * np.log(0.5 / tiny), rtol=1e-5)
    assert np.isfinite(grad).all()
    assert grad[0, 2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, "divergence must be 'kl' or 'mse'; got 'js'"),
        ({"where": np.ones((2, 3), bool)}, r"broadcast to \(2, 2, 3, 3\)"),
        ({"where": np.ones((2, 1, 1, 3))}, r"got float32\[2, 1, 1, 3\]"),
        ({"teacher": np.ones((2, 4, 3, 3), np.float32)}, "mean over heads first"),
    ],
    ids=["divergence", "axes", "dtype", "heads"],
)
def test_matrices_that_do_not_agree_are_refused(change: Any, message: str) -> None:
    x = np.full((2, 2, 3, 3), 1 / 3, np.float32)
    with pytest.raises(ValueError, match=rf"distill\.attention_matrices: .*{message}"):
        d.attention_matrices(**{"student": x, "teacher": x, **change})


relation = jax.jit(d.relation, static_argnames="heads")


def test_relations_do_not_see_a_turn_within_a_head_but_one_across_heads() -> None:
    x = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    swapped = x[..., [1, 0, 3, 2]]
    np.testing.assert_allclose(relation(swapped, x, heads=2), 0, atol=1e-5)
    assert (np.asarray(relation(swapped, x, heads=4)).sum(-1) > 1e-3).all()


def test_longer_padding_changes_nothing() -> None:
    s, t = RNG.normal(size=(2, 2, 5, 4)).astype(np.float32)
    where = np.arange(5) < np.array([[3], [3]])
    padded = relation(s, t, heads=2, where=where)
    short = relation(s[:, :3], t[:, :3], heads=2)
    np.testing.assert_allclose(padded[:, :3], short, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shapes", "heads", "message"),
    [
        (((2, 5, 4), (2, 5, 6)), 4, "got 4 for 4 and 6. Any divisor of 2 will do"),
        (((2, 5, 4), (2, 5, 4)), 0, "heads must divide"),
        (((2, 5, 4), (2, 4, 4)), 2, "agree in all axes but the last"),
        (((4,), (4,)), 2, r"must be \[..., positions, features\]"),
    ],
    ids=["features", "none", "positions", "one vector"],
)
def test_relations_that_are_not_defined_are_refused(
    shapes: Any, heads: int, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"distill\.relation: .*{message}"):
        d.relation(*map(jnp.zeros, shapes), heads=heads)
