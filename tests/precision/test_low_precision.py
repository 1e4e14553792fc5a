"""`low_precision`: weight matmuls of whole functions, by path, and training."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import precision
from jaxcompress.precision import LowPrecisionArray, dot_general
from jaxcompress.prune._masked import masked
from jaxcompress.quant import E4M3, E5M2, Integer
from tests.lift.programs import mesh

INT8 = Integer(bits=8)
RNG = np.random.default_rng(0)
MATMUL = (((1,), (0,)), ((), ()))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


PARAMS = {
    "bias": jnp.linspace(-1, 1, 6),
    "head": normal(6, 3),
    "stack": normal(4, 6, 6),
}
X = normal(5, 6)
matmul = functools.partial(
    dot_general, dimension_numbers=MATMUL, forward=INT8, backward=INT8
)


def forward(p: Any, x: jax.Array, dot: Any = jnp.matmul) -> jax.Array:
    x = x + jnp.broadcast_to(p["bias"], x.shape)
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, p["stack"])
    return x @ p["head"]


def loss(p: Any, x: jax.Array, dot: Any = jnp.matmul) -> jax.Array:
    return jnp.square(forward(p, x, dot)).sum()


def test_chosen_weights_alone_run_in_low_precision_also_stacked() -> None:
    low = precision.matmul_int8(loss, where="stack")
    value, grads = jax.jit(jax.value_and_grad(low))(PARAMS, X)
    oracle = functools.partial(loss, dot=matmul)
    expected, exact = jax.jit(jax.value_and_grad(oracle))(PARAMS, X)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        grads,
        exact,
    )
    assert jax.tree.structure(grads) == jax.tree.structure(PARAMS)


def test_by_default_every_matrix_is_chosen_and_nothing_else() -> None:
    params = {**PARAMS, "ids": jnp.arange(4).reshape(2, 2)}
    wrapped = precision.low_precision_params(params, forward=E4M3, backward=E5M2)
    chosen = {k for k, v in wrapped.items() if isinstance(v, LowPrecisionArray)}
    assert chosen == {"head", "stack"}
    assert wrapped["bias"] is params["bias"]
    assert jc.materialize(wrapped)["head"] is params["head"]
    again = precision.low_precision_params(
        {"w": normal(2, 2), **wrapped}, forward=E4M3, backward=E5M2
    )
    assert again["head"] is wrapped["head"]
    with pytest.raises(ValueError, match="low_precision: rule 'x' matches nothing"):
        precision.low_precision_params(params, forward=E4M3, backward=E5M2, where="x")
    with pytest.raises(ValueError, match="low_precision: forward and backward"):
        precision.low_precision(forward, forward=E4M3, backward=INT8)


def test_jit_equals_eager_and_traces_once() -> None:
    traces = []

    def product(p: Any, x: jax.Array) -> jax.Array:
        traces.append(None)
        return (x @ p["w"]).sum()

    low = precision.matmul_int8(product)
    step = jax.jit(low)
    params = {"w": PARAMS["head"]}
    np.testing.assert_allclose(step(params, X), low(params, X), rtol=1e-5)
    step(params, X + 1)
    assert len(traces) == 1


def test_reports_say_what_ran() -> None:
    wrapped = precision.low_precision_params(PARAMS, forward=E4M3, backward=None)
    report = str(jc.explain(forward, wrapped, X))
    assert "fp8_e4m3 matmul, full gradient" in report


def test_every_layer_of_a_stack_draws_its_own_noise() -> None:
    same = {**PARAMS, "stack": jnp.broadcast_to(PARAMS["stack"][:1], (4, 6, 6))}
    x = jnp.eye(6)

    def total(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.map(lambda w: x @ w, p["stack"])

    @jax.jit
    def grad(key: jax.Array) -> jax.Array:
        low = precision.matmul_int8(total, where="stack", key=key)
        pattern = jnp.broadcast_to(
            jnp.linspace(0.1, 1.0, 36).reshape(1, 6, 6), (4, 6, 6)
        )
        return jax.vjp(lambda p: low(p, x), same)[1](pattern)[0]["stack"]

    first, again, other = (grad(jax.random.key(k, impl="rbg")) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_a_compressed_weight_keeps_its_constraint() -> None:
    scheme = jc.select({"head": jc.prune.magnitude(sparsity=0.5)})
    params, state = scheme.init({"head": PARAMS["head"]})
    low = precision.matmul_int8(lambda p, x: (x @ p["head"]).sum())
    grads = jax.jit(jax.grad(lambda p: low(scheme.view(p, state), X)))(params)
    zeros = np.asarray(jc.materialize(scheme.view(params, state))["head"] == 0)
    assert zeros.sum() == 9
    assert (np.asarray(grads["head"] == 0) == zeros).all()
    wrapped = precision.low_precision_params(params, forward=INT8, backward=INT8)
    chained = scheme.view(wrapped, state)["head"]
    assert chained.method == "int8 matmul, int8 gradient"
    np.testing.assert_array_equal(chained.materialize() == 0, zeros)


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(5, 8)(tokens)
        return nn.DenseGeneral(3, axis=(-2, -1))(nn.Conv(8, (2,))(x))


def test_layers_of_a_flax_module_under_a_bfloat16_policy() -> None:
    tokens, net = jnp.array([[0, 3, 4], [1, 1, 2]]), Net()

    def run() -> Any:
        variables = net.init(jax.random.key(0), tokens)
        low = precision.MIXED_BF16.apply(precision.matmul_fp8(net.apply))
        return variables, jax.value_and_grad(lambda p: low(p, tokens).sum())(variables)

    with jax.numpy_dtype_promotion("standard"):
        variables, results = jax.eval_shape(run)
        wrap = functools.partial(
            precision.low_precision_params, forward=E4M3, backward=E5M2
        )
        report = str(jc.explain(net.apply, jax.eval_shape(wrap, variables), tokens))
    dtypes = {a.dtype for a in jax.tree.leaves(results)}
    assert dtypes == {jnp.dtype(jnp.float32)}
    assert "fp8_e4m3 matmul, fp8_e5m2 gradient" in report
    assert "dequantized rows" in report


def test_components_are_sharded_like_the_weight() -> None:
    wrapped = precision.low_precision_params(
        {"w": normal(8, 4)}, forward=INT8, backward=INT8, key=jax.random.key(0)
    )
    specs = jc.shardings(wrapped, {"w": P("d", None)}, mesh())["w"]
    assert (specs.w, specs.key) == (P("d", None), P())


def test_an_output_sharding_is_refused_by_name() -> None:
    (leaf,) = precision.low_precision_params(
        [normal(8, 4)], forward=INT8, backward=INT8
    )
    with pytest.raises(NotImplementedError, match="low_precision: out_sharding"):
        leaf.dot_general(X, MATMUL, leaf_is_lhs=False, out_sharding=P("d"))


def test_a_weight_on_the_left() -> None:
    w, x = normal(6, 3), normal(6, 2)
    low = precision.matmul_int8(lambda p, x: jnp.einsum("io,ib->ob", p["w"], x))
    got = jax.jit(low)({"w": w}, x)
    expected = jax.jit(matmul)(x.T, w).T
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# -- training

CENTRES = RNG.normal(size=(10, 32))
LABELS = RNG.integers(0, 10, size=256)
IMAGES = jnp.asarray(CENTRES[LABELS] + 1.1 * RNG.normal(size=(256, 32)), jnp.float32)
LABELS = jnp.asarray(LABELS)
TX = optax.sgd(0.3, momentum=0.9)
MLP = {"a": normal(32, 32), "b": normal(32, 10)}


def cross_entropy(p: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    y = jax.nn.relu(x @ p["a"]) @ p["b"]
    return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean()


LOSS = jax.jit(cross_entropy)


def train(objective: Any, params: Any, tx: Any, steps: int = 40) -> float:
    """Full-batch training; the last value of the dense loss."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        grads = jax.grad(objective)(params, state)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        start = params, tx.init(params)
        run = jax.jit(lambda: jax.lax.scan(step, start, length=steps)[0][0])
        return float(LOSS(jc.materialize(run()), IMAGES, LABELS))


