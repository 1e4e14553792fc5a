"""Contrastive distillation with a memory, against float64 loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.distill import feature_oracles as oracle

CRD = jc.distill.contrastive(
    examples=9, features=3, negatives=4, temperature=0.2, momentum=0.75
)
RNG = np.random.default_rng(8)
STUDENT, TEACHER = RNG.normal(size=(2, 4, 3)).astype(np.float32)
INDICES = np.array([7, 0, 3, 8], np.int32)
NEGATIVES = np.array([[1, 2, 3, 3], [8, 7, 6, 5], [0, 1, 2, 4], [0, 0, 5, 7]], np.int32)
WHERE = np.array([True, True, False, True])
MEMORY = CRD.init(jax.random.key(0))
ALL = np.ones(4, bool)

update = jax.jit(CRD.update)


@jax.jit
def gradients(memory: Any, s: Any, t: Any, where: Any) -> Any:
    def total(s: Any, t: Any) -> Any:
        loss = CRD.loss(memory, s, t, INDICES, NEGATIVES, where=where)
        return loss.sum(), loss

    return jax.grad(total, argnums=(0, 1), has_aux=True)(s, t)


class Banks(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray


def wide(memory: Any) -> Banks:
    return Banks(
        np.asarray(memory.student, np.float64), np.asarray(memory.teacher, np.float64)
    )


def scores(x: np.ndarray, bank: np.ndarray, where: np.ndarray) -> np.ndarray:
    """``exp(x . m / tau)`` of each example's own and negatives."""
    rows = np.concatenate([INDICES[:, None], NEGATIVES], -1)
    out = np.zeros(rows.shape)
    for i in np.flatnonzero(where):
        for k, row in enumerate(rows[i]):
            out[i, k] = np.exp(oracle.cosine(x[i], bank[row]) / 0.2)
    return out


def partition(x: np.ndarray, bank: np.ndarray, where: np.ndarray) -> float:
    return scores(x, bank, where)[where].mean() * 9


def losses(
    s: np.ndarray, t: np.ndarray, banks: Banks, z: Any, where: np.ndarray
) -> np.ndarray:
    """Eqs. 18 and 19, both ways."""
    out = np.zeros(4)
    for x, bank, constant in ((s, banks.teacher, z[0]), (t, banks.student, z[1])):
        p = scores(x, bank, where) / constant
        h = p / (p + 4 / 9)
        h = h[where]
        out[where] -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(-1)
    return out


@pytest.mark.parametrize("where", [ALL, WHERE], ids=["all", "some"])
def test_loss_and_gradients_of_a_first_batch(where: np.ndarray) -> None:
    banks, s, t = wide(MEMORY), STUDENT.astype(float), TEACHER.astype(float)
    z = partition(s, banks.teacher, where), partition(t, banks.student, where)
    expected = losses(s, t, banks, z, where)
    spoilt = [np.where(where[:, None], x, np.float32(np.nan)) for x in (s, t)]
    spoilt = [jnp.asarray(x.astype(np.float32)) for x in spoilt]
    grads, loss = gradients(MEMORY, *spoilt, where)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    slopes = (
        oracle.gradient(lambda x: losses(x, t, banks, z, where).sum(), s),
        oracle.gradient(lambda x: losses(s, x, banks, z, where).sum(), t),
    )
    for grad, slope in zip(grads, slopes, strict=True):
        np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-5)
        assert np.abs(slope).max() > 0.1


def test_the_constant_is_that_of_the_first_batch() -> None:
    banks = wide(MEMORY)
    first = update(MEMORY, STUDENT, TEACHER, INDICES, NEGATIVES, where=ALL)
    later = update(first, TEACHER, STUDENT, INDICES, NEGATIVES, where=ALL)
    z = partition(STUDENT, banks.teacher, ALL), partition(TEACHER, banks.student, ALL)
    np.testing.assert_allclose(np.exp(first.log_partition), z, rtol=1e-5)
    np.testing.assert_array_equal(later.log_partition, first.log_partition)
    _, loss = gradients(first, TEACHER, STUDENT, ALL)
    expected = losses(TEACHER, STUDENT, wide(first), z, ALL)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


def test_the_memory_moves_toward_the_batch() -> None:
    after = update(MEMORY, STUDENT, TEACHER, INDICES, NEGATIVES, where=WHERE)
    for bank, x, found in (
        (MEMORY.student, STUDENT, after.student),
        (MEMORY.teacher, TEACHER, after.teacher),
    ):
        expected = np.asarray(bank, np.float64).copy()
        for i in np.flatnonzero(WHERE):
            mixed = 0.75 * expected[INDICES[i]] + 0.25 * x[i] / oracle.length(x[i])
            expected[INDICES[i]] = mixed / oracle.length(mixed)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        untouched = np.setdiff1d(np.arange(9), INDICES[WHERE])
        np.testing.assert_array_equal(found[untouched], bank[untouched])


