"""Values brought out of programs, against NumPy, Flax's own capture, and hand-written
functions; outputs and their gradients unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxcompress as jc
from jaxcompress.distill import features, tap_names
from jaxcompress.lift import LiftError
from tests.lift.programs import PROGRAMS, mesh, normal

close = np.testing.assert_allclose


def same(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def central(loss: Callable[[np.ndarray], float], w: Any, h: float = 1e-5) -> np.ndarray:
    """The gradient of a float64 function by central differences."""
    w = np.asarray(w, np.float64)
    grad = np.zeros_like(w)
    for i in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[i] = h
        grad[i] = (loss(w + step) - loss(w - step)) / (2 * h)
    return grad


# -- a plain function


def mlp(params: Any, x: jax.Array) -> jax.Array:
    with jax.named_scope("hidden"):
        h = jnp.tanh(x @ params["up"]["w"] + params["up"]["b"][None])
    h = checkpoint_name(2.0 * h, "doubled")
    return h @ params["down"]["w"]


MLP = {"up": {"w": normal(0, 3, 5), "b": normal(1, 5)}, "down": {"w": normal(2, 5, 2)}}
X = normal(3, 4, 3)


def mlp_values(up: Any) -> dict[str, np.ndarray]:
    """What `mlp` computes, in float64; `up` instead of its first weight."""
    b, down = (np.asarray(w, np.float64) for w in (MLP["up"]["b"], MLP["down"]["w"]))
    product = np.asarray(X, np.float64) @ np.asarray(up, np.float64)
    hidden = np.tanh(product + b)
    return {
        "up/w": product,
        "hidden": hidden,
        "doubled": 2 * hidden,
        "down/w": 2 * hidden @ down,
    }


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit])
@pytest.mark.parametrize("inner", [lambda f: f, jax.jit])
def test_weights_scopes_and_names_of_a_plain_function(outer: Any, inner: Any) -> None:
    expected = mlp_values(MLP["up"]["w"])
    y, values = outer(features(inner(mlp), "**"))(MLP, X)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        close(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    same(y, outer(inner(mlp))(MLP, X))


def test_the_gradient_through_a_tap_is_that_of_the_definition() -> None:
    def loss(up: jax.Array) -> jax.Array:
        params = {**MLP, "up": {**MLP["up"], "w": up}}
        y, values = features(mlp, ["up/w", "hidden"])(params, X)
        return jnp.sum(y**2) + jnp.sum(values["up/w"] ** 3) + jnp.sum(values["hidden"])

    def definition(up: np.ndarray) -> float:
        v = mlp_values(up)
        return (v["down/w"] ** 2).sum() + (v["up/w"] ** 3).sum() + v["hidden"].sum()

    expected = central(definition, MLP["up"]["w"])
    close(jax.jit(jax.grad(loss))(MLP["up"]["w"]), expected, rtol=1e-4, atol=1e-4)


def test_patterns_choose_by_name_and_by_kind() -> None:
    chosen = lambda *args, **kwargs: list(features(mlp, *args, **kwargs)(MLP, X)[1])
    assert chosen("*/w") == ["up/w", "down/w"]
    assert chosen("**", kinds=("scope", "name")) == ["hidden", "doubled"]
    assert chosen(["hid*", "hidden"]) == ["hidden"]


def test_vmap_and_a_vmap_inside() -> None:
    xs = normal(4, 2, 4, 3)
    outside = jax.vmap(features(mlp, "**"), (None, 0))(MLP, xs)
    inside = features(jax.vmap(mlp, (None, 0)), "**")(MLP, xs)
    each = [features(mlp, "**")(MLP, x) for x in xs]
    stacked = jax.tree.map(lambda *a: np.stack(a), *each)
    assert outside[1].keys() == inside[1].keys() == stacked[1].keys()
    for result in (outside, inside):
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), result, stacked)


def test_the_function_is_traced_once_for_each_signature() -> None:
    calls = []

    def fn(params: Any, x: jax.Array, *, train: bool) -> jax.Array:
        calls.append(train)
        return mlp(params, x)

    tapped = features(fn, "hidden")
    for train in (True, True, False, True):
        tapped(MLP, X, train=train)
    assert calls == [True, False]


# -- scans, checkpoints and calls


def layers(
    params: Any, x: jax.Array, wrap: Callable[[Any], Any] = lambda step: step
) -> jax.Array:
    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope("layer"):
            return x + jnp.tanh(x @ w), None

    with jax.named_scope("model"):
        return lax.scan(wrap(step), x, params["layers"])[0]


def layers_values(stack: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The result, the products and what leaves each layer, in float64."""
    x = np.asarray(normal(6, 4, 3), np.float64)
    products, left = [], []
    for w in np.asarray(stack, np.float64):
        products.append(x @ w)
        x = x + np.tanh(products[-1])
        left.append(x)
    return x, np.stack(products), np.stack(left)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "scan": lambda step: step,
    "scan_of_remat": jax.checkpoint,
    "scan_of_jit": jax.jit,
    "scan_of_remat_of_jit": lambda step: jax.checkpoint(jax.jit(step)),
    "scan_of_remat_with_policy": lambda step: jax.checkpoint(
        step, policy=jax.checkpoint_policies.dots_saveable
    ),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_scanned_layers_come_stacked_and_are_differentiable(wrap: Any) -> None:
    params, x = {"layers": normal(5, 3, 3, 3)}, normal(6, 4, 3)
    tapped = features(lambda p, x: layers(p, x, wrap), ["layers", "model/layer"])

    def loss(params: Any) -> Any:
        y, values = tapped(params, x)
        total = jnp.sum(values["layers"] ** 2) + jnp.sum(values["model/layer"] ** 3)
        return jnp.sum(y) + total, (y, values)

    def definition(stack: np.ndarray) -> float:
        y, products, left = layers_values(stack)
        return y.sum() + (products**2).sum() + (left**3).sum()

    grad, (y, values) = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = layers_values(params["layers"])
    for actual, value in zip(
        (y, values["layers"], values["model/layer"]), expected, strict=True
    ):
        close(actual, value, rtol=1e-5, atol=1e-5)
    close(grad["layers"], central(definition, params["layers"]), rtol=1e-3, atol=1e-3)
    same(tapped(params, x)[0], layers(params, x, wrap))


