"""lift(fn)(packed) equals fn(materialize(packed)), in value and gradient."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.layout import Axes
from jaxcompress.leaf import Leaf, is_leaf
from jaxcompress.lift._tracked import LiftError
from tests.lift.disguise import Disguise, disguise
from tests.lift.programs import PROGRAMS, mesh, normal

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Any:
    return PROGRAMS[request.param]()


def quantized(fn: Any, params: Any, args: Any, view: bool) -> Any:
    """The matrices of the program as int8 leaves, or as their training view."""
    axes = jc.trace_axes(fn, params, *args)
    big = lambda path, w: np.ndim(w) > 1
    scheme = jc.select({big: jc.quant.int8()}, axes=axes)
    params, state = scheme.init(params)
    return (scheme.view if view else scheme.compress)(params, state)


def assert_trees_close(actual: Any, expected: Any, **tolerance: float) -> None:
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), **tolerance
        ),
        actual,
        expected,
    )


def test_value_of_a_disguised_tree_is_exact(program: Any) -> None:
    fn, params, args = program
    actual = jc.lift(fn)(disguise(params), *args)
    assert_trees_close(actual, fn(params, *args), rtol=1e-6, atol=1e-6)


def test_gradient_of_a_disguised_tree(program: Any, request: Any) -> None:
    fn, params, args = program
    if request.node.callspec.params["program"] == "while_loop":
        pytest.skip("JAX has no reverse mode for while_loop")
    loss = lambda f: lambda p: jnp.square(f(p, *args).astype(jnp.float32)).sum()
    expected = jax.grad(loss(fn))(params)
    actual = jax.grad(loss(jc.lift(fn)))(disguise(params))
    assert_trees_close(jc.materialize(actual), expected, **TOLERANCE)


@pytest.mark.parametrize("view", [False, True], ids=["packed", "view"])
def test_value_of_a_quantized_tree(program: Any, view: bool, request: Any) -> None:
    fn, params, args = program
    packed = quantized(fn, params, args, view)
    assert any(isinstance(x, Leaf) for x in jax.tree.leaves(packed, is_leaf=is_leaf))
    expected = jax.jit(fn)(jc.materialize(packed), *args)
    # XLA may keep the sums of a bfloat16 matmul in float32 in the dense program.
    half = request.node.callspec.params["program"] == "bf16_casts"
    tolerance = {"rtol": 2**-7, "atol": 1e-6} if half else TOLERANCE
    assert_trees_close(jax.jit(jc.lift(fn))(packed, *args), expected, **tolerance)


def test_a_bf16_matmul_is_rounded_alike_in_view_and_storage() -> None:
    fn, params, args = PROGRAMS["bf16_casts"]()
    run = jax.jit(jc.lift(fn))
    view, packed = (run(quantized(fn, params, args, v), *args) for v in (True, False))
    np.testing.assert_array_equal(view, packed)


def test_jit_equals_eager_and_traces_once() -> None:
    traces = []

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        traces.append(None)
        return jnp.tanh(x @ w)

    lifted = jc.lift(fn)
    w, x = Disguise(array=normal(0, 8, 4)), normal(1, 3, 8)
    first = lifted(w, x)
    np.testing.assert_array_equal(first, lifted(w, x))
    np.testing.assert_allclose(jax.jit(lifted)(w, x), first, rtol=1e-6)
    assert len(traces) == 1
    lifted(w, normal(1, 5, 8))
    assert len(traces) == 2


def test_eager_loops_compile_once() -> None:
    fn, params, args = PROGRAMS["linen_scan"]()
    lifted, packed = jc.lift(fn), disguise(params)
    lifted(packed, *args)
    with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
        import logging

        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("jax")
        patch.setattr(logger, "propagate", False)
        logger.addHandler(handler)
        lifted(packed, *args)
        logger.removeHandler(handler)
    assert not [m for m in messages if "Compiling" in m]


def test_untouched_calls_are_bit_identical_to_a_fresh_process() -> None:
    code = (
        "import numpy as np, jax.numpy as jnp;"
        "r=np.random.default_rng(0);"
        "x=jnp.asarray(r.normal(size=(7,65)),jnp.float32);"
        "w=jnp.asarray(r.normal(size=(65,33)),jnp.float32);"
    )
    script = code + "print(np.asarray(x @ w).tobytes().hex())"
    fresh = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.strip()
    scope: dict[str, Any] = {}
    exec(code, scope)  # The same arrays, made the same way.
    x, w = scope["x"], scope["w"]
    plain = lambda: np.asarray(x @ w).tobytes().hex()
    results = [plain()]
    for name in ("linen_dense", "linen_scan", "custom_jvp"):
        fn, params, args = PROGRAMS[name]()
        jc.lift(fn)(disguise(params), *args)
        results.append(plain())
    assert results == [fresh] * 4


def test_static_arguments_typed_keys_and_mutable_collections() -> None:
    import flax.linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, mode: str, train: bool) -> jax.Array:
            assert mode == "loud"
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    x = normal(0, 6, 8)
    variables = Model().init(jax.random.key(0), x, "loud", train=False)
    packed = {**variables, "params": disguise(variables["params"])}
    for train in (False, True):
        kwargs: dict[str, Any] = {
            "train": train,
            "rngs": {"dropout": jax.random.key(1)},
        }
        if train:
            kwargs["mutable"] = ["batch_stats"]
        expected = Model().apply(variables, x, "loud", **kwargs)
        if train:
            # `mutable=` takes a list, which cannot be a static argument.
            kwargs["mutable"] = ("batch_stats",)
        actual = jc.lift(Model().apply)(packed, x, "loud", **kwargs)
        assert_trees_close(actual, expected, **TOLERANCE)


def test_without_leaves_the_function_itself_is_called() -> None:
    seen = []
    jc.lift(lambda x: seen.append(x))(object_ := object())  # Not even traceable.
    assert seen == [object_]


def test_leaf_in_while_carry_is_refused() -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        body = lambda c: (c[0] + 1, c[1].T, c[2] @ c[1])
        return jax.lax.while_loop(lambda c: c[0] < 2, body, (0, w, x))[2]

    with pytest.raises(LiftError, match="carried through a while loop"):
        jc.lift(fn)(Disguise(array=normal(0, 4, 4)), normal(1, 2, 4))


@jax.custom_vjp
def _tripled(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


_tripled.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda r, g: (3.0 * r[1].T @ g, 3.0 * g @ r[0].T)
)


def test_custom_vjp_around_a_use_is_refused_or_as_asked() -> None:
    w, x = normal(0, 8, 4), normal(1, 3, 8)
    leaf = Disguise(array=w)
    with pytest.raises(LiftError, match=r"custom_vjp='inline'.*custom_vjp='opaque'"):
        jc.lift(_tripled)(leaf, x)
    gradient = lambda f, w: jax.grad(lambda x: f(w, x).sum())(x)
    opaque = gradient(jc.lift(_tripled, custom_vjp="opaque"), leaf)
    inline = gradient(jc.lift(_tripled, custom_vjp="inline"), leaf)
    np.testing.assert_allclose(opaque, gradient(_tripled, w), rtol=1e-6)
    np.testing.assert_allclose(inline, gradient(_tripled, w) / 3.0, rtol=1e-6)


def test_custom_vjp_without_a_use_is_untouched() -> None:
    @jax.custom_vjp
    def reversed_gradient(x: jax.Array) -> jax.Array:
        return x

    reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    fn = lambda w, x: reversed_gradient(x) @ w
    w, x = normal(0, 8, 4), normal(1, 3, 8)
    gradient = lambda f, w: jax.grad(lambda x: f(w, x).sum())(x)
    np.testing.assert_allclose(
        gradient(jc.lift(fn), Disguise(array=w)), gradient(fn, w), rtol=1e-6
    )


def test_on_dense_is_heard() -> None:
    fn = lambda w, x: x @ (w * 2.0)
    leaf, x = Disguise(array=normal(0, 8, 4)), normal(1, 3, 8)
    with pytest.raises(LiftError, match="made dense by 'mul'"):
        jc.lift(fn, on_dense="error")(leaf, x)
    with pytest.warns(UserWarning, match="made dense by 'mul'"):
        jc.lift(fn, on_dense="warn")(leaf, x)
    with pytest.raises(ValueError, match="on_dense must be one of"):
        jc.lift(fn, on_dense="never")  # type: ignore[arg-type]


def test_closed_over_weight_is_named() -> None:
    w, x = normal(0, 8, 4), normal(1, 3, 8)
    params = {"layer": {"kernel": w}}
    inner = jax.jit(lambda x: x @ w)
    with pytest.raises(LiftError, match="never uses the argument 'layer/kernel'"):
        jc.lift(lambda p, x: inner(x))(disguise(params), x)
    with pytest.raises(LiftError, match="layer/kernel"):
        jc.calibrate(lambda p, x: inner(x), params, [x])


def test_a_leaf_closed_over_names_the_remedy() -> None:
    leaf = Disguise(array=normal(0, 8, 4))
    with pytest.raises(TypeError, match="pass it as an argument of a lifted function"):
        normal(1, 3, 8) @ leaf
    with pytest.raises(TypeError, match="pass it as an argument of a lifted function"):
        leaf * 2.0


def test_unhashable_static_argument_is_named() -> None:
    with pytest.raises(LiftError, match="must be hashable; got set"):
        jc.lift(lambda w, x, s: x @ w)(
            Disguise(array=normal(0, 8, 4)), normal(1, 3, 8), {1}
        )


def test_explain_names_every_site() -> None:
    for name, make in PROGRAMS.items():
        fn, params, args = make()
        kernels = lambda path, x: np.ndim(x) > 1 and not path.endswith("bias")
        sites = jc.explain(fn, disguise(params, kernels), *args)
        paths = {p for p, x in jc.tree.flatten(params)[0].items() if kernels(p, x)}
        assert {s.path for s in sites} >= paths, name
        made_dense = {s.path for s in sites if s.turned_dense}
        assert made_dense == ({"w"} if name == "weight_used_elementwise" else set())


def test_explain_counts_scans_and_names_what_turned_dense() -> None:
    fn, params, args = PROGRAMS["linen_scan"]()
    sites = jc.explain(fn, disguise(params), *args)
    assert {s.times for s in sites if s.op == "dot_general"} == {3}
    fn, params, args = PROGRAMS["weight_used_elementwise"]()
    (site,) = jc.explain(fn, disguise(params), *args)
    assert (site.path, site.op, site.turned_dense) == ("w", "mul", True)
    assert "made dense" in str(jc.explain(fn, disguise(params), *args))


EXPECTED_AXES = {
    "linen_dense": {"params/kernel": Axes(contract=(-2,))},
    "linen_dense_general": {"params/kernel": Axes(contract=(-3, -2))},
    "linen_conv": {"params/kernel": Axes(contract=(-4, -3, -2))},
    "linen_embed": {"params/embedding": Axes(contract=(-1,))},
    "linen_tied_embedding": {"params/Embed_0/embedding": Axes(contract=(-1,))},
    "einsum_left": {"w": Axes(contract=(-2,))},
    "experts_batched": {"w": Axes(contract=(-2,), stack=1)},
    "ragged_dot": {"w": Axes(contract=(-2,), stack=1)},
    "transposed": {"w": Axes(contract=(-1,))},
    "weight_reshaped": {"w": Axes(contract=(-3, -2))},
    "weight_sliced": {"w": Axes(contract=(-2,), stack=1)},
    "fori_loop_over_layers": {"w": Axes(contract=(-2,), stack=1)},
    "shard_map_psum": {"w": Axes(contract=(-2,))},
}


@pytest.mark.parametrize("name", EXPECTED_AXES)
def test_axes_are_read_off_the_trace(name: str) -> None:
    fn, params, args = PROGRAMS[name]()
    axes = jc.trace_axes(fn, params, *args)
    assert {p: axes[p] for p in EXPECTED_AXES[name]} == EXPECTED_AXES[name]


def test_scanned_layers_are_a_stack() -> None:
    fn, params, args = PROGRAMS["linen_scan"]()
    axes = jc.trace_axes(fn, params, *args)
    assert all(
        axes[p] == Axes(contract=(-2,), stack=1) for p in axes if p.endswith("kernel")
    )


def test_sharded_weights_give_the_same_result() -> None:
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    fn = lambda p, x: jnp.tanh(x @ p["w"])
    params, x = {"w": normal(0, 16, 24)}, normal(1, 3, 16)
    packed = jc.compress(params, {"w": jc.quant.int8()})
    lifted = jax.jit(jc.lift(fn))
    placed = jax.device_put(
        packed,
        jax.tree.map(
            lambda s: NamedSharding(mesh(), s),
            jc.shardings(packed, {"w": P(None, "d")}, mesh()),
            is_leaf=lambda s: isinstance(s, P),
        ),
    )
    np.testing.assert_allclose(lifted(placed, x), lifted(packed, x), **TOLERANCE)
