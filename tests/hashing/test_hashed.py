"""Training hashed weights from scratch: budgets, first values, learning, order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import hashing as h
from tests.hashing.test_array import draw
from tests.jitted import run

KEY = jax.random.key(0)


def params() -> dict[str, Any]:
    return {
        "one": {"kernel": draw(0, 32, 64) / 4, "bias": jnp.zeros(64)},
        "two": {"kernel": draw(1, 64, 8), "bias": jnp.zeros(8)},
    }


def test_a_budget_of_bytes_is_shared_in_proportion() -> None:
    found = jax.eval_shape(lambda p: h.hash_params(p, bytes=1280, key=KEY), params())
    counts = [found[n]["kernel"].buckets.shape[0] for n in ("one", "two")]
    assert counts == [256, 64]
    assert found["one"]["bias"].shape == (64,)


def test_drawn_buckets_keep_the_variance_and_no_two_weights_share() -> None:
    w = {"a": 0.1 * draw(0, 128, 256), "b": 3 * draw(0, 128, 256)}
    found = run(lambda w: h.hash_params(w, "*", ratio=8.0, key=KEY), w)
    for name, leaf in found.items():
        size = np.square(leaf.materialize()).mean()
        assert size == pytest.approx(np.square(w[name]).mean(), rel=0.1)
    corr = np.corrcoef(found["a"].buckets, found["b"].buckets)[0, 1]
    assert abs(corr) < 0.1


def test_training_under_an_optimizer_learns_and_decays_the_buckets() -> None:
    rules = {"*/kernel": h.hashed(ratio=4.0, key=KEY)}
    scheme = jc.select(rules)
    model = jc.lift(
        lambda p, x: (
            jnp.tanh(x @ p["one"]["kernel"] + p["one"]["bias"][None])
            @ p["two"]["kernel"]
        )
    )
    x, y = draw(2, 64, 32), draw(3, 64, 8)
    first, _ = scheme.init(params())
    mask = jc.weight_decay_mask(first)
    assert mask["one"]["kernel"].buckets is True
    assert mask["one"]["bias"] is False
    tx = jc.optim.attach(optax.adam(1e-2), scheme)

    def loss(p: Any, opt: Any) -> jax.Array:
        return jnp.square(model(scheme.view(p, jc.optim.state(opt)), x) - y).mean()

    def train(p: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            p, opt = carry
            value, grads = jax.value_and_grad(loss)(p, opt)
            with jax.numpy_dtype_promotion("standard"):
                updates, opt = tx.update(grads, opt, p)
            return (optax.apply_updates(p, updates), opt), value

        (p, opt), losses = jax.lax.scan(step, (p, tx.init(p)), None, length=100)
        return p, scheme.compress(p, jc.optim.state(opt)), losses

    after, packed, losses = run(train, first)
    assert losses[-1] < 0.3 * losses[0]
    dense = sum(a.nbytes for a in jax.tree.leaves(params()))
    stored = sum(a.nbytes for a in jax.tree.leaves(packed))
    assert stored < 0.3 * dense
    np.testing.assert_array_equal(
        packed["one"]["kernel"].buckets, after["one"]["kernel"].buckets
    )


def test_hashing_comes_first() -> None:
    w = {"w": jax.ShapeDtypeStruct((16, 16), jnp.float32)}
    rule = h.hashed(ratio=4.0)
    for first in (jc.prune.magnitude(sparsity=0.5), h.hashed(ratio=4.0, seed=1)):
        with pytest.raises(jc.OrderError, match="first"):
            jax.eval_shape(lambda w, f=first: jc.chain(f, rule).init(w), w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give ratio="),
        ({"ratio": 2.0, "bytes": 8}, "give ratio="),
        ({"bytes": 5000}, "at most those of the weights, 1024"),
        ({"ratio": 0.0}, "ratio is of weights"),
        ({"ratio": 2.0, "seed": 2**32}, "of 32 bits"),
    ],
)
def test_what_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"hashing.hashed: .*{message}"):
        h.hashed(**options).init({"w": draw(0, 16, 16)})
