"""How transforms combine, what `init` refuses, and `wrap`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.transform import as_transform, stateless
from jaxcompress.values import Oriented, check_weights

A = jnp.asarray(np.arange(8, dtype=np.float32).reshape(4, 2))
PARAMS = {"a": A, "b": -A, "bias": jnp.ones(2)}


def affine(scale: float, shift: float) -> jc.Transform:
    """View ``scale * w + shift``, stored form its negative."""
    view = lambda w, site: scale * w + shift
    return stateless(view, lambda w, site: -view(w, site), by="affine")


def counting(seen: list[Any], *, step: int = 1) -> jc.Transform:
    """A transform that adds to its params and state, and records what it gets."""

    def update(params: Any, state: int, **extra: Any) -> tuple[Any, int]:
        seen.append((params, state, extra))
        return jax.tree.map(lambda w: w + step, params), state + step

    return jc.identity()._replace(init=lambda p: (p, 0), update=update)


def test_the_identity_returns_what_it_gets() -> None:
    scheme = jc.identity()
    params, state = scheme.init(PARAMS)
    assert params is scheme.view(PARAMS, state) is scheme.compress(PARAMS, state)
    assert params is PARAMS
    assert scheme.update(PARAMS, state, grads=None, loss=1.0) == (PARAMS, state)


def test_a_chain_runs_its_parts_in_order() -> None:
    scheme = jc.chain(affine(1.0, 3.0), affine(2.0, 0.0))
    params, state = scheme.init({"w": A})
    np.testing.assert_array_equal(scheme.view(params, state)["w"], 2 * (A + 3))
    np.testing.assert_array_equal(scheme.compress(params, state)["w"], -(2 * -(A + 3)))


def test_a_chain_hands_on_params_and_extras_and_keeps_states_apart() -> None:
    first: list[Any] = []
    second: list[Any] = []
    scheme = jc.chain(counting(first, step=1), counting(second, step=10))
    params, state = scheme.init({"w": A})
    params, state = scheme.update(params, state, grads="g", loss=2.0)
    assert state == (1, 10)
    np.testing.assert_array_equal(params["w"], A + 11)
    (got_first, _, extra), (got_second, _, same_extra) = first[0], second[0]
    np.testing.assert_array_equal(got_first["w"], A)
    np.testing.assert_array_equal(got_second["w"], A + 1)
    assert extra == same_extra == {"grads": "g", "loss": 2.0}


def test_an_empty_chain_is_the_identity() -> None:
    params, state = jc.chain().init(PARAMS)
    assert jc.chain().view(params, state) is PARAMS


@pytest.mark.parametrize(
    ("later", "named"),
    [
        (jc.prune.magnitude(sparsity=0.5), r"prune\.magnitude at 'w': int4 g2 .*fixes"),
        (
            jc.prune.random(sparsity=0.5, key=jax.random.key(0)),
            r"prune\.random at 'w': int4 g2 .*fixes",
        ),
        (jc.quant.int8(), r"quant\.weights\(int8\) at 'w': int4 g2 .*fixes"),
    ],
    ids=["magnitude", "random", "int8"],
)
def test_an_order_that_would_undo_a_grid_is_refused_by_name(
    later: Any, named: str
) -> None:
    scheme = jc.chain(jc.quant.int4(group_size=2), later)
    with pytest.raises(jc.OrderError, match=named):
        scheme.init({"w": A})


def test_a_mask_goes_before_a_grid() -> None:
    scheme = jc.chain(jc.prune.magnitude(sparsity=0.5), jc.quant.int8())
    params, state = scheme.init({"w": A})
    view = jax.jit(lambda p, s: jc.materialize(scheme.view(p, s)))(params, state)["w"]
    np.testing.assert_array_equal(view == 0, A < 4)
    np.testing.assert_allclose(view, np.where(A < 4, 0, A), atol=7 / 127)


def test_select_leaves_other_leaves_alone() -> None:
    scheme = jc.select({"a": affine(2.0, 0.0)})
    params, state = scheme.init(PARAMS)
    for seen in (scheme.view(params, state), scheme.compress(params, state)):
        assert seen["b"] is PARAMS["b"]
        assert seen["bias"] is PARAMS["bias"]
    np.testing.assert_array_equal(scheme.view(params, state)["a"], 2 * A)


def test_select_gives_each_rule_its_own_leaves_gradients_and_state() -> None:
    one: list[Any] = []
    other: list[Any] = []
    scheme = jc.select({"b*": counting(one, step=1), "a": counting(other, step=10)})
    params, state = scheme.init(PARAMS)
    grads = {"a": "ga", "b": "gb", "bias": "gbias"}
    params, state = scheme.update(params, state, grads=grads, loss=2.0)
    (got, before, extra) = one[0]
    assert sorted(got) == ["b", "bias"]
    assert (before, extra) == (0, {"grads": {"b": "gb", "bias": "gbias"}, "loss": 2.0})
    assert other[0][2] == {"grads": {"a": "ga"}, "loss": 2.0}
    assert [chosen.state for chosen in state] == [1, 10]
    np.testing.assert_array_equal(params["a"], A + 10)
    np.testing.assert_array_equal(params["b"], 1 - A)


def test_select_without_gradients_says_none() -> None:
    seen: list[Any] = []
    scheme = jc.select({"a": counting(seen)})
    scheme.update(*scheme.init(PARAMS))
    assert seen[0][2] == {"grads": None}


def test_the_choice_is_made_by_init_alone() -> None:
    largest = lambda path, w: bool(jnp.abs(w).max() > 1)
    scheme = jc.select({largest: affine(2.0, 0.0)})
    _, state = scheme.init(PARAMS)
    assert [chosen.paths for chosen in state] == [("a", "b")]
    small = jax.tree.map(lambda w: w / 16, PARAMS)
    np.testing.assert_array_equal(scheme.view(small, state)["a"], 2 * small["a"])


def test_the_state_of_select_is_a_pytree_that_knows_its_paths() -> None:
    scheme = jc.select({"a": jc.prune.magnitude(sparsity=0.5)})
    params, state = scheme.init(PARAMS)
    moved = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state))
    assert moved[0].paths == ("a",)
    view = jax.jit(lambda p, s: jc.materialize(scheme.view(p, s)))(params, moved)
    np.testing.assert_array_equal(view["a"], np.where(A < 4, 0, A))


def test_params_that_lost_a_chosen_leaf_are_refused() -> None:
    scheme = jc.select({"a": jc.prune.magnitude(sparsity=0.5)})
    _, state = scheme.init(PARAMS)
    without = {"b": A, "bias": jnp.ones(2)}
    for run in (scheme.view, scheme.update, scheme.compress):
        with pytest.raises(ValueError, match="no leaf 'a', which init chose"):
            run(without, state)


def test_select_reports_rules_that_cannot_hold() -> None:
    scheme = jc.select({"kernel": jc.identity(), "a": jc.identity()})
    with pytest.raises(ValueError, match="select: rule 'kernel' matches nothing"):
        scheme.init(PARAMS)


CUBE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)), jnp.float32)
STACKED = jc.Axes(contract=(-2,), stack=1)


def test_axes_read_off_a_function_reach_the_transform() -> None:
    scheme = jc.select({"w": jc.prune.magnitude(sparsity=0.5)}, axes={"w": STACKED})
    params, state = scheme.init({"w": CUBE})
    kept = params["w"] != 0
    np.testing.assert_array_equal(params["w"], np.where(kept, CUBE, 0))
    assert kept.mean() == pytest.approx(0.5, abs=0.1)
    stored = jax.jit(scheme.compress)(params, state)["w"]
    assert not isinstance(stored, Oriented)
    assert (np.asarray(stored.materialize()) == 0).sum((1, 2)).tolist() == [6, 6]


def test_a_rules_own_axes_go_first() -> None:
    heads = (-3, -2)
    rule = jc.quant.int8(axes=heads)
    scheme = jc.select({"w": rule}, axes={"w": STACKED})
    stored = jax.jit(scheme.compress)(*scheme.init({"w": CUBE}))["w"]
    assert stored.layout.contract == heads
    assert stored.scale.size == 3


@pytest.mark.parametrize(
    "rule", ["int4", 4, jc.quant.int4], ids=["text", "number", "function"]
)
def test_what_is_no_transform_is_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match=r"as_transform: expected .*got .*int4|got 4"):
        as_transform(rule)


def test_a_number_format_stands_for_its_weight_transform() -> None:
    fmt = jc.quant.int4(group_size=2)
    store = jax.jit(lambda w: scheme.compress(*scheme.init({"w": w}))["w"])
    scheme = as_transform(fmt)
    expected = jax.jit(lambda w: jc.quant.quantize(w, fmt))(A)
    assert jax.tree.structure(store(A)) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, store(A), expected)
    assert as_transform(scheme) is scheme


NAN = np.array([[1.0, np.nan]], np.float32)
INF = np.array([np.inf, -np.inf], np.float32)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "nan": (jax.device_put(NAN), ValueError, "has 1 NaN or infinite of 2"),
    "inf": (jnp.asarray(INF), ValueError, "has 2 NaN or infinite of 2"),
    "int": (jnp.ones((2, 2), jnp.int8), TypeError, "is int8"),
    "bool": (jnp.ones((2, 2), bool), TypeError, "is bool"),
    "complex": (jnp.ones((2, 2), jnp.complex64), TypeError, "is complex64"),
    "empty": (jnp.ones((0, 2)), ValueError, r"has shape \(0, 2\)"),
    "scalar": (jnp.ones(()), ValueError, r"has shape \(\)"),
    "python": (1.0, TypeError, "is float"),
    "numpy": (INF, ValueError, "has 2 NaN or infinite of 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_that_no_method_can_compress_are_refused(name: str) -> None:
    value, error, message = BAD[name]
    with pytest.raises(error, match=rf"who: weights must .*'layer/w' {message}"):
        check_weights({"fine": A, "layer": {"w": value}}, who="who")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(
    "scheme",
    [jc.prune.magnitude(sparsity=0.5), jc.quant.weights(jc.quant.int8())],
    ids=["prune", "quant"],
)
def test_every_scheme_refuses_them_in_init(scheme: jc.Transform, name: str) -> None:
    value, error, message = BAD[name]
    with pytest.raises(error, match=message):
        scheme.init({"w": value})


def test_weights_of_unknown_value_pass_the_check() -> None:
    check_weights({"w": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}, who="who")
    jax.eval_shape(lambda w: check_weights({"w": w}, who="who"), A)
    with pytest.raises(TypeError, match="'w' is int32"):
        check_weights({"w": jax.ShapeDtypeStruct((2, 2), jnp.int32)}, who="who")


def test_concrete_weights_can_be_checked_while_tracing() -> None:
    closed_over = lambda x: (check_weights({"w": A}, who="who"), x)[1]
    assert jax.eval_shape(closed_over, A).shape == A.shape


def test_the_values_inside_a_leaf_are_checked() -> None:
    bad = jnp.array([[1.0, jnp.inf]])
    masked = jc.prune.MaskedArray(inner=bad, mask=jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match="'w' has 1 NaN or infinite"):
        check_weights({"w": masked}, who="who")


def test_wrap_runs_a_function_on_the_view() -> None:
    scheme = jc.select({"a": jc.quant.int4()})
    params, state = scheme.init(PARAMS)

    def apply(params: Any, x: jax.Array, *, scale: float) -> jax.Array:
        """Docstring."""
        return scale * (x @ params["a"])

    wrapped = jc.wrap(apply, scheme)
    x = jnp.eye(4)
    expected = 3.0 * jc.materialize(scheme.view(params, state)["a"])
    np.testing.assert_allclose(wrapped(params, state, x, scale=3.0), expected)
    assert np.abs(expected - 3.0 * A).max() > 0.1
    assert wrapped.__doc__ == "Docstring."


def test_wrap_passes_its_options_to_lift() -> None:
    scheme = jc.quant.weights(jc.quant.int4())
    dense = jc.wrap(lambda p: jnp.sin(p["w"]), scheme, on_dense="error")
    with pytest.raises(jc.LiftError, match=r"'w'.*is made dense by 'sin'"):
        dense(*scheme.init({"w": A}))