def test_a_batch_that_does_not_count_leaves_everything() -> None:
    nothing = np.zeros(4, bool)
    after = update(MEMORY, STUDENT, TEACHER, INDICES, NEGATIVES, where=nothing)
    np.testing.assert_array_equal(after.student, MEMORY.student)
    assert not after.measured
    grads, loss = gradients(MEMORY, STUDENT, TEACHER, nothing)
    assert not np.asarray(loss).any()
    assert not any(np.asarray(g).any() for g in grads)


def test_negatives_are_all_the_others_and_the_same_for_the_same_key() -> None:
    crd = jc.distill.contrastive(examples=5, features=2, negatives=4000)
    draw = jax.jit(crd.sample)
    indices = np.array([0, 2, 4])
    drawn = np.asarray(draw(jax.random.key(3), indices))
    for own, row in zip(indices, drawn, strict=True):
        counts = np.bincount(row, minlength=5)
        assert counts[own] == 0
        assert np.delete(counts, own).min() > 880  # 1000 expected, deviation 27.
    np.testing.assert_array_equal(drawn, draw(jax.random.key(3), indices))
    assert (drawn != draw(jax.random.key(4), indices)).any()


def test_directions_of_a_new_memory_are_the_same_for_the_same_key() -> None:
    again, other = CRD.init(jax.random.key(0)), CRD.init(jax.random.key(1))
    np.testing.assert_array_equal(again.student, MEMORY.student)
    assert (np.asarray(other.student) != MEMORY.student).all()
    assert (np.asarray(MEMORY.teacher) != MEMORY.student).all()
    np.testing.assert_allclose(
        np.square(np.asarray(MEMORY.student)).sum(-1), np.ones(9), rtol=1e-5
    )


def test_the_memory_can_be_saved(tmp_path: Path) -> None:
    after = update(MEMORY, STUDENT, TEACHER, INDICES, NEGATIVES, where=ALL)
    jc.io.save(tmp_path / "memory.jc", after._asdict())
    loaded = jc.distill.ContrastiveMemory(**jc.io.load(tmp_path / "memory.jc"))
    jax.tree.map(np.testing.assert_array_equal, after, loaded)


def test_training_on_the_loss_brings_embeddings_together() -> None:
    """Thirty steps on the embeddings themselves, memory and all, in one scan."""
    teacher = jnp.asarray(RNG.normal(size=(9, 3)), jnp.float32)

    def step(carry: Any, key: jax.Array) -> Any:
        student, memory = carry
        rows = jnp.arange(9)
        drawn = CRD.sample(key, rows)
        total = lambda s: CRD.loss(memory, s, teacher, rows, drawn).mean()
        after = CRD.update(memory, student, teacher, rows, drawn)
        return (student - jax.grad(total)(student), after), None

    def run(student: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(5), 30)
        carry = (student, MEMORY)
        return jax.lax.scan(step, carry, keys)[0][0]

    before = jnp.asarray(RNG.normal(size=(9, 3)), jnp.float32)
    after = jax.jit(run)(before)
    near = lambda s: np.mean([oracle.cosine(*x) for x in zip(s, teacher, strict=True)])
    assert near(np.asarray(after)) > near(np.asarray(before)) + 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 1}, "examples must be 2 or more"),
        ({"negatives": 0}, "negatives 1 or more"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1\.0"),
    ],
)
def test_settings_out_of_range_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"distill\.contrastive: .*{message}"):
        jc.distill.contrastive(**{"examples": 9, "features": 3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": np.zeros((4, 5), np.float32)}, r"student .* got \(4, 5\)"),
        ({"negatives": NEGATIVES[:, :2]}, r"negatives .* got \(4, 2\)"),
        ({"indices": INDICES[:3]}, r"student .* shape \(3, 3\)"),
        ({"where": np.ones(3, bool)}, r"where must be bool of shape \(4,\)"),
        ({"indices": INDICES.astype(np.float32)}, r"indices must be integers"),
    ],
    ids=["features", "negatives", "indices", "where", "floats"],
)
def test_arrays_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    arguments = {
        "student": STUDENT,
        "teacher": TEACHER,
        "indices": INDICES,
        "negatives": NEGATIVES,
        **change,
    }
    with pytest.raises(ValueError, match=rf"distill\.contrastive: {message}"):
        CRD.loss(MEMORY, **arguments)
