"""`Policy`: which values are cast to which dtype, by path."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import precision

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
RNG = np.random.default_rng(0)
quantize = jax.jit(lambda w: jc.quant.quantize(w, jc.quant.int8()))
W = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, 6)), jnp.float32)


def params() -> dict[str, Any]:
    return {
        "dense": {"bias": jnp.ones(4), "kernel": W},
        "norm": {"scale": jnp.ones(6)},
        "table": jnp.arange(3),
        "rng": jax.random.key(0),
    }


def dtypes(tree: Any) -> Any:
    return {path: x.dtype for path, x in jc.tree.flatten(tree)[0].items()}


@pytest.mark.parametrize("policy", [precision.MIXED_BF16, precision.MIXED_F16])
def test_parameters_and_inputs_are_cast_in_and_results_out(policy: Any) -> None:
    seen: dict[str, Any] = {}

    def fn(p: Any, x: jax.Array, ids: jax.Array, *, mask: Any, flag: bool) -> Any:
        seen.update(params=dtypes(p), inputs=(x.dtype, ids.dtype, mask.dtype), f=flag)
        return {"y": x @ p["dense"]["kernel"], "ids": ids, "flag": flag}

    out = policy.apply(fn)(
        params(), X, jnp.arange(3), mask=np.ones(2, np.float32), flag=True
    )
    key = jax.random.key(0).dtype
    assert seen["params"] == {
        "dense/bias": policy.compute,
        "dense/kernel": policy.compute,
        "norm/scale": policy.compute,
        "rng": key,
        "table": jnp.int32,
    }
    assert seen["inputs"] == (policy.compute, jnp.int32, policy.compute)
    assert seen["f"] is True
    assert (out["y"].dtype, out["ids"].dtype, out["flag"]) == (F32, jnp.int32, True)
    expected = (X.astype(policy.compute) @ W.astype(policy.compute)).astype(F32)
    np.testing.assert_array_equal(out["y"], expected)


def test_rules_keep_parameters_as_they_are() -> None:
    kept = jc.where("**", exclude=("**/scale", "dense/bias"))
    tree = params()
    cast = precision.cast(tree, BF16, where=kept)
    got = dtypes(cast)
    assert (got["dense/kernel"], got["dense/bias"], got["norm/scale"]) == (
        BF16,
        F32,
        F32,
    )
    assert cast["norm"]["scale"] is tree["norm"]["scale"]
    assert cast["rng"] is tree["rng"]
    seen = precision.apply(lambda p: dtypes(p), precision.MIXED_F16, where=kept)(tree)
    assert (seen["dense/kernel"], seen["norm/scale"]) == (F16, F32)


def test_casting_to_the_own_dtype_changes_no_object() -> None:
    tree = params()
    jax.tree.map(
        lambda a, b: None if a is b else 1 / 0, tree, precision.FULL.store(tree)
    )


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    apply = precision.MIXED_BF16.apply(lambda p: p, where="**/kernal")
    with pytest.raises(ValueError, match=r"precision.cast: rule '\*\*/kernal' matches"):
        apply(params())


@pytest.mark.parametrize("bad", ["bfloat16", jnp.int8, jnp.bool_])
def test_dtypes_must_float_and_not_be_strings(bad: Any) -> None:
    with pytest.raises(TypeError, match="Policy: compute must be a floating dtype"):
        precision.Policy(compute=bad)


def test_policies_compare_by_value() -> None:
    assert precision.Policy(compute=jnp.bfloat16) == precision.MIXED_BF16
    assert hash(precision.Policy(compute=BF16)) == hash(precision.MIXED_BF16)
    assert precision.FULL != precision.MIXED_BF16


def test_gradients_have_the_dtype_of_the_stored_parameters() -> None:
    loss = precision.MIXED_BF16.apply(lambda p, x: jnp.square(x @ p["w"]).mean())
    value, grads = jax.jit(jax.value_and_grad(loss))({"w": W}, X)
    assert (value.dtype, grads["w"].dtype) == (F32, F32)
    exact = jax.jit(jax.grad(lambda p: jnp.square(X @ p["w"]).mean()))({"w": W})
    # Each of a few bfloat16 roundings is within 2^-8 of the largest entry.
    np.testing.assert_allclose(
        grads["w"], exact["w"], atol=8 * 2.0**-8 * float(jnp.abs(exact["w"]).max())
    )


@pytest.mark.parametrize("lift_outside", [False, True])
def test_compressed_leaves_keep_their_codes(lift_outside: bool) -> None:
    packed = {"w": quantize(W)}
    seen = []

    def fn(p: Any, x: jax.Array) -> jax.Array:
        seen.append((p["w"].dtype, x.dtype))
        return x @ p["w"]

    policy = precision.MIXED_BF16
    run = jc.lift(policy.apply(fn)) if lift_outside else policy.apply(jc.lift(fn))
    y = jax.jit(run)(packed, X)
    assert set(seen) == {(BF16, BF16)}
    assert y.dtype == F32
    dense = jc.materialize(packed)["w"].astype(BF16)
    np.testing.assert_array_equal(y, (X.astype(BF16) @ dense).astype(F32))
    cast = precision.cast(packed, BF16)["w"]
    assert cast.words is packed["w"].words
    assert cast.scale is packed["w"].scale


def test_a_leaf_that_cannot_be_cast_stays() -> None:
    leaf = jax.eval_shape(quantize, W.astype(BF16))
    assert precision.cast({"w": leaf}, F32)["w"] is leaf


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(dtype=x.dtype)(nn.Dense(8)(x))


def test_flax_modules_jit_and_do_not_retrace() -> None:
    traces = []

    def fn(p: Any, x: jax.Array) -> Any:
        traces.append(dtypes(p))
        return Net().apply(p, x)

    rule = jc.where("**", exclude="**/LayerNorm_*/*")
    run = jax.jit(precision.apply(fn, precision.MIXED_BF16, where=rule))
    with jax.numpy_dtype_promotion("standard"):  # LayerNorm works in float32 inside.
        variables = jax.jit(Net().init)(jax.random.key(0), X)
        y = run(variables, X)
        run(variables, X + 1)
    assert len(traces) == 1
    assert traces[0]["params/LayerNorm_0/scale"] == F32
    assert traces[0]["params/Dense_0/kernel"] == BF16
    assert y.dtype == F32
    assert np.isfinite(y).all()