def test_a_checkpoint_still_saves_nothing() -> None:
    """The tapped program has a remat of its own, with the operation inside."""

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w)))(x)

    text = str(jax.make_jaxpr(features(fn, "**"))(jnp.eye(3), X))
    assert "remat" in text or "checkpoint" in text
    saved = jax.eval_shape(lambda w: jax.vjp(fn, w, X)[1], jnp.eye(3))
    tapped = lambda w: jax.vjp(lambda w, x: features(fn, "**")(w, x)[0], w, X)[1]
    shapes = lambda tree: sorted(a.shape for a in jax.tree.leaves(tree))
    assert shapes(jax.eval_shape(tapped, jnp.eye(3))) == shapes(saved)


@pytest.mark.parametrize("jit", [False, True])
def test_a_jitted_block_called_twice_gives_each_call_its_own_value(jit: bool) -> None:
    """Both calls share one inner program, and one more inside it."""
    inner = jax.jit(lambda x, w: jnp.tanh(x @ w))
    block = jax.jit(lambda x, w: inner(x, w) + 1.0)
    fn = lambda p, x: block(block(x, p["w"]), p["w"])
    params, x = {"w": normal(7, 3, 3)}, normal(8, 2, 3)
    tapped = features(fn, "w")
    y, values = (jax.jit(tapped) if jit else tapped)(params, x)
    first = x @ params["w"]
    second = (jnp.tanh(first) + 1.0) @ params["w"]
    assert list(values) == ["w#0", "w#1"]
    close(values["w#0"], first, rtol=1e-6)
    close(values["w#1"], second, rtol=1e-6)
    same(y, (jax.jit(fn) if jit else fn)(params, x))
    same(
        features(fn, "w#1")(params, x)[1],
        {"w#1": features(fn, "w")(params, x)[1]["w#1"]},
    )


def test_a_tied_embedding_has_a_look_up_and_a_product() -> None:
    params, tokens = {"table": normal(0, 6, 3)}, jnp.array([[0, 5, 2]])
    fn = lambda p, t: jnp.tanh(p["table"][t]) @ p["table"].T
    y, values = jax.jit(features(fn, "table"))(params, tokens)
    table = np.asarray(params["table"])
    rows = table[np.asarray(tokens)]
    same(values["table#0"], rows)
    close(values["table#1"], np.tanh(rows) @ table.T, rtol=1e-5)
    same(values["table#1"], y)


