"""Adapters: what is frozen, what is trained, and that training them learns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import quant as q
from tests.quant.wrapping import draw, run

KEY = jax.random.key(0)
RANK = 2
STACK = jc.Axes(contract=(-2,), stack=1)


def params() -> dict[str, jax.Array]:
    return {"first": draw(0, 8, 16), "layers": draw(1, 3, 16, 16), "bias": draw(2, 16)}


def scheme(**options: Any) -> jc.Transform:
    rule = q.lora(q.nf4(group_size=8), rank=RANK, key=KEY, **options)
    return jc.select({jc.where("*", exclude="bias"): rule}, axes={"layers": STACK})


def model(p: Any, x: jax.Array) -> jax.Array:
    x = jnp.tanh(x @ p["first"] / 4 + p["bias"][None])
    step = lambda x, w: (x + jnp.tanh(x @ w / 8), None)
    return jax.lax.scan(step, x, p["layers"])[0]


apply = jc.lift(model)


def adapted(**options: Any) -> Any:
    return run(lambda p: scheme(**options).init(p)[0], params())


def test_it_starts_as_the_quantized_weight_with_normal_inputs_to_the_rank() -> None:
    leaf = adapted()["layers"]
    plain = run(
        lambda w: q.quantize(w, q.nf4(group_size=8), axes=STACK), draw(1, 3, 16, 16)
    )
    assert jax.tree.structure(leaf.inner) == jax.tree.structure(plain)
    dense, expected = run(jc.materialize, [leaf, plain])
    np.testing.assert_array_equal(dense, expected)
    assert leaf.down.shape == (3, 1, RANK, 16)
    assert leaf.up.shape == (3, 16, RANK)
    assert not leaf.up.any()
    assert np.std(leaf.down) == pytest.approx(16**-0.5, rel=0.2)
    assert (leaf.down[0] != leaf.down[1]).any()


def test_a_weight_is_its_base_and_the_scaled_product() -> None:
    leaf = adapted(alpha=6.0)["first"]
    leaf = leaf.replace(up=draw(3, 16, RANK))
    base, dense = run(lambda leaf: jc.materialize((leaf.inner, leaf)), leaf)
    product = np.float64(leaf.down)[0].T @ np.float64(leaf.up).T
    expected = np.float64(base) + 6.0 / RANK * product
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-5)


def test_exactly_the_adapters_are_trainable() -> None:
    tree = adapted()
    weights = {k: tree[k] for k in ("first", "layers")}
    names = ["down", "up"]
    for chosen, _ in (jc.partition(weights), q.adapters(tree)):
        for leaf in (chosen["first"], chosen["layers"]):
            present = [n for n, _ in leaf.components().items() if n != "inner"]
            assert present == names
            assert jax.tree.leaves(leaf.inner) == []
    kept, rest = q.adapters(tree)
    assert kept["bias"] is None
    assert rest["bias"] is tree["bias"]
    again = jc.merge(kept, rest)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True)
    )
    decayed = jax.tree.leaves(jc.weight_decay_mask(weights))
    assert sum(decayed) == 4


def test_training_the_adapters_alone_reduces_the_loss() -> None:
    """Under jit, with optax; the packed base keeps its bytes."""
    transform = scheme()
    tree, scheme_state = run(transform.init, params())
    x = jnp.asarray(np.random.default_rng(4).normal(size=(32, 8)), jnp.float32)
    far = lambda w: 0.5 * draw(5, *w.shape[:-1], 1) @ draw(9, *w.shape[:-2], 1, 16)
    target = {k: w + far(w) if k != "bias" else w for k, w in params().items()}
    y = run(model, target, x)
    tx = optax.adam(2e-2)
    trained, rest = q.adapters(tree)

    def loss(trained: Any) -> jax.Array:
        view = transform.view(jc.merge(trained, rest), scheme_state)
        return jnp.square(apply(view, x) - y).mean()

    def steps(trained: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            trained, state = carry
            value, grads = jax.value_and_grad(loss)(trained)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = tx.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), value

        carry, losses = jax.lax.scan(step, (trained, tx.init(trained)), None, length=60)
        return carry[0], losses

    after, losses = run(steps, trained)
    assert losses[-1] < 0.5 * losses[0]
    result = jc.merge(after, rest)
    for path in ("first", "layers"):
        for a, b in zip(
            jax.tree.leaves(result[path].inner),
            jax.tree.leaves(tree[path].inner),
            strict=True,
        ):
            assert a is b
        assert result[path].up.any()
    packed = tree["layers"].inner
    # Half a byte a code, and a float32 scale for every 8 of them.
    assert packed.stored_bytes == packed.size // 2 + packed.size // 8 * 4


def test_adapted_weights_go_through_init_again_unchanged() -> None:
    """As when an optimizer is attached to the scheme."""
    transform, tree = scheme(), adapted()
    again, _ = transform.init(tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
        assert a is b
    stored = transform.compress(*transform.init(tree))
    assert stored["layers"].up is tree["layers"].up


def test_merged_weights_are_dense_or_rounded_anew() -> None:
    tree = adapted()
    tree["layers"] = tree["layers"].replace(up=draw(6, 3, 16, RANK))

    def fn(tree: Any) -> Any:
        dense = q.merge_lora({k: tree[k] for k in ("first", "layers")})
        coded = q.merge_lora(tree, q.int8())
        return dense, coded, q.quantize(dense["layers"], q.int8(), axes=STACK)

    dense, coded, expected = run(fn, tree)
    np.testing.assert_array_equal(dense["layers"], run(jc.materialize, tree["layers"]))
    assert jax.tree.structure(coded["layers"]) == jax.tree.structure(expected)
    np.testing.assert_array_equal(coded["layers"].words, expected.words)
    assert q.merge_lora({"bias": tree["bias"]})["bias"] is tree["bias"]


def test_adapters_come_last_in_a_chain() -> None:
    w = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    rule = q.lora(q.int4(), rank=1, key=KEY)
    with pytest.raises(jc.OrderError, match="merge_lora"):
        jax.eval_shape(lambda w: jc.chain(rule, q.int8()).init(w), w)
    pruned = jc.chain(jc.prune.magnitude(sparsity=0.5), rule)
    with pytest.raises(jc.OrderError, match="merge_lora"):
        jax.eval_shape(pruned.init, w)


@pytest.mark.parametrize(
    ("fmt", "rank", "message"),
    [
        (q.int4(), 0, "rank must be positive"),
        (q.int4(), 5, "rank must be from 1 to 4"),
        (q.int4(rounding="stochastic"), 1, "rounded once"),
    ],
)
def test_what_cannot_be_adapted_is_refused(fmt: Any, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        q.lora(fmt, rank=rank, key=KEY).init({"w": draw(0, 8, 4)})
