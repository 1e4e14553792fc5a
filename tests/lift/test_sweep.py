"""The sweep: order, statistics, stacks, references, resumption and refusals."""

from __future__ import annotations

import functools
import json
import logging
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.lift import Algorithm, Layer, LiftError, sweep
from jaxcompress.lift._explain import find_sites, site_axes
from jaxcompress.lift._memory import live_bytes, sweep_bytes
from jaxcompress.tree import flatten
from tests.lift.programs import PROGRAMS, mesh, normal

INT8, INT3 = jc.quant.int8(), jc.quant.integer(3)


def rounding(fmt: Any) -> Algorithm:
    def run(w: jax.Array, stats: Any, *, axes: Any, path: str) -> Any:
        del stats
        return jc.quant.quantize(w, fmt, axes=axes, path=path)

    return Algorithm(run=run, baseline=run, name=fmt.name)


UNREACHABLE = ("shard_map_psum", "shard_map_replicated", "while_loop")


REACHABLE = (
    "linen_conv",
    "linen_tied_embedding",
    "linen_attention",
    "linen_scan_of_remat",
    "nnx_split_merge",
    "einsum_left",
    "experts_batched",
    "ragged_dot",
    "transposed",
    "sharding_constraint",
    "cond_returns_weight",
    "fori_loop_over_layers",
    "custom_jvp",
    "weight_reshaped",
    "weight_sliced",
    "experts_gathered",
)


@pytest.mark.parametrize("name", REACHABLE)
def test_rounding_in_a_sweep_is_compress(name: str) -> None:
    fn, params, args = PROGRAMS[name]()
    axes = jc.trace_axes(fn, params, *args)
    chosen = lambda path, w: np.ndim(w) > 1 and path in axes
    expected = jc.compress(params, {chosen: INT8}, fn=fn, example=args)
    swept = sweep(fn, params, [args], {chosen: rounding(INT8)})
    assert jax.tree.structure(swept) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, swept, expected)


@pytest.mark.parametrize("name", UNREACHABLE)
def test_where_a_sweep_cannot_reach_is_named(name: str) -> None:
    fn, params, args = PROGRAMS[name]()
    path = next(p for p, w in flatten(params)[0].items() if np.ndim(w) > 1)
    with pytest.raises(LiftError, match=f"sweep: '{path}' is used inside"):
        sweep(fn, params, [args], {path: rounding(INT8)})


class Layered(nn.Module):
    """Scanned layers of two Dense each, of which the first two share their input."""

    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
                a, b = nn.Dense(8, name="a")(x), nn.Dense(8, name="b")(x)
                return x + nn.Dense(8, name="c")(nn.relu(a) * b), None

        scan = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return nn.Dense(4, name="head")(scan(name="block")(x, None)[0])


@pytest.fixture(scope="module")
def layered() -> Any:
    model = Layered()
    batches = [normal(i, 16, 8) * 4 for i in range(2)]
    return model, model.init(jax.random.key(0), batches[0]), batches


def test_each_weight_sees_the_inputs_that_compressed_weights_give(layered: Any) -> None:
    model, params, batches = layered
    grams: list[Any] = []
    layers: list[Layer] = []

    def record(w: jax.Array, stats: Any, *, axes: Any, path: str) -> Any:
        jax.debug.callback(grams.append, stats.gram, ordered=True)
        return jc.quant.quantize(w, INT3, axes=axes, path=path)

    algorithm = Algorithm(run=record, baseline=rounding(INT3).baseline, name="record")
    rules = {"**/kernel": algorithm}
    packed = sweep(model.apply, params, batches, rules, on_layer=layers.append)
    jax.effects_barrier()
    stats = jc.calibrate(model.apply, packed, batches, gram=True)
    for layer, gram in zip(layers, grams, strict=True):
        expected = stats[layer.path].gram
        assert expected is not None
        expected = expected if layer.entry is None else expected[layer.entry]
        np.testing.assert_allclose(gram, expected, rtol=2e-4, atol=2e-4)