@pytest.mark.parametrize(
    "name",
    [
        "nested_jit_shardings",
        "vmap_over_weights",
        "fori_loop_over_layers",
        "scan_carries_weight",
        "gradient_inside",
        "experts_batched",
        "experts_gathered",
        "ragged_dot",
        "cond_returns_weight",
        "bf16_casts",
    ],
)
def test_programs_of_every_kind_are_unchanged_and_shapes_are_as_listed(
    name: str,
) -> None:
    fn, params, args = PROGRAMS[name]()
    listed = tap_names(fn, params, *args)
    assert len(listed)
    assert not any(tap.problem for tap in listed)
    y, values = features(fn, "**")(params, *args)
    same(y, fn(params, *args))
    assert {k: (v.shape, v.dtype) for k, v in values.items()} == {
        tap.name: (tap.shape, tap.dtype) for tap in listed
    }


# -- functions with their own derivative


def test_inside_a_custom_derivative_the_outputs_keep_it_and_taps_have_the_bodys() -> (
    None
):
    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("inside"):
            h = jnp.square(x @ w)
        return jnp.sum(h)

    jvp = jax.custom_jvp(body)
    jvp.defjvp(lambda p, t: (body(*p), 7.0 * jnp.sum(t[0])))
    vjp = jax.custom_vjp(body)
    vjp.defvjp(
        lambda w, x: (body(w, x), (w, x)),
        lambda kept, g: (7.0 * g * jnp.ones_like(kept[0]), jnp.zeros_like(kept[1])),
    )
    w, x = normal(0, 3, 2), normal(1, 4, 3)
    for fn in (jvp, vjp):
        tapped = jax.jit(features(fn, ["inside"]))
        same(tapped(w, x)[0], jax.jit(fn)(w, x))
        close(tapped(w, x)[1]["inside"], np.square(np.asarray(x) @ np.asarray(w)), 1e-5)
        same(jax.grad(lambda w, f=tapped: f(w, x)[0])(w), jnp.full_like(w, 7.0))
        inner = jax.grad(lambda w, f=tapped: jnp.sum(f(w, x)[1]["inside"]))(w)
        close(inner, 2 * np.asarray(x).T @ (np.asarray(x) @ np.asarray(w)), rtol=1e-5)


# -- conditionals and loops


def branches(p: Any, x: jax.Array, flag: jax.Array) -> jax.Array:
    once = lambda x: jnp.tanh(x @ p["w"])
    return lax.cond(flag, lambda x: x @ p["w"] @ p["only"], once, x)


COND = {"w": normal(0, 3, 3), "only": normal(1, 3, 3)}


@pytest.mark.parametrize("flag", [True, False])
def test_a_value_of_every_branch_is_that_of_the_one_that_ran(flag: bool) -> None:
    def fn(p: Any, x: jax.Array, flag: jax.Array) -> jax.Array:
        nested = lambda x: lax.cond(
            x.sum() > 0, lambda x: x @ p["w"], lambda x: -x @ p["w"], x
        )
        return lax.cond(flag, nested, lambda x: (2.0 * x) @ p["w"], x)

    x = normal(2, 4, 3)
    tapped = jax.jit(features(fn, "w"))
    y, values = tapped(COND, x, jnp.array(flag))
    sign = (1.0 if float(x.sum()) > 0 else -1.0) if flag else 2.0
    assert list(values) == ["w"]
    close(values["w"], sign * (np.asarray(x) @ np.asarray(COND["w"])), rtol=1e-5)
    same(y, jax.jit(fn)(COND, x, jnp.array(flag)))
    grad = jax.grad(lambda p: tapped(p, x, jnp.array(flag))[1]["w"].sum())
    ones = np.ones((4, 3), np.float32)
    close(grad(COND)["w"], sign * (np.asarray(x).T @ ones), rtol=1e-5)


def test_a_value_of_one_branch_only_is_refused() -> None:
    listed = {tap.name: tap.problem for tap in tap_names(branches, COND, X, True)}
    assert listed["w"] is None
    with pytest.raises(LiftError, match=r"'only' cannot be .* not every branch"):
        features(branches, "only")(COND, X, jnp.array(True))


