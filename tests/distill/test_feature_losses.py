"""Every loss on features: values, gradients and masks against float64 loops."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distill import GaussianVariance
from tests.distill import feature_oracles as oracle

d = jc.distill


class Case(NamedTuple):
    loss: Callable[..., jax.Array]
    oracle: Callable[..., np.ndarray]
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    where: tuple[int, ...]
    values: str = "normal"


def variational(s: Any, t: Any, where: Any = None) -> jax.Array:
    params = GaussianVariance(jnp.asarray(oracle.RAW_VARIANCE, jnp.float32))
    return d.variational_information(s, t, params, min_variance=1e-3, where=where)


def pair_cosine(s: Any, t: Any, where: Any = None) -> jax.Array:
    parts = [(x[:, 0], x[:, 1]) for x in (s, t)]
    return d.pair_cosine(*parts, where=where)


activity = partial(d.attention_transfer, power=3)
tokens = partial(d.attention_transfer, position_axes=1)
scores = partial(d.attention_matrices, divergence="mse")
BATCH = ((6, 4), (6, 3), (6,))
CASES = {
    "hint": Case(d.hint, oracle.hint, (2, 3, 4), (2, 3, 4), (2, 3)),
    "hint, normalized": Case(
        partial(d.hint, normalize=True),
        oracle.normalized_hint,
        (2, 3, 4),
        (2, 3, 4),
        (2, 3),
    ),
    "embedding_mse": Case(d.embedding_mse, oracle.hint, (3, 4), (3, 4), (3,)),
    "cosine_embedding": Case(
        d.cosine_embedding, oracle.cosine_embedding, (2, 3, 4), (2, 3, 4), (2, 3)
    ),
    "pair_cosine": Case(pair_cosine, oracle.pair_cosine, (4, 2, 3), (4, 2, 5), (4,)),
    "variational_information": Case(
        variational, oracle.variational_information, (2, 3, 4), (2, 3, 4), (2, 3)
    ),
    "attention_transfer": Case(
        d.attention_transfer,
        oracle.attention_transfer,
        (4, 2, 2, 2),
        (4, 2, 2, 3),
        (4,),
    ),
    "attention_transfer, power": Case(
        activity,
        partial(oracle.attention_transfer, power=3),
        (3, 2, 2, 2),
        (3, 2, 2, 3),
        (3, 2, 2),
    ),
    "attention_transfer, tokens": Case(
        tokens, oracle.attention_transfer, (3, 4, 2), (3, 4, 3), (3, 4)
    ),
    "attention_matrices": Case(
        d.attention_matrices,
        oracle.attention_kl,
        (2, 2, 3, 3),
        (2, 2, 3, 3),
        (2, 2, 3, 3),
        "probabilities",
    ),
    "attention_matrices, mse": Case(
        scores, oracle.attention_mse, (2, 2, 3, 3), (2, 2, 3, 3), (2, 2, 3, 3)
    ),
    "relation": Case(
        partial(d.relation, heads=2), oracle.relation, (2, 4, 4), (2, 4, 6), (2, 4)
    ),
    "similarity_preserving": Case(
        d.similarity_preserving, oracle.similarity_preserving, *BATCH
    ),
    "similarity_preserving, tokens": Case(
        d.similarity_preserving,
        oracle.similarity_preserving,
        (5, 3, 2),
        (5, 3, 4),
        (5, 3),
    ),
    "relational_distance": Case(
        d.relational_distance, oracle.relational_distance, *BATCH
    ),
    "relational_angle": Case(d.relational_angle, oracle.relational_angle, *BATCH),
    "probabilistic_transfer": Case(
        d.probabilistic_transfer, oracle.probabilistic_transfer, *BATCH
    ),
    "info_nce": Case(
        partial(d.info_nce, temperature=0.3), oracle.info_nce, (6, 4), (6, 4), (6,)
    ),
}
BATCHED = [
    name
    for name in CASES
    if name.split(",")[0]
    in (
        "similarity_preserving",
        "relational_distance",
        "relational_angle",
        "probabilistic_transfer",
        "info_nce",
    )
]


class Drawn(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray
    where: np.ndarray
    weights: np.ndarray


def draw(name: str) -> Drawn:
    case, rng = CASES[name], np.random.default_rng(zlib.crc32(name.encode()))
    s, t = rng.normal(size=case.student), 3 * rng.normal(size=case.teacher) + 1
    if case.values == "probabilities":
        s, t = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (s, t))
    where = rng.random(case.where) < 0.6
    where.flat[[0, -2, -1]] = [True, True, False]
    where.reshape(len(where), -1)[-1] = False  # An example without anything.
    weights = rng.uniform(0.5, 2.0, case.oracle(s, t, where).shape)
    rounded = [x.astype(np.float32).astype(np.float64) for x in (s, t)]
    return Drawn(*rounded, where, weights)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Loss and gradients by student and teacher, of the weighted sum."""

    def all_of(loss: Any) -> Any:
        def total(s: Any, t: Any, where: Any, weights: Any) -> Any:
            shares = loss(s, t, where=where)
            return (shares * weights).sum(), shares

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    return {name: all_of(case.loss) for name, case in CASES.items()}


