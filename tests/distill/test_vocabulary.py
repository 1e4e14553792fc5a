"""The loss in chunks of classes against the loss of the logits."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from experiments.benchmarks import bench_vocabulary_loss as bench
from tests.distill import logit_oracles as oracle
from tests.distill.logit_oracles import LABELS, WHERE

RNG = np.random.default_rng(3)
LOSSES = {
    "forward": oracle.soft_targets,
    "reverse": oracle.reverse_kl,
    "jensen_shannon": oracle.jensen_shannon,
}


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


H, W, B = draw(2, 3, 4), draw(4, 13), draw(13)
H_T, W_T, B_T = draw(2, 3, 6), draw(6, 13), draw(13)


def run(divergence: Any, chunk: int, shards: int = 1, **options: Any) -> Any:
    """``(loss, gradients by all six arrays)``, in one jit."""

    def total(arrays: Any) -> Any:
        h, w, b, h_t, w_t, b_t = arrays
        biases = {"student_bias": b, "teacher_bias": b_t}
        settings = {"divergence": divergence, "chunk": chunk, "shards": shards}
        loss = jc.distill.vocabulary_loss(
            h, w, h_t, w_t, temperature=2.0, **settings, **biases, **options
        )
        return loss.sum(), loss

    return jax.jit(lambda *arrays: jax.grad(total, has_aux=True)(arrays)[::-1])


@pytest.mark.parametrize(
    ("divergence", "chunk", "shards"),
    [
        ("forward", 5, 1),
        ("forward", 99, 1),
        ("reverse", 4, 2),
        ("jensen_shannon", 5, 1),
    ],
)
def test_value_and_gradient_are_those_of_the_definition(
    divergence: Any, chunk: int, shards: int
) -> None:
    """With padding that holds NaN, and a class that the teacher does not have."""
    k = 13 if shards == 1 else 12
    b_t = np.where(np.arange(k) == 3, -np.inf, B_T[:k])
    given = [H, W[:, :k], B[:k], H_T, W_T[:, :k], b_t.astype(np.float32)]
    padded = [oracle.hidden(a) if a.ndim == 3 else a for a in given]
    loss, grads = run(divergence, chunk, shards, where=WHERE)(*padded)

    def of(h: Any, w: Any, b: Any) -> np.ndarray:
        beta = {"beta": 0.5} if divergence == "jensen_shannon" else {}
        logits = h @ w + b, H_T.astype(np.float64) @ W_T[:, :k] + b_t
        return np.where(WHERE, LOSSES[divergence](*logits, temperature=2.0, **beta), 0)

    wide = [a.astype(np.float64) for a in given[:3]]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, of(*wide), rtol=1e-5, atol=1e-6)
    for i in range(3):
        moved = lambda x, i=i: of(*(x if i == j else a for j, a in enumerate(wide)))
        np.testing.assert_allclose(grads[i], oracle.slope(moved, wide[i]), atol=2e-5)
    assert not any(np.asarray(g).any() for g in grads[3:])


def test_gradients_equal_the_plain_form_within_the_bound_of_float32() -> None:
    """4k classes; 128k by `experiments.benchmarks.bench_vocabulary_loss`."""
    small = bench.Settings(
        classes=4096, examples=24, width=16, teacher_width=24, chunk=1000
    )
    apart = bench.gradients_apart(small)
    assert apart["hidden"]["of_bound"] < 1.0
    assert apart["kernel"]["of_bound"] < 1.0
    assert apart["hidden"]["relative_to_largest"] < 1e-5
    assert apart["kernel"]["relative_to_largest"] < 1e-5


@pytest.mark.parametrize("divergence", ["forward", "jensen_shannon"])
def test_it_takes_an_eighth_of_the_memory_of_the_plain_form(divergence: Any) -> None:
    small = bench.Settings(
        classes=4096, examples=256, width=16, teacher_width=24, chunk=128
    )
    found = bench.temporary_bytes(small, divergence)
    logits = 4096 * 256 * 4
    assert found["plain"] >= logits
    assert found["chunked"] <= found["plain"] / 8
    assert found["chunked"] <= logits / 2


def test_half_precision_gives_float32_losses_and_gradients_of_its_own() -> None:
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in (H, W, B, H_T, W_T, B_T)]
    loss, grads = run("forward", 5)(*arrays)
    h, w, b, h_t, w_t, b_t = (np.asarray(a, np.float64) for a in arrays)
    expected = oracle.soft_targets(h @ w + b, h_t @ w_t + b_t, temperature=2.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    of = lambda w: oracle.soft_targets(h @ w + b, h_t @ w_t + b_t, temperature=2.0)
    slopes = oracle.slope(of, w)
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(
        np.asarray(grads[1], np.float64), slopes, atol=0.01 * np.abs(slopes).max()
    )


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))


def test_sharded_kernels_are_never_gathered(mesh: jax.sharding.Mesh) -> None:
    given = [H, draw(4, 80), draw(80), H_T, draw(6, 80), draw(80)]
    alone = run("forward", 4)(*given)
    on = lambda a: NamedSharding(mesh, P(*(None,) * (a.ndim - 1), "d"))
    spread = [a if a.ndim == 3 else jax.device_put(a, on(a)) for a in given]
    f = run("forward", 4, 8)
    together = f(*spread)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)
    text = f.lower(*spread).compile().as_text()
    assert "all-reduce" in text
    assert not re.findall("all-gather|all-to-all|collective-permute", text)
    assert together[1][1].sharding.is_equivalent_to(on(W), 2)


def test_losses_of_logits_whose_classes_are_sharded(mesh: jax.sharding.Mesh) -> None:
    s, t = draw(2, 3, 16), draw(2, 3, 16)

    @jax.jit
    def losses(s: jax.Array, t: jax.Array) -> tuple[Any, Any]:
        def total(s: jax.Array) -> Any:
            d, T = jc.distill, {"temperature": 2.0}
            found = {
                "soft_targets": d.soft_targets(s, t, **T),
                "mix": d.mix(s, t, LABELS, alpha=0.5, **T),
                "reverse_kl": d.reverse_kl(s, t, **T),
                "jensen_shannon": d.jensen_shannon(s, t, **T),
                "logit_mse": d.logit_mse(s, t),
                "decoupled": d.decoupled(s, t, LABELS, beta=2.0, **T),
                "dist": d.dist(s, t),
                "standardize": d.soft_targets(d.standardize(s), d.standardize(t), **T),
            }
            return sum(x.sum() for x in found.values()), found

        return jax.grad(total, has_aux=True)(s)

    on = NamedSharding(mesh, P(None, None, "d"))
    alone = losses(s, t)
    together = losses(jax.device_put(s, on), jax.device_put(t, on))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_kernel": W.T}, r"student_kernel must be \[4, classes\] .*\(13, 4\)"),
        ({"teacher_kernel": W_T[:, :9]}, r"same examples and classes; .*\(6, 9\)"),
        ({"teacher": H_T[0]}, r"same examples and classes; .* \(3, 6\)"),
        ({"student_bias": B[:5]}, r"student_bias must be of shape \(13,\); got \(5,\)"),
        ({"student": H.astype(np.int32)}, r"student must be floating"),
        ({"where": WHERE[0]}, r"where must have .* bool\[2, 3\]; got bool\[3\]"),
        ({"chunk": 0}, "chunk must be 1 or more classes; got 0"),
        ({"shards": 2}, "shards must divide the classes; got 2 for 13"),
        ({"divergence": "backward"}, "divergence must be .*; got 'backward'"),
        ({"temperature": -1.0}, "temperature must be positive and finite; got -1.0"),
        ({"beta": 1.0}, "beta must be between 0 and 1, both excluded; got 1.0"),
        (
            {"teacher": np.where(np.arange(6) == 2, np.nan, H_T).astype(np.float32)},
            r"the teacher's hidden states must be finite.*got 6 of 6 examples",
        ),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "student": H,
        "student_kernel": W,
        "teacher": H_T,
        "teacher_kernel": W_T,
        "temperature": 2.0,
    }
    with pytest.raises(ValueError, match=r"distill\.vocabulary_loss: .*" + message):
        jc.distill.vocabulary_loss(**(given | change))
