"""`compress`: the rule, on the axes that the function tells, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from tests.lift.test_plan import IMAGES, PARAMS, TOKENS, model

q = jc.quant


def draw(struct: jax.ShapeDtypeStruct) -> jax.Array:
    """Weights whose magnitude differs along every axis, so that axes matter."""
    w = np.random.default_rng(0).normal(size=struct.shape)
    for axis, n in enumerate(struct.shape):
        w *= np.expand_dims(
            2.0 ** np.arange(n), [i for i in range(w.ndim) if i != axis]
        )
    return jnp.asarray(w / np.abs(w).max(), struct.dtype)


def params() -> dict[str, jax.Array]:
    return {name: draw(struct) for name, struct in PARAMS.items()}


def int8_of(w: Any, contract: tuple[int, ...]) -> np.ndarray:
    """Symmetric absmax int8, one scale for each index of the other axes."""
    w = np.asarray(w, np.float64)
    scale = np.abs(w).max(axis=contract, keepdims=True) / 127
    return np.clip(np.round(w / scale), -127, 127) * scale


CONTRACT = {"conv": (-4, -3, -2), "dense": (-2,), "layers": (-2,)}
SCALE_ROUNDING = 1.01 * 2.0**-15  # Scales have 16 significant bits.


def compressed(rules: Any, **settings: Any) -> Any:
    settings = {"fn": model, "example": (IMAGES, TOKENS), **settings}
    return jax.jit(lambda p: jc.compress(p, rules, **settings))(params())


def test_scales_follow_the_axes_that_the_function_contracts() -> None:
    packed = compressed(dict.fromkeys(CONTRACT, q.int8()))
    assert {name: packed[name].scale.size for name in CONTRACT} == {
        "conv": 8,
        "dense": 6,
        "layers": 4 * 6,
    }
    dense = jax.jit(jc.materialize)(packed)
    for name, contract in CONTRACT.items():
        expected = int8_of(params()[name], contract)
        np.testing.assert_allclose(dense[name], expected, rtol=SCALE_ROUNDING)


def test_groups_lie_along_the_flattened_contracting_axes() -> None:
    packed = compressed({"conv": q.int4(group_size=9), "layers": q.int4(group_size=3)})
    assert packed["conv"].scale.shape == (8, 2)
    assert packed["layers"].scale.shape == (4, 6, 2)
    grouped = np.abs(np.asarray(params()["conv"], np.float64)).reshape(2, 9, 8)
    np.testing.assert_allclose(
        packed["conv"].scale, grouped.max(axis=1).T / 7, rtol=SCALE_ROUNDING
    )


def test_the_lifted_function_runs_on_what_was_compressed() -> None:
    packed = compressed(dict.fromkeys(CONTRACT, q.int8()))
    args = (draw(IMAGES), jnp.array([0, 11], jnp.int32))
    actual = jax.jit(jc.lift(model))(packed, *args)
    expected = jax.jit(model)(jax.jit(jc.materialize)(packed), *args)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_without_a_function_higher_ranks_need_their_axes_stated() -> None:
    with pytest.raises(ValueError, match=r"'conv', of shape \(3, 3, 2, 8\).*fn="):
        jc.compress(params(), {"conv": q.int8()})
    stated = {
        "conv": q.int8(axes=(-4, -3, -2)),
        "layers": q.int8(axes=-2),
        "dense": q.int8(),
    }
    told = dict.fromkeys(CONTRACT, q.int8())
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.leaves(compressed(stated, fn=None)),
        jax.tree.leaves(compressed(told)),
    )


def test_axes_of_a_rule_go_before_those_of_the_function() -> None:
    packed = compressed({"layers": q.int8(axes=-1), "dense": q.int8(axes=-1)})
    assert packed["layers"].scale.shape == (4, 6, 1)
    assert packed["layers"].layout.contract == (-1,)
    assert packed["dense"].scale.shape == (8, 1)


@pytest.mark.parametrize("example", [jnp.ones((1, 6)), (jnp.ones((1, 6)),)], ids=type)
def test_one_example_argument_needs_no_tuple(example: Any) -> None:
    fn = lambda p, x: x @ p["w"].T
    packed = jax.eval_shape(
        lambda p: jc.compress(p, {"w": q.int8()}, fn=fn, example=example),
        {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)},
    )
    assert packed["w"].scale.shape == (8, 1)


def test_a_function_of_the_parameters_alone_has_an_empty_example() -> None:
    fn = lambda p: jnp.ones((1, 6)) @ p["w"].T
    packed = jax.eval_shape(
        lambda p: jc.compress(p, {"w": q.int8()}, fn=fn, example=()),
        {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)},
    )
    assert packed["w"].scale.shape == (8, 1)


def test_other_leaves_are_the_same_objects() -> None:
    tree = {"dense": draw(PARAMS["dense"]), "rest": [draw(PARAMS["bias"]), 3, "text"]}
    packed = jc.compress(tree, {"dense": q.int8()})
    assert isinstance(packed["dense"], q.QuantizedArray)
    assert packed["rest"][0] is tree["rest"][0]
    assert packed["rest"][1:] == [3, "text"]
    assert isinstance(tree["dense"], jax.Array)


def test_an_nnx_state_keeps_its_variables() -> None:
    kernel = draw(PARAMS["dense"])
    state = nnx.State({"layer": {"kernel": nnx.Param(kernel), "n": nnx.Param(kernel)}})
    packed = jc.compress(state, {"**/kernel": q.int8()})
    assert isinstance(packed, nnx.State)
    assert isinstance(packed["layer"]["kernel"].get_value(), q.QuantizedArray)
    assert packed["layer"]["n"].get_value() is kernel


def test_compress_runs_without_training_state() -> None:
    w = {"dense": draw(PARAMS["dense"])}
    scheme = jc.select({"dense": q.int8()})
    by_hand = scheme.compress(*scheme.init(w))
    actual = jc.compress(w, {"dense": q.int8()})
    np.testing.assert_array_equal(actual["dense"].words, by_hand["dense"].words)
    assert jax.tree.structure(actual) == jax.tree.structure(by_hand)


NAN = {"w": jnp.ones((8, 6)), "bad": jnp.full((8, 6), np.inf)}
ERRORS = {
    "no match": ({"kernel": q.int8()}, "rule 'kernel' matches nothing"),
    "two matches": ({"w": q.int8(), "?": q.int4()}, "both match 'w'"),
    "not finite": ({"bad": q.int8()}, "'bad' has 48 NaN or infinite of 48"),
    "group": ({"w": q.int4(group_size=3)}, "divide .* 'w', 8; got 3"),
}


@pytest.mark.parametrize(("rules", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_done_is_named(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jc.compress(NAN, rules)


def test_a_rule_that_is_no_transform_names_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"got 'int4'. Write jc\.quant\.int4\(\)"):
        jc.compress(NAN, {"w": "int4"})
