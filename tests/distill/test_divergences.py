"""Losses of logits against their definitions in float64, in value and gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distill._labels import targets
from tests.distill import logit_oracles as oracle
from tests.distill.logit_oracles import LABELS, STUDENT, TEACHER, WHERE

LOSSES: dict[str, dict[str, Any]] = {
    "soft_targets": {"temperature": 3.0},
    "reverse_kl": {"temperature": 3.0},
    "jensen_shannon": {"temperature": 3.0, "beta": 0.3},
    "logit_mse": {},
    "decoupled": {"temperature": 3.0, "alpha": 0.7, "beta": 4.0},
}
REST: dict[str, tuple[Any, ...]] = {"decoupled": (LABELS,)}
every_loss = pytest.mark.parametrize("name", LOSSES)


def close(got: Any, expected: Any) -> None:
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@every_loss
def test_the_definition_and_its_gradient_where_examples_count(name: str) -> None:
    """Others hold NaN and, for labels, padding."""
    rest = tuple(np.where(WHERE, r, -100) for r in REST.get(name, ()))
    settings = LOSSES[name]
    s, t = oracle.hidden(STUDENT), oracle.hidden(TEACHER)
    loss, grad = oracle.compiled(name)(s, t, *rest, where=WHERE, **settings)
    of = lambda z: getattr(oracle, name)(z, TEACHER, *REST.get(name, ()), **settings)
    close(loss, np.where(WHERE, of(STUDENT), 0.0))
    close(grad, np.where(WHERE[..., None], oracle.slope(of, STUDENT), 0.0))


def test_half_precision_is_widened_first() -> None:
    s, t = (jnp.asarray(z[0], jnp.bfloat16) for z in (STUDENT, TEACHER))
    wide = [np.asarray(z, np.float64) for z in (s, t)]
    rest = {name: tuple(r[0] for r in REST.get(name, ())) for name in LOSSES}
    losses = jax.jit(
        lambda s, t: {
            name: getattr(jc.distill, name)(s, t, *rest[name], **LOSSES[name])
            for name in LOSSES
        }
    )(s, t)
    for name, loss in losses.items():
        close(loss, getattr(oracle, name)(*wide, *rest[name], **LOSSES[name]))


@every_loss
def test_what_the_teacher_excludes_has_a_finite_loss_and_gradient(name: str) -> None:
    teacher = TEACHER.copy()
    teacher[..., 1] = -np.inf
    rest = tuple(np.where(r == 1, 0, r) for r in REST.get(name, ()))
    loss, grad = oracle.compiled(name)(STUDENT, teacher, *rest, **LOSSES[name])
    of = lambda z: getattr(oracle, name)(z, teacher, *rest, **LOSSES[name])
    close(loss, of(STUDENT))
    close(grad, oracle.slope(of, STUDENT))


def test_no_gradient_flows_to_the_teacher() -> None:
    def total(t: jax.Array) -> jax.Array:
        losses = [
            getattr(jc.distill, name)(STUDENT, t, *REST.get(name, ()), **settings)
            for name, settings in LOSSES.items()
        ]
        return sum(losses, start=jnp.zeros((2, 3))).sum()

    assert not np.asarray(jax.jit(jax.grad(total))(TEACHER)).any()


@pytest.mark.parametrize("name", ["soft_targets", "reverse_kl", "jensen_shannon"])
def test_a_shift_of_all_logits_changes_nothing(name: str) -> None:
    shift = np.array([[[40.0], [-3.0], [0.0]], [[11.0], [-80.0], [5.0]]], np.float32)
    run = oracle.compiled(name)
    loss, grad = run(STUDENT, TEACHER, **LOSSES[name])
    shifted, same = run(STUDENT + shift, TEACHER - shift, **LOSSES[name])
    np.testing.assert_allclose(shifted, loss, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(same, grad, atol=1e-3)
    np.testing.assert_allclose(
        run(TEACHER + shift, TEACHER, **LOSSES[name])[0], 0.0, atol=2e-4
    )


def test_a_high_temperature_leaves_half_the_centred_squares() -> None:
    """Their sum by twice the classes, with an error that falls as one by T."""
    student = STUDENT + np.float32(4.0)
    loss, grad = oracle.compiled("soft_targets")(student, TEACHER, temperature=100.0)
    limit, slope = oracle.compiled("logit_mse", centred=True)(student, TEACHER)
    np.testing.assert_allclose(
        limit, oracle.logit_mse(student, TEACHER, centred=True), rtol=1e-5
    )
    np.testing.assert_allclose(loss, limit / 2, rtol=0.05)
    np.testing.assert_allclose(grad, slope / 2, atol=0.05 * np.abs(slope).max())


@pytest.mark.parametrize(
    ("name", "beta", "share"),
    [("soft_targets", 1e-3, 1e-3), ("reverse_kl", 1.0 - 1e-3, 1e-3)],
)
def test_jensen_shannon_tends_to_both_divergences(
    name: str, beta: float, share: float
) -> None:
    settings = {"temperature": 3.0, "beta": beta}
    loss, grad = oracle.compiled("jensen_shannon")(STUDENT, TEACHER, **settings)
    limit, slope = oracle.compiled(name)(STUDENT, TEACHER, temperature=3.0)
    np.testing.assert_allclose(loss / share, limit, rtol=0.02)
    np.testing.assert_allclose(grad / share, slope, atol=0.02 * np.abs(slope).max())


def test_jensen_shannon_is_bounded_where_the_outputs_exclude_each_other() -> None:
    s, t = STUDENT.copy(), TEACHER.copy()
    s[..., :2], t[..., 2:] = -np.inf, -np.inf
    loss, grad = oracle.compiled("jensen_shannon")(s, t, temperature=1.0, beta=0.3)
    bound = -0.3 * np.log(0.3) - 0.7 * np.log(0.7)
    np.testing.assert_allclose(loss, np.full(loss.shape, bound), rtol=1e-5)
    np.testing.assert_allclose(grad, np.zeros(grad.shape), atol=1e-6)


def test_parts_of_the_divergence_add_up_to_it() -> None:
    """``KL = TCKD + (1 - p_y) NCKD``: eq. 6 of the paper on decoupled distillation."""
    p = np.array([[oracle.softmax((z / 3).tolist()) for z in rows] for rows in TEACHER])
    rest = 1.0 - np.take_along_axis(p, LABELS[..., None], -1)[..., 0]
    loss, grad = oracle.compiled("decoupled")(
        STUDENT,
        TEACHER,
        LABELS,
        temperature=3.0,
        alpha=1.0,
        beta=rest.astype(np.float32),
    )
    whole, slope = oracle.compiled("soft_targets")(STUDENT, TEACHER, temperature=3.0)
    np.testing.assert_allclose(loss, whole, rtol=1e-4)
    np.testing.assert_allclose(grad, slope, atol=1e-5)


def test_a_teacher_certain_of_the_label_has_nothing_to_say_of_the_others() -> None:
    teacher = np.where(np.eye(5, dtype=bool)[LABELS], TEACHER, -np.inf)
    loss, grad = oracle.compiled("decoupled")(
        STUDENT, teacher, LABELS, temperature=1.0, alpha=1.0, beta=4.0
    )
    q = np.array([[oracle.softmax(z.tolist()) for z in rows] for rows in STUDENT])
    expected = -np.log(np.take_along_axis(q, LABELS[..., None], -1)[..., 0])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, q - np.eye(5)[LABELS], atol=1e-5)


def test_a_traced_label_out_of_range_gives_nan_and_a_known_one_an_error() -> None:
    labels = LABELS.copy()
    labels[0, 1] = -1
    settings = {"temperature": 1.0, "beta": 1.0}
    with jax.debug_nans(False):
        loss, _ = oracle.compiled("decoupled")(STUDENT, TEACHER, labels, **settings)
    assert np.isnan(loss).tolist() == [[False, True, False], [False] * 3]
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\); got -1.*of 6"):
        jc.distill.decoupled(STUDENT, TEACHER, labels, **settings)
    with pytest.raises(ValueError, match=r"distill\.mix: labels must be in \[0, 5\)"):
        jc.distill.mix(STUDENT, TEACHER, labels, temperature=1.0, alpha=0.5)


@every_loss
def test_errors_name_what_is_wrong(name: str) -> None:
    loss, rest, settings = getattr(jc.distill, name), REST.get(name, ()), LOSSES[name]
    who = rf"distill\.{name}: "
    with pytest.raises(ValueError, match=who + "student and teacher .* same shape"):
        loss(STUDENT, TEACHER[..., :4], *rest, **settings)
    with pytest.raises(ValueError, match=who + r"student must be floating.*int32\["):
        loss(STUDENT.astype(np.int32), TEACHER, *rest, **settings)
    with pytest.raises(ValueError, match=who + r"where must .* bool\[2, 3\]; got bool"):
        loss(STUDENT, TEACHER, *rest, **settings, where=WHERE[:1])
    spoiled = TEACHER.copy()
    spoiled[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=who + r".*got 1 of 6 .* first at \(1, 2\)"):
        loss(STUDENT, spoiled, *rest, **settings)
    with pytest.raises(ValueError, match=who + r".*got 1 of 6 .* first at \(1, 2\)"):
        jax.jit(lambda s: loss(s, spoiled, *rest, **settings))(STUDENT)
    if settings:
        with pytest.raises(ValueError, match=who + "temperature must be positive and"):
            loss(STUDENT, TEACHER, *rest, **(settings | {"temperature": np.inf}))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_a_beta_that_mixes_nothing_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"jensen_shannon: beta must .* got {beta}"):
        jc.distill.jensen_shannon(STUDENT, TEACHER, temperature=1.0, beta=beta)


def test_padding_has_some_target_so_that_no_nan_arises_in_between() -> None:
    labels = np.where(WHERE, LABELS, -100)
    target = targets("who", jnp.asarray(labels), STUDENT.shape, jnp.asarray(WHERE))
    expected = np.eye(5, dtype=bool)[np.where(WHERE, LABELS, 0)]
    np.testing.assert_array_equal(target, expected)


def test_labels_of_another_shape_and_a_single_class_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(2, 3\)"):
        jc.distill.decoupled(STUDENT, TEACHER, LABELS[0], temperature=1.0, beta=1.0)
    with pytest.raises(ValueError, match="two classes or more; got 1"):
        jc.distill.decoupled(
            STUDENT[..., :1], TEACHER[..., :1], LABELS * 0, temperature=1.0, beta=1.0
        )