@functools.cache
def dense() -> float:
    objective = lambda p, state: cross_entropy(p, IMAGES, LABELS)
    return train(objective, MLP, TX)


def int8(p: Any, state: Any) -> jax.Array:
    return precision.matmul_int8(cross_entropy)(p, IMAGES, LABELS)


def delayed(p: Any, state: Any) -> jax.Array:
    return jc.lift(cross_entropy)(p, IMAGES, LABELS)


def float16(p: Any, state: Any) -> jax.Array:
    run = precision.MIXED_F16.apply(cross_entropy)
    return precision.loss_scale(state).scale(run(p, IMAGES, LABELS))


WAYS: dict[str, Any] = {
    "int8": (int8, lambda p: p, TX),
    "fp8 delayed": (delayed, precision.delayed_scaling, precision.observe(TX)),
    "float16": (float16, lambda p: p, precision.loss_scaling(TX, period=10)),
}


@pytest.mark.parametrize("name", WAYS)
def test_training_reaches_the_loss_of_float32(name: str) -> None:
    objective, prepare, tx = WAYS[name]
    start = float(LOSS(MLP, IMAGES, LABELS))
    reached = train(objective, prepare(MLP), tx)
    assert dense() < 0.1 * start
    assert reached < dense() + 0.02 * start


def test_factors_take_no_mask_behind_another_matmul() -> None:
    """What wraps a weight keeps its entries apart only where the weight does."""
    factors = jc.compress({"w": normal(8, 8)}, {"w": jc.lowrank.svd(rank=2)})["w"]
    mask = jnp.eye(8, dtype=bool)
    for w, apart in ((normal(8, 8), True), (factors, False)):
        leaf = LowPrecisionArray(w=w, forward=E4M3, backward=E5M2)
        assert leaf.traits.elementwise == apart
        refused = contextlib.nullcontext() if apart else pytest.raises(jc.OrderError)
        with refused:
            masked(leaf, mask)
