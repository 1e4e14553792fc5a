"""Paths, globs, rules, and the split of a tree into what is trained and what is not."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress import tree
from jaxcompress.leaf import CODEBOOK, FROZEN, GATE, STEP, WEIGHT, Leaf, component
from jaxcompress.prune import MaskedArray

W = jnp.ones((4, 2))
QUANTIZED = jax.jit(lambda w: jc.quant.quantize(w, jc.quant.int8()))(W)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


class Pair(NamedTuple):
    left: Any
    right: Any


class Block(nnx.Module):
    def __init__(self) -> None:
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EveryRole(Leaf):
    """A matrix in each role; not in `LEAF_TYPES`, since `io` need not know it."""

    own: Any = component(role=WEIGHT)  # noqa: RUF009
    step: jax.Array = component(role=STEP)  # noqa: RUF009
    gate: jax.Array = component(role=GATE)  # noqa: RUF009
    codebook: jax.Array = component(role=CODEBOOK)  # noqa: RUF009
    scale: Any = component(role=FROZEN)  # noqa: RUF009
    shape, dtype, method = (4, 2), np.dtype(np.float32), "every role"

    def materialize(self) -> jax.Array:
        return self.own


def paths(params: Any) -> list[str]:
    return list(tree.flatten(params)[0])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (W, [""]),
        ({"b": W, "a": {"kernel": W}}, ["a/kernel", "b"]),
        ({"layers": [W, {"k": W}]}, ["layers/0", "layers/1/k"]),
        ({10: W, 9: W}, ["9", "10"]),
        ([(W, None, W)], ["0/0", "0/2"]),
        ({"up": Dense(kernel=W, bias=W)}, ["up/kernel", "up/bias"]),
        (Pair(left=W, right=[W]), ["left", "right/0"]),
        ({"value": W}, ["value"]),
    ],
    ids=["array", "dict", "list", "int", "none", "dataclass", "tuple", "key 'value'"],
)
def test_paths_are_the_keys_joined(params: Any, expected: list[str]) -> None:
    assert paths(params) == expected


def test_paths_of_models_do_not_name_the_variables_field() -> None:
    expected = ["layers/0/bias", "layers/0/kernel"]
    assert paths(nnx.state(Block(), nnx.Param)) == expected
    assert sorted(paths(nnx.split(Block())[1])) == expected
    linen = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), W)
    assert sorted(paths(linen)) == ["params/bias", "params/kernel"]


def test_a_dataclass_may_have_a_field_called_value() -> None:
    params = {"attention": Attention(query=W, key=W, value=W)}
    assert sorted(paths(params)) == [
        "attention/key",
        "attention/query",
        "attention/value",
    ]


def test_flatten_keeps_compressed_leaves_whole_and_unflatten_undoes_it() -> None:
    leaf = MaskedArray(inner=W, mask=W > 0)
    flat, structure = tree.flatten({"a": [leaf, W], "b": None})
    assert flat["a/0"] is leaf
    back = tree.unflatten(structure, flat)
    assert back["a"][0] is leaf
    assert back["b"] is None


def test_two_leaves_of_one_path_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"two leaves .* the path 'a/b'"):
        tree.flatten({"a/b": W, "a": {"b": W}})


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("kernel", "kernel", True),
        ("kernel", "a/kernel", False),
        ("kernel", "kernels", False),
        ("*/kernel", "a/kernel", True),
        ("*/kernel", "kernel", False),
        ("*/kernel", "a/b/kernel", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/b/my_kernel", False),
        ("**", "a/b", True),
        ("**", "", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("a/**/k", "a/k", True),
        ("a/**/k", "a/b/c/k", True),
        ("a/**/k", "abk", False),
        ("layer_?", "layer_3", True),
        ("layer_?", "layer_12", False),
        ("a?b", "a/b", False),
        ("layer_*/k*", "layer_12/kernel", True),
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
        ("[ab]", "a", False),
        ("[ab]", "[ab]", True),
        ("a+", "aa", False),
    ],
)
def test_globs(pattern: str, path: str, expected: bool) -> None:
    assert tree.matches(pattern, path) is expected


PARAMS = {
    "embed": {"table": W},
    "head": {"bias": jnp.ones(2), "kernel": W},
    "mlp": {"kernel": W},
}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"mlp/*": 1, "embed/**": 2}, {"embed/table": 2, "mlp/kernel": 1}),
        ({"**/kernel": 1}, {"head/kernel": 1, "mlp/kernel": 1}),
        ({jc.where("**/kernel", exclude="head/*"): 1}, {"mlp/kernel": 1}),
        (
            {jc.where("**", exclude=["**/kernel", "embed/*"]): 1},
            {"head/bias": 1},
        ),
        ({lambda path, w: w.ndim == 1: 1}, {"head/bias": 1}),
        ({lambda path, w: path.startswith("m"): 1}, {"mlp/kernel": 1}),
        ({}, {}),
    ],
    ids=["globs", "glob", "where", "where not", "by leaf", "by path", "none"],
)
def test_rules_choose_leaves_in_the_order_of_the_tree(
    rules: Any, expected: dict[str, int]
) -> None:
    chosen = tree.choose(rules, PARAMS, who="test")
    assert list(chosen.items()) == list(expected.items())


def test_a_predicate_sees_a_compressed_leaf_whole() -> None:
    params = {"a": MaskedArray(inner=W, mask=W > 0), "b": W}
    rule = lambda path, leaf: jc.is_leaf(leaf)
    assert tree.choose({rule: 1}, params, who="test") == {"a": 1}


def never(path: str, leaf: Any) -> bool:
    return False


@pytest.mark.parametrize(
    ("rules", "params", "message"),
    [
        (
            {"**/kernal": 1},
            PARAMS,
            r"who: rule '\*\*/kernal' matches nothing; .*nearest .*'mlp/kernel'",
        ),
        ({jc.where("mpl/kernel"): 1}, PARAMS, "nearest paths are .*'mlp/kernel'"),
        ({never: 1}, PARAMS, "rule never matches nothing; .*begin .*'embed/table'"),
        ({"q": 1}, {}, "rule 'q' matches nothing; the tree has no leaves"),
        (
            {"mlp/*": 1, "**/kernel": 2},
            PARAMS,
            r"rules 'mlp/\*' and '\*\*/kernel' both match 'mlp/kernel'; .*exclude",
        ),
        (
            {"nothing": 1, "mlp/*": 1, "*/kernel": 2},
            PARAMS,
            "'nothing' matches nothing.* both match 'mlp/kernel'",
        ),
    ],
    ids=["glob", "where", "predicate", "empty", "overlap", "all at once"],
)
def test_rules_that_cannot_hold_are_named(
    rules: Any, params: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tree.choose(rules, params, who="who")


def arrays(params: Any) -> list[str]:
    """The key path of every array that is there."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in pairs]