def test_convolutions_of_one_input_share_statistics_only_if_alike() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
            windows = {"a": ((3, 3), 1), "b": ((3, 3), 2), "c": ((1, 1), 1)}
            return tuple(
                nn.Conv(4, size, strides=stride, name=name)(x)
                for name, (size, stride) in windows.items()
            )

    x = normal(0, 2, 6, 6, 3)
    params = Net().init(jax.random.key(0), x)
    layers: list[Layer] = []
    rules = {"**/kernel": rounding(INT3)}
    sweep(Net().apply, params, [x], rules, on_layer=layers.append)
    assert [layer.rows for layer in layers] == [72, 18, 72]


def test_layers_report_in_the_order_they_run(layered: Any) -> None:
    model, params, batches = layered
    layers: list[Layer] = []
    rules = {"**/kernel": rounding(INT3)}
    sweep(model.apply, params, batches, rules, on_layer=layers.append)
    names = [(x.path.split("/")[-2], x.entry) for x in layers]
    assert names == [(n, i) for i in range(3) for n in "abc"] + [("head", None)]
    assert all(x.rows == 32 and x.error == x.error_before for x in layers)
    assert all(0 < (x.error or 0) < 0.2 for x in layers)


def test_a_reference_makes_up_for_earlier_errors(layered: Any) -> None:
    model, params, batches = layered
    rules = {"**/kernel": rounding(INT3)}
    expected = model.apply(params, batches[0])
    error = {}
    for reference in (False, True):
        packed = sweep(model.apply, params, batches, rules, reference=reference)
        out = jc.lift(model.apply)(packed, batches[0])
        error[reference] = float(jnp.square(out - expected).mean())
    assert error[True] < 0.6 * error[False]


def compilations(run: Any, *names: str) -> int:
    """Log lines on compiling functions so named."""
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    with jax.log_compiles(True):
        run()
    logger.removeHandler(handler)
    return sum(any(name in line for name in names) for line in log)


def test_a_scanned_layer_compiles_once(layered: Any) -> None:
    _, _, batches = layered
    rules = {"**/block/**/kernel": rounding(INT3)}

    def count(layers: int) -> int:
        model = Layered(layers=layers)
        params = model.init(jax.random.key(0), batches[0])
        run = functools.partial(sweep, model.apply, params, batches, rules)
        return compilations(run, "run", "segment")

    assert count(2) == count(6) > 0


def test_like_layers_share_what_collects_their_statistics() -> None:
    def count(layers: int) -> int:
        fn = lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p, x)
        params = [normal(i, 8, 8) for i in range(layers)]
        run = functools.partial(
            sweep, fn, params, [normal(9, 4, 8)], {"*": rounding(INT3)}, reference=True
        )
        return compilations(run, "collect", "cross")

    assert count(1) == count(3) > 0


def test_a_killed_sweep_goes_on_where_it_was(layered: Any, tmp_path: Any) -> None:
    model, params, batches = layered
    rules = {"**/kernel": rounding(INT3)}
    whole = sweep(model.apply, params, batches, rules)

    class Killed(Exception):
        pass

    def kill(layer: Layer) -> None:
        if (layer.path.split("/")[-2], layer.entry) == ("b", 1):
            raise Killed

    go = functools.partial(sweep, model.apply, work_dir=tmp_path / "work")
    with pytest.raises(Killed):
        go(params, batches, rules, on_layer=kill)
    layers: list[Layer] = []
    resumed = go(params, batches, rules, on_layer=layers.append)
    assert [x.resumed for x in layers] == [True] * 5 + [False] * 5
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    log = (tmp_path / "work" / "log.jsonl").read_text().splitlines()
    assert [json.loads(x)["path"] for x in log] == [x.path for x in layers]

    other = jax.tree.map(lambda w: w * 1.01, params)
    for changed in ((other, batches, rules), (params, batches[:1], rules)):
        with pytest.raises(LiftError, match="holds the work of another sweep"):
            go(*changed)
    file = tmp_path / "work" / "layer_00002.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    with pytest.raises(LiftError, match="layer_00002"):
        go(params, batches, rules)
    file.unlink()
    (tmp_path / "work" / "sweep.json").write_text("{")
    with pytest.raises(LiftError, match="is damaged"):
        go(params, batches, rules)


def test_sharded_and_unsharded_sweeps_give_the_same_codes(layered: Any) -> None:
    model, params, batches = layered
    rules = {"**/kernel": rounding(INT3)}
    sharding = NamedSharding(mesh(), P("d"))
    split = [jax.device_put(b, sharding) for b in batches]
    jax.tree.map(
        np.testing.assert_array_equal,
        sweep(model.apply, params, split, rules),
        sweep(model.apply, params, batches, rules),
    )