def test_while_loops_and_shard_map_are_refused_by_name() -> None:
    fn, params, args = PROGRAMS["while_loop"]()
    with pytest.raises(LiftError, match=r"features: 'w' .* inside a while loop"):
        features(fn, "w")(params, *args)
    fn, params, args = PROGRAMS["shard_map_psum"]()
    with pytest.raises(LiftError, match=r"features: 'w' .* inside shard_map"):
        features(fn, "w")(params, *args)


# -- scopes


def test_what_leaves_a_scope_is_its_last_floating_result_used_outside() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("part"):
            h = x @ w
            y = h + 1.0
            z = jnp.argmax(y, axis=-1)
            unused = jnp.exp(h)
        del unused
        return y[:, 0] + z.astype(jnp.float32)

    _, values = features(fn, "part")(normal(0, 3, 3), X)
    same(values["part"], X @ normal(0, 3, 3) + 1.0)


def test_a_scope_entered_twice_is_numbered_and_backward_passes_have_none() -> None:
    def energy(x: jax.Array) -> jax.Array:
        with jax.named_scope("energy"):
            return jnp.sum(x**2)

    def fn(x: jax.Array) -> Any:
        value, slope = jax.value_and_grad(energy)(x)
        return value, slope, energy(2.0 * x)

    _, values = features(fn, "energy")(X)
    assert list(values) == ["energy#0", "energy#1"]
    close(values["energy#0"], np.sum(np.asarray(X) ** 2), rtol=1e-6)
    close(values["energy#1"], 4 * np.sum(np.asarray(X) ** 2), rtol=1e-6)


# -- compressed leaves


def test_lift_of_features_taps_the_compressed_products() -> None:
    """Values and gradients are those on the dense array that the view stands for."""
    scheme = jc.quant.weights(jc.quant.int4(axes=-2))
    params, x = {"layers": normal(5, 3, 4, 4)}, normal(6, 2, 4)
    params, state = scheme.init(params)
    tapped = features(layers, ["layers", "model/layer"])

    def loss(params: Any) -> Any:
        y, values = jc.lift(tapped)(scheme.view(params, state), x)
        return jnp.sum(y) + jnp.sum(values["layers"] ** 2), (y, values)

    @jax.jit
    def run(params: Any) -> Any:
        view = jc.materialize(scheme.view(params, state))
        return jax.grad(loss, has_aux=True)(params), tapped(view, x), view["layers"]

    (grad, lifted), dense, view = run(params)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-5), lifted, dense)
    assert np.abs(view - params["layers"]).max() > 0.01

    def definition(stack: np.ndarray) -> float:
        h, total = np.asarray(x, np.float64), 0.0
        for w in stack:
            product = h @ w
            h, total = h + np.tanh(product), total + (product**2).sum()
        return h.sum() + total

    close(grad["layers"], central(definition, view), rtol=1e-3, atol=1e-3)


def test_the_other_order_is_refused_with_the_remedy() -> None:
    quantize = lambda w: jc.quant.quantize(w, jc.quant.int8())
    packed = {"w": jax.eval_shape(quantize, jnp.eye(4))}
    for fn in (lambda p, x: x @ p["w"], jc.lift(lambda p, x: x @ p["w"])):
        with pytest.raises(LiftError, match=r"lift\(distill.features\(fn"):
            features(fn, "w")(packed, X)


# -- errors


def test_unknown_names_are_listed_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'hiden' matches nothing.*'hidden'") as error:
        features(mlp, ["hiden", "up/w", "dwon/w"])(MLP, X)
    assert "'dwon/w' matches nothing; the nearest names are ['down/w'" in str(error)
    with pytest.raises(ValueError, match="the names begin"):
        features(mlp, "§§§§")(MLP, X)
    with pytest.raises(ValueError, match="no taps of these kinds"):
        features(lambda x: x + 1.0, "w")(X)


def test_a_name_of_two_kinds_is_refused_unless_the_kind_is_said() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("up"):
            return jnp.tanh(x @ p["up"])

    params = {"up": normal(0, 3, 3)}
    with pytest.raises(ValueError, match=r"'up' is a weight and a scope.*kinds="):
        features(fn, "up")(params, X)
    _, values = features(fn, "up", kinds=("scope",))(params, X)
    same(values["up"], jnp.tanh(X @ params["up"]))


@pytest.mark.parametrize("patterns", [[], [3], ()])
def test_patterns_must_be_globs(patterns: Any) -> None:
    with pytest.raises(ValueError, match="features: patterns must be one glob"):
        features(mlp, patterns)


