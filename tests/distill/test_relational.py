"""Losses over a batch: invariances, small batches, memory, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.distill import feature_oracles as oracle

d = jc.distill
RNG = np.random.default_rng(3)
STUDENT = RNG.normal(size=(6, 4)).astype(np.float32)
TEACHER = RNG.normal(size=(6, 3)).astype(np.float32)
EVERYONE = np.ones(6, bool)
LOSSES = {
    f.__name__: jax.jit(f)
    for f in (
        d.similarity_preserving,
        d.relational_distance,
        d.relational_angle,
        d.probabilistic_transfer,
    )
}
RELATIONAL = ("relational_distance", "relational_angle")


@pytest.mark.parametrize("name", LOSSES)
def test_scaled_and_turned_features_are_the_same(name: str) -> None:
    turn = np.linalg.qr(RNG.normal(size=(4, 4)))[0].astype(np.float32)
    loss = LOSSES[name](STUDENT, TEACHER, where=EVERYONE)
    moved = LOSSES[name](64.0 * STUDENT @ turn, 0.01 * TEACHER, where=EVERYONE)
    np.testing.assert_allclose(moved, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RELATIONAL)
def test_moved_features_are_the_same(name: str) -> None:
    loss = LOSSES[name](STUDENT, TEACHER, where=EVERYONE)
    moved = LOSSES[name](STUDENT + 5.0, TEACHER - 3.0, where=EVERYONE)
    np.testing.assert_allclose(moved, loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("number", [1, 2])
def test_too_few_examples_to_relate_give_no_loss(name: str, number: int) -> None:
    where = np.arange(6) < number
    loss = np.asarray(LOSSES[name](STUDENT, TEACHER, where=where))
    expected = {
        "similarity_preserving": number > 1,
        "relational_distance": False,  # One pair is at the mean distance.
        "relational_angle": False,
        "probabilistic_transfer": False,  # One neighbour has all probability.
    }[name]
    assert (np.abs(loss) > 1e-6).any() == expected
    assert np.isfinite(loss).all()


def test_equal_examples_are_at_no_distance() -> None:
    student = STUDENT.copy()
    student[1] = student[4]
    total = lambda s: LOSSES["relational_distance"](s, TEACHER, where=EVERYONE).sum()
    loss, grad = jax.value_and_grad(total)(student)
    s, t = student.astype(np.float64), TEACHER.astype(np.float64)
    expected = oracle.relational_distance(s, t, EVERYONE).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert np.isfinite(grad).all()
    assert np.asarray(grad).any(-1).all()


@pytest.mark.parametrize("name", RELATIONAL)
def test_gradients_hold_no_array_of_all_differences(name: str) -> None:
    """Temporaries are at most 1/8 of ``[batch, batch, features]``."""
    batch, features = 64, 1024
    total = jax.value_and_grad(lambda s, t: LOSSES[name](s, t).sum())
    shape = jax.ShapeDtypeStruct((batch, features), jnp.float32)
    memory = jax.jit(total).lower(shape, shape).compile().memory_analysis()
    assert memory is not None
    assert 0 < memory.temp_size_in_bytes < batch * batch * features * 4 / 8


def test_tokens_that_do_not_count_are_as_if_they_were_not_there() -> None:
    tokens = RNG.normal(size=(5, 4, 3)).astype(np.float32)
    where = np.ones((5, 4), bool)
    where[:, 3] = False
    others = RNG.normal(size=(5, 4, 2)).astype(np.float32)
    loss = LOSSES["relational_distance"](tokens, others, where=where)
    short = LOSSES["relational_distance"](tokens[:, :3], others[:, :3])
    np.testing.assert_allclose(loss, short, rtol=1e-5, atol=1e-7)
    assert (np.asarray(loss) > 1e-4).all()


@pytest.mark.parametrize("name", [*LOSSES, "info_nce"])
def test_batches_that_do_not_agree_are_refused(name: str) -> None:
    student: Any = STUDENT[:5]
    message = rf"distill\.{name}: student and teacher must .* \(5, 4\) and \(6, 3\)"
    with pytest.raises(ValueError, match=message):
        getattr(d, name)(student, TEACHER)


@pytest.mark.parametrize(
    ("where", "got"),
    [
        (np.ones(5, bool), r"bool\[5\]"),
        (np.ones(6, np.int32), r"int32\[6\]"),
        (np.ones((6, 4), bool), r"bool\[6, 4\]"),
    ],
    ids=["too few", "not boolean", "over features"],
)
def test_masks_that_do_not_fit_are_refused(where: Any, got: str) -> None:
    message = rf"similarity_preserving: where must be bool of shape \(6,\).* got {got}"
    with pytest.raises(ValueError, match=message):
        d.similarity_preserving(STUDENT, TEACHER, where=where)
