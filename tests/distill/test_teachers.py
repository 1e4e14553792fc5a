"""Teachers against their definitions in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, 5)).astype(np.float32) * 3
WEIGHTS = RNG.random(size=3).astype(np.float32)
BY_EXAMPLE = RNG.random(size=(3, 4)).astype(np.float32)
BY_EXAMPLE[1, 2] = BY_EXAMPLE[:, 3] = 0.0

average = jax.jit(jc.distill.average, static_argnames="space")
deepest_exit = jax.jit(jc.distill.deepest_exit)
multi_task = jax.jit(jc.distill.multi_task)


def softmax(z: Any) -> np.ndarray:
    p = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def mean(weights: Any, values: Any) -> np.ndarray:
    """One example at a time; zeros where all weights are zero."""
    result = np.zeros(values.shape[1:])
    weights = np.broadcast_to(np.reshape(weights, (3, -1)), (3, 4)).astype(np.float64)
    for i in range(4):
        if weights[:, i].sum() > 0:
            w = weights[:, i] / weights[:, i].sum()
            result[i] = sum(w[t] * values[t, i].astype(np.float64) for t in range(3))
    return result


@pytest.mark.parametrize("weights", [None, WEIGHTS, BY_EXAMPLE], ids=["", "w", "w_i"])
def test_averages_of_logits_and_of_probabilities(weights: Any) -> None:
    w = np.ones(3) if weights is None else weights
    z = average(list(LOGITS), weights=weights)
    np.testing.assert_allclose(z, mean(w, LOGITS), rtol=1e-4, atol=1e-5)
    z = average(list(LOGITS), weights=weights, space="probabilities", temperature=2.0)
    p = mean(w, softmax(LOGITS / 2.0))
    p = np.where(p.sum(-1, keepdims=True) > 0, p, 0.2)
    np.testing.assert_allclose(softmax(np.asarray(z) / 2.0), p, rtol=1e-4)
    assert z.dtype == jnp.float32


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_a_teacher_without_weight_may_be_nan(space: Any) -> None:
    spoiled = LOGITS.copy()
    spoiled[1, 2] = np.nan
    z = average(list(spoiled), weights=BY_EXAMPLE, space=space)
    clean = average(list(LOGITS), weights=BY_EXAMPLE, space=space)
    np.testing.assert_allclose(z, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_no_gradient_flows_to_teachers_or_weights(space: str) -> None:
    total = lambda z, w: average([*z], weights=w, space=space).sum()
    for grad in jax.grad(total, argnums=(0, 1))(LOGITS, WEIGHTS):
        assert not np.asarray(grad).any()


def test_a_class_that_one_teacher_excludes() -> None:
    z = LOGITS[:2].copy()
    z[0, :, 1] = -np.inf
    assert np.isneginf(average(list(z))[:, 1]).all()
    p = softmax(average(list(z), space="probabilities"))
    np.testing.assert_allclose(p, softmax(z).mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teachers": []}, "one or more; got none"),
        ({"teachers": [LOGITS[0], LOGITS[1, :, :4]]}, r"of teacher 1, \(4, 4\)"),
        ({"teachers": [LOGITS[0].astype(int)]}, r"teachers\[0\] must be floating"),
        ({"weights": [1.0, 2.0]}, r"\(3,\), one a teacher, or \(3, 4\).*got \(2,\)"),
        ({"space": "logit"}, "got 'logit'"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_averages_that_mean_nothing_are_refused(settings: Any, message: str) -> None:
    settings = {"teachers": list(LOGITS)} | settings
    with pytest.raises(ValueError, match=rf"distill\.average: .*{message}"):
        jc.distill.average(settings.pop("teachers"), **settings)


def test_the_deepest_exit_teaches_the_others() -> None:
    where = np.array([True, False, True, True])
    spoiled = np.where(where[:, None], LOGITS, np.nan)
    total = lambda z: deepest_exit(
        [*z], temperature=2.0, weights=[0.25, 3.0], where=where
    )

    @jax.jit  # Whole: NaN checks see what comes out, not the NaN that goes in.
    def both(z: Any) -> Any:
        loss, pull = jax.vjp(total, z)
        return loss, *pull(jnp.ones(4, jnp.float32))

    loss, grad = both(spoiled)
    p, expected, expected_grad = (
        softmax(LOGITS[2] / 2),
        np.zeros(4),
        np.zeros((3, 4, 5)),
    )
    for i, w in enumerate([0.25, 3.0]):
        q = softmax(LOGITS[i] / 2)
        expected += w * 4 * (p * np.log(p / q)).sum(-1)
        expected_grad[i] = w * 2 * (q - p)
    np.testing.assert_allclose(loss, np.where(where, expected, 0), rtol=1e-4)
    np.testing.assert_allclose(
        grad, np.where(where[:, None], expected_grad, 0), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(("exits", "weights"), [(0, None), (1, None), (3, [1.0])])
def test_exits_that_do_not_fit_are_refused(exits: int, weights: Any) -> None:
    with pytest.raises(ValueError, match=f"two or more.*got {exits} exits"):
        jc.distill.deepest_exit(list(LOGITS)[:exits], temperature=1.0, weights=weights)


TASKS = {"a": LOGITS[0, :, 0] ** 2, "b": LOGITS[1, :, 0] ** 2}
VARIANCES = {"a": np.float32(0.7), "b": np.float32(-1.3)}
HAVE = {"b": np.array([True, False, True, False])}


def test_tasks_are_weighted() -> None:
    spoiled = TASKS | {"b": np.where(HAVE["b"], TASKS["b"], np.float32("nan"))}
    loss = multi_task(spoiled, weights={"a": 0.3}, where=HAVE)
    expected = 0.3 * TASKS["a"] + np.where(HAVE["b"], TASKS["b"], 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_uncertainty_weighs_tasks_and_learns_from_their_losses() -> None:
    total = lambda s: multi_task(TASKS, log_variances=s, weights={"a": 2.0}, where=HAVE)
    loss, pull = jax.vjp(total, VARIANCES)
    (grad,) = pull(np.ones(4, np.float32))
    s = {task: float(v) for task, v in VARIANCES.items()}
    a = 2.0 * (np.exp(-s["a"]) * TASKS["a"] + s["a"] / 2)
    b = np.where(HAVE["b"], np.exp(-s["b"]) * TASKS["b"] + s["b"] / 2, 0)
    np.testing.assert_allclose(loss, a + b, rtol=1e-5)
    slope = (2.0 * (0.5 - np.exp(-s["a"]) * TASKS["a"])).sum()
    np.testing.assert_allclose(grad["a"], slope, rtol=1e-5)
    slope = (HAVE["b"] * (0.5 - np.exp(-s["b"]) * TASKS["b"])).sum()
    np.testing.assert_allclose(grad["b"], slope, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {}}, "one task or more"),
        ({"losses": {"a": np.ones(2), "b": np.ones(3)}}, r"\(3,\) for 'b'"),
        ({"log_variances": {"a": 0.0}}, "'b' is not in it"),
        ({"weights": {"c": 1.0}}, r"weights names the task 'c'.*\['a', 'b'\]"),
        ({"where": {"a": np.ones(3)}}, "'a': where must have one boolean"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    settings = {"losses": TASKS} | change
    with pytest.raises(ValueError, match=rf"distill\.multi_task.*{message}"):
        jc.distill.multi_task(settings.pop("losses"), **settings)


PAST = RNG.normal(size=(6, 3)).astype(np.float32)


def tree_of(w: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"w": jnp.asarray(w, dtype), "count": jnp.int32(7)}


@pytest.mark.parametrize("decay", [0.9, "schedule"])
def test_the_mean_teacher_is_the_weighted_mean_of_what_it_saw(decay: Any) -> None:
    if decay == "schedule":
        decay = jc.schedules.linear(0.0, 0.9, begin=0, end=4)
        decays = [0.0, 0.225, 0.45, 0.675, 0.9, 0.9]
    else:
        decays = [decay] * 6
    teacher = jc.distill.ema_teacher(decay)
    update = jax.jit(teacher.update)
    state = teacher.init(tree_of(PAST[0]))
    for t in range(6):
        params, state = update(tree_of(PAST[t]), state)
        weights = [
            (1 - decays[i]) * np.prod(decays[i + 1 : t + 1]) for i in range(t + 1)
        ]
        seen = PAST[: t + 1].astype(np.float64)
        expected = (np.array(weights)[:, None] * seen).sum(0) / sum(weights)
        np.testing.assert_allclose(params["w"], expected, rtol=1e-4, atol=1e-6)
        assert params["count"] == 7


def test_a_decay_of_one_at_the_start_leaves_the_student() -> None:
    teacher = jc.distill.ema_teacher(jc.schedules.one_shot(0.5, at=2, before=1.0))
    update, state, seen = jax.jit(teacher.update), teacher.init(tree_of(0.0)), []
    for w in (1.0, 2.0, 3.0, 5.0):
        params, state = update(tree_of(w), state)
        seen.append(float(params["w"]))
    np.testing.assert_allclose(seen, [1.0, 2.0, 3.0, 3 + 2 * 0.5 / 0.75], rtol=1e-6)


def test_the_mean_teacher_moves_in_bfloat16() -> None:
    teacher = jc.distill.ema_teacher(0.999)
    update = jax.jit(teacher.update)
    state = teacher.init(tree_of(1.0, jnp.bfloat16))
    for step in range(400):
        params, state = update(tree_of(float(step >= 100), jnp.bfloat16), state)
    weights = 0.999 ** np.arange(400)[::-1]
    expected = weights[100:].sum() / weights.sum()
    assert params["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(float(params["w"]), expected, rtol=2**-8)


def test_the_mean_teacher_of_a_quantized_student() -> None:
    """What is averaged is what is trained; the view quantizes the average."""
    scheme = jc.select({"w": jc.quant.weights(jc.quant.int4(group_size=2))})
    params, state = scheme.init(
        {"w": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)}
    )
    teacher = jc.distill.ema_teacher(0.5)

    @jax.jit
    def run(params: Any) -> Any:
        later = jax.tree.map(lambda a: a + 1.0, params)
        _, ema = teacher.update(params, teacher.init(params))
        taught, _ = teacher.update(later, ema)
        return taught, jc.materialize(scheme.view(taught, state))

    taught, seen = run(params)
    np.testing.assert_allclose(taught["w"], params["w"] + 2 / 3, rtol=1e-5)
    assert len(np.unique(seen["w"])) < 8


def test_a_snapshot_is_taken_every_so_many_steps() -> None:
    teacher = jc.distill.snapshot_teacher(every=3)
    update = jax.jit(teacher.update)
    state = teacher.init(tree_of(-1.0))
    seen = []
    for step in range(1, 8):
        params, state = update(tree_of(float(step)), state)
        seen.append(float(params["w"]))
    assert seen == [-1, -1, 3, 3, 3, 6, 6]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\); got {decay}"):
        jc.distill.ema_teacher(decay)


def test_snapshots_at_no_step_are_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1 step; got 0"):
        jc.distill.snapshot_teacher(every=0)


def test_unquantized_weights_teach_their_quantized_selves() -> None:
    """One apply function; the quantized student comes nearer to its teacher."""
    scheme = jc.select({"w": jc.quant.weights(jc.quant.int2(group_size=8))})
    rng = np.random.default_rng(0)
    original = {"w": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)}
    x = rng.normal(size=(64, 8)).astype(np.float32)
    params, state = scheme.init(original)
    apply = jc.lift(lambda p, x: x @ p["w"])

    def loss(p: Any) -> jax.Array:
        student, teacher = apply(scheme.view(p, state), x), apply(original, x)
        return jc.distill.soft_targets(student, teacher, temperature=2.0).mean()

    step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(60):
        value, grad = step(params)
        losses.append(float(value))
        params = jax.tree.map(lambda a, g: a - 0.3 * g, params, grad)
    assert min(losses) < 0.8 * losses[0]
    assert losses[0] > 0.05