@pytest.mark.parametrize("kinds", ["scope", (), ("scopes",)])
def test_kinds_must_be_known(kinds: Any) -> None:
    with pytest.raises(ValueError, match="features: kinds must be some of"):
        features(mlp, "**", kinds=kinds)


def test_the_list_needs_shapes_only_and_prints_as_a_table() -> None:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (MLP, X))
    listed = tap_names(mlp, *shapes)
    assert [t.name for t in listed] == ["up/w", "hidden", "doubled", "down/w"]
    assert "hidden   scope   float32[4, 5]" in str(listed)


# -- models


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.gelu(nn.Dense(6, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(4, name="down")(h)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x.mean(1))


def captured(model: nn.Module, params: Any, *args: Any) -> dict[str, Any]:
    """What every module returned, as Flax itself tells it, by scope."""
    _, found = model.apply(params, *args, capture_intermediates=True)
    flat = flatten_dict(found["intermediates"], sep="/")
    name = type(model).__name__
    return {f"{name}/{k}".removesuffix("/__call__"): v[0] for k, v in flat.items()}


def test_every_flax_module_gives_what_flax_captures() -> None:
    model, x = Model(), normal(0, 2, 5, 4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda a: normal(a.size, *a.shape), shapes)
    expected = jax.jit(lambda p, x: captured(model, p, x))(params, x)
    assert len(expected) == 10
    y, values = jax.jit(features(model.apply, list(expected)))(params, x)
    assert values.keys() == expected.keys()
    for name, value in values.items():
        close(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    same(y, values["Model"])


def test_stories_scanned_and_not_agree_with_flax(data_dir: Path) -> None:
    from experiments.models import stories

    tokens = jnp.array([[1, 403, 407, 261, 378]], jnp.int32)
    apart, params = stories.load(scan=False, root=data_dir)
    stacked, stacked_params = stories.load(scan=True, root=data_dir)
    parts = ("attention/wo", "ffn_norm", "w2")

    @jax.jit
    def run(params: Any) -> Any:
        names = [f"**/layers_*/{part}" for part in parts]
        tapped = features(apart.apply, names)(params, tokens)
        return *tapped, captured(apart, params, tokens)

    y, one, expected = run(params)
    names = [f"**/layers/{part}" for part in (*parts, "w2/kernel")]
    y2, all_ = jax.jit(features(stacked.apply, names))(stacked_params, tokens)
    assert len(one) == 15
    for name, value in one.items():
        layer, part = name.split("layers_")[1].split("/", 1)
        flax = expected[f"Stories/layers_{layer}/{part}"]
        stack = next(v for k, v in all_.items() if k.endswith(f"layers/{part}"))
        close(value, flax, rtol=1e-5, atol=1e-5)
        close(stack[int(layer)], flax, rtol=1e-4, atol=1e-4)
        if part == "w2":
            same(all_["params/layers/w2/kernel"], stack)
    close(y, y2, rtol=1e-4, atol=1e-4)


def test_minilm_layers_agree_with_flax() -> None:
    pytest.importorskip("tokenizers")
    from experiments.models import minilm

    try:
        model, params = minilm.load(scan=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    ids = jnp.array([[101, 1037, 2158, 2003, 102]], jnp.int32)
    y, values = jax.jit(features(model.apply, ["**/layers", "**/embeddings"]))(
        params, ids, ids > 0
    )
    x = values["MiniLM/embeddings"]
    (scanned,) = (v for k, v in values.items() if k.endswith("layers"))
    layer = jax.jit(minilm.Layer().apply)
    for i in range(minilm.LAYERS):
        w = jax.tree.map(lambda a, i=i: a[i], params["params"]["layers"])
        x = layer({"params": w}, x, ids > 0)
        close(scanned[i], x, rtol=1e-4, atol=1e-4)
    mean = np.asarray(x).mean(1)
    close(y, mean / np.linalg.norm(mean, axis=-1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_sharded_inputs_stay_sharded() -> None:
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    x = jax.device_put(normal(0, 8, 3), NamedSharding(mesh(), P("d")))
    _, values = jax.jit(features(mlp, "hidden"))(MLP, x)
    assert values["hidden"].sharding.is_equivalent_to(x.sharding, 2)
    whole = jax.jit(features(mlp, "hidden"))(MLP, np.asarray(x))[1]["hidden"]
    np.testing.assert_allclose(values["hidden"], whole, rtol=1e-6)