def test_entries_that_never_run_are_compressed_without_data() -> None:
    params = {"w": normal(0, 3, 8, 8)}
    layers: list[Layer] = []
    packed = sweep(
        lambda p, x: x @ p["w"][1],
        params,
        [normal(1, 4, 8)],
        {"w": rounding(INT8)},
        on_layer=layers.append,
    )
    assert {(x.entry, x.rows) for x in layers} == {(1, 4.0), (0, 0.0), (2, 0.0)}
    expected = jc.compress(params, {"w": jc.quant.int8(axes=-2)})
    np.testing.assert_array_equal(
        packed["w"].materialize(), expected["w"].materialize()
    )


def test_bad_input_is_refused_before_anything_runs(layered: Any) -> None:
    model, params, batches = layered
    rules = {"**/kernel": rounding(INT3)}
    with pytest.raises(ValueError, match="batches is empty"):
        sweep(model.apply, params, [], rules)
    with pytest.raises(ValueError, match="batch 1 differs from the first"):
        sweep(model.apply, params, [batches[0], batches[1][:4]], rules)
    with pytest.raises(ValueError, match="matches nothing"):
        sweep(model.apply, params, batches, {"**/nothing": rounding(INT3)})
    with pytest.raises(LiftError, match="no matmul or look-up uses"):
        sweep(model.apply, params, batches, {"**/head/bias": rounding(INT3)})
    bad = rounding(jc.quant.int4(group_size=5))
    with pytest.raises(ValueError, match="group_size must divide"):
        sweep(model.apply, params, batches, {"**/head/kernel": bad})
    packed = jc.compress(params, {"**/head/kernel": INT8})
    with pytest.raises(LiftError, match="is compressed already"):
        sweep(model.apply, packed, batches, {"**/head/kernel": rounding(INT3)})
    with pytest.raises(MemoryError, match="bytes are needed, and memory_limit is 9,9"):
        sweep(model.apply, params, batches, rules, memory_limit=9_999)
    broken = jax.tree.map(lambda w: w.at[0].set(jnp.inf), params)
    with pytest.raises(ValueError, match="sweep: weights must be finite"):
        sweep(model.apply, broken, batches, rules)


def test_inputs_that_are_not_finite_are_named() -> None:
    params = {"a": jnp.eye(3), "b": jnp.eye(3)}
    # The first product is finite, its exponential is not.
    x = jnp.array([[1.0, 2.0, 100.0]])
    fn = lambda p, x: jnp.exp(x @ p["a"]) @ p["b"]
    with pytest.raises(ValueError, match=r"matmul of 'b' must be finite; 1 of 3"):
        sweep(fn, params, [x], {"*": rounding(INT8)})


def test_memory_is_that_counted_by_hand() -> None:
    def fn(w: Any, x: jax.Array) -> jax.Array:
        h = x @ w["a"]
        return jnp.tanh(h) @ w["b"]

    params = {"a": jnp.ones((16, 32)), "b": jnp.ones((32, 4))}
    x = jnp.ones((8, 16))
    jaxpr = jax.make_jaxpr(fn)(params, x)
    batch, h = 8 * 16 * 4, 8 * 32 * 4
    assert live_bytes(jaxpr, [False, False, True]) == 2 * h
    sites, _ = find_sites(fn, params, (x,), {}, who="test")
    needed = sweep_bytes(
        jaxpr,
        [True, True, False],
        streams=3,
        params=params,
        sites=sites,
        axes=site_axes(sites),
    )
    weights = (16 * 32 + 32 * 4) * 4
    assert needed == 2 * weights + 3 * (batch + 2 * h) + 4 * 6 * 32 * (32 + 4)


@pytest.mark.parametrize("scanned", [False, True])
def test_memory_of_layers_does_not_grow_with_their_number(scanned: bool) -> None:
    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        if scanned:
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
        return functools.reduce(lambda x, i: jnp.tanh(x @ w[i]), range(4), x)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones((4, 6, 6)), jnp.ones((5, 6)))
    x = 5 * 6 * 4
    assert live_bytes(jaxpr, [False, True]) == (3 * x if scanned else 2 * x)