def run(f: Any, x: Drawn, where: np.ndarray) -> tuple[Any, ...]:
    single = [a.astype(np.float32) for a in (x.student, x.teacher)]
    grads, loss = f(*single, where, x.weights.astype(np.float32))
    return loss, *grads


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_masks(name: str, compiled: dict[str, Any]) -> None:
    case = CASES[name]
    x = draw(name)
    for where in (np.ones(case.where, bool), x.where):
        loss, grad, teacher_grad = run(compiled[name], x, where)
        expected = case.oracle(x.student, x.teacher, where)
        total = lambda s, w=where: (case.oracle(s, x.teacher, w) * x.weights).sum()
        slope = oracle.gradient(total, x.student)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(
            grad, slope, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(slope).max())
        )
        assert not np.asarray(teacher_grad).any()
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_count_may_be_nan(name: str, compiled: dict[str, Any]) -> None:
    case = CASES[name]
    x = draw(name)
    loss, grad, _ = run(compiled[name], x, x.where)

    def spoilt(a: np.ndarray) -> np.ndarray:
        mask = x.where.reshape(case.where + (1,) * (a.ndim - len(case.where)))
        return np.where(mask, a, np.nan)

    spoilt_x = x._replace(student=spoilt(x.student), teacher=spoilt(x.teacher))
    other, other_grad, _ = run(compiled[name], spoilt_x, x.where)
    np.testing.assert_array_equal(other, loss)
    np.testing.assert_array_equal(other_grad, grad)
    empty = ~x.where.reshape(len(x.where), -1).any(-1)
    assert empty.any()
    assert not np.asarray(loss)[empty].any()
    assert not np.asarray(grad)[empty].any()


@pytest.mark.parametrize("name", CASES)
def test_without_a_mask_all_count_and_half_precision_is_widened(name: str) -> None:
    case = CASES[name]
    x = draw(name)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (x.student, x.teacher)]
    loss = jax.jit(case.loss)(*half)
    wide = [np.asarray(a, np.float64) for a in half]
    expected = case.oracle(*wide, np.ones(case.where, bool))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BATCHED)
def test_permuting_a_batch_permutes_the_shares(
    name: str, compiled: dict[str, Any]
) -> None:
    x = draw(name)
    order = np.roll(np.arange(len(x.student)), 2)
    loss, grad, _ = run(compiled[name], x, x.where)
    moved = Drawn(*(a[order] for a in x))
    after, after_grad, _ = run(compiled[name], moved, moved.where)
    np.testing.assert_allclose(after, loss[order], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after_grad, grad[order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["equal", "zero", "nothing counts"])
def test_degenerate_features_have_finite_gradients(
    name: str, kind: str, compiled: dict[str, Any]
) -> None:
    case = CASES[name]
    x = draw(name)
    where = np.full(case.where, kind != "nothing counts")
    value = {"equal": 1.0, "zero": 0.0, "nothing counts": np.nan}[kind]
    x = x._replace(student=np.full_like(x.student, value))
    if kind == "nothing counts":
        x = x._replace(teacher=np.full_like(x.teacher, value))
    loss, grad, _ = run(compiled[name], x, where)
    assert np.isfinite(loss).all()
    assert np.isfinite(grad).all()
    if kind == "nothing counts":
        assert not np.asarray(loss).any()
        assert not np.asarray(grad).any()


MODULES = (
    "_hints",
    "_embeddings",
    "_attention_transfer",
    "_relation",
    "_similarity",
    "_probabilistic",
    "_info_nce",
    "_variational",
)


def test_every_loss_on_features_has_a_case() -> None:
    losses = {
        name
        for name, f in vars(d).items()
        if inspect.isfunction(f)
        and list(inspect.signature(f).parameters)[:2] == ["student", "teacher"]
        and "where" in inspect.signature(f).parameters
        and any(part in f.__module__ for part in MODULES)
    }
    assert losses == {name.split(",")[0] for name in CASES}