def mixed() -> dict[str, Any]:
    """Arrays, integers, keys and leaves of every role, some within others."""
    roles = EveryRole(own=W, step=W, gate=W, codebook=W, scale=W)
    return {
        "bias": jnp.ones(2),
        "count": jnp.array(3),
        "kernel": W.astype(jnp.bfloat16),
        "masked": MaskedArray(inner=roles, mask=W > 0),
        "none": None,
        "packed": QUANTIZED,
        "qat": jc.StraightThrough(latent=W, stored=QUANTIZED),
        "roles": roles.replace(scale=MaskedArray(inner=W, mask=W > 0)),
    }


TRAINABLE = [
    "bias",
    "kernel",
    "masked/inner/own",
    "masked/inner/step",
    "masked/inner/gate",
    "masked/inner/codebook",
    "qat/latent",
    "roles/own",
    "roles/step",
    "roles/gate",
    "roles/codebook",
]


def test_partition_gives_training_the_floats_that_are_not_frozen() -> None:
    trainable, rest = jc.partition(mixed())
    assert arrays(trainable) == TRAINABLE
    assert sorted(arrays(trainable) + arrays(rest)) == sorted(arrays(mixed()))


def test_merge_undoes_partition() -> None:
    params = mixed()
    back = jc.merge(*jc.partition(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True)
    assert all(a is b for a, b in pairs)


def test_the_trainable_part_is_differentiable_beside_frozen_codes() -> None:
    params = {"base": QUANTIZED, "adapter": W}
    trainable, rest = jc.partition(params)

    def loss(trainable: Any) -> jax.Array:
        dense = jc.materialize(jc.merge(trainable, rest))
        return (dense["base"] * dense["adapter"]).sum()

    grads = jax.grad(loss)(trainable)
    assert arrays(grads) == ["adapter"]
    np.testing.assert_array_equal(grads["adapter"], params["base"].materialize())


def test_partition_leaves_random_keys_to_the_rest() -> None:
    params = {"key": jax.random.key(0), "rate": 0.5, "w": W}
    trainable, rest = jc.partition(params)
    assert sorted(trainable) == sorted(rest) == ["key", "rate", "w"]
    assert arrays(trainable) == ["rate", "w"]
    assert jc.merge(trainable, rest)["key"] is params["key"]


def test_weight_decay_acts_on_matrices_in_the_role_of_weights() -> None:
    marks = jc.weight_decay_mask(mixed())
    pairs, _ = jax.tree_util.tree_flatten_with_path(marks)
    decayed = [
        jax.tree_util.keystr(p, simple=True, separator="/") for p, m in pairs if m
    ]
    assert decayed == ["kernel", "masked/inner/own", "qat/latent", "roles/own"]


def test_the_weight_decay_mask_serves_optax() -> None:
    params = {"bias": jnp.ones(2), "kernel": MaskedArray(inner=W, mask=W > 0)}
    trainable, _ = jc.partition(params)
    decay = optax.add_decayed_weights(0.1, mask=jc.weight_decay_mask)
    none = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = decay.update(none, decay.init(trainable), trainable)
    np.testing.assert_array_equal(updates["bias"], np.zeros(2))
    np.testing.assert_allclose(updates["kernel"].inner, 0.1 * np.ones((4, 2)))
