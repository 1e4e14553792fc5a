"""A device's part of a leaf is the leaf of its part of the weight."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress.leaf import Leaf
from tests.lift.programs import mesh

q = jc.quant
int4 = functools.partial(q.int4, group_size=8)
materialize = jax.jit(jc.materialize)


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def quantized(fmt: Any, *shape: int, axes: Any = None) -> Leaf:
    return jax.jit(lambda w: q.quantize(w, fmt, axes=axes))(weight(*shape))


def abstract(fmt: Any, *shape: int, axes: Any = None) -> Leaf:
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: q.quantize(w, fmt, axes=axes), w)


def masked(fmt: Any, *shape: int) -> Leaf:
    scheme = jc.chain(jc.prune.magnitude(sparsity=0.5), fmt)
    return jax.jit(lambda w: scheme.view(*scheme.init(w)))(weight(*shape))


def grid() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def place(tree: Any, specs: Any, m: jax.sharding.Mesh) -> Any:
    placed = jax.tree.map(
        lambda s: NamedSharding(m, s),
        jc.shardings(tree, specs, m),
        is_leaf=lambda s: isinstance(s, P),
    )
    return jax.device_put(tree, placed)


def part(tree: Any, device: jax.Device) -> Any:
    """What of every component one device holds."""
    held = lambda a: next(s for s in a.addressable_shards if s.device == device)
    return jax.tree.map(lambda a: np.asarray(held(a).data), tree)


LAW = {
    "outputs": (lambda: quantized(int4(), 64, 8), P(None, "d"), mesh),
    "inputs": (lambda: quantized(int4(), 64, 8), P("d"), mesh),
    "inputs of one group": (lambda: quantized(q.int4(), 64, 8), P("d"), mesh),
    "one scale": (
        lambda: quantized(q.int4(granularity=q.PerTensor()), 64, 8),
        P(None, "d"),
        mesh,
    ),
    "zero points": (
        lambda: quantized(int4(symmetric=False), 64, 8),
        P("d", None),
        mesh,
    ),
    "scales of scales": (lambda: quantized(q.nvfp4(), 128, 8), P("d"), mesh),
    "layers": (lambda: quantized(int4(), 8, 64, 4, axes=-2), P("d"), mesh),
    "heads": (
        lambda: quantized(int4(), 8, 16, 4, axes=(-3, -2)),
        P("d", None, None),
        mesh,
    ),
    "masked view": (lambda: masked(int4(), 64, 8), P("d"), mesh),
    "both axes": (lambda: quantized(int4(), 64, 8), P("b", "a"), grid),
    "two mesh axes": (lambda: quantized(int4(), 64, 8), P(("a", "b"), None), grid),
    "replicated": (lambda: quantized(int4(), 64, 8), P(), mesh),
}


@pytest.mark.parametrize(("make", "spec", "on"), LAW.values(), ids=LAW)
def test_a_part_of_a_leaf_is_the_leaf_of_a_part(make: Any, spec: P, on: Any) -> None:
    leaf, m = make(), on()
    placed = place(leaf, spec, m)
    dense = np.asarray(materialize(leaf))
    cut = NamedSharding(m, spec).devices_indices_map(dense.shape)
    assert len({str(index) for index in cut.values()}) == (1 if spec == P() else 8)
    for device, index in cut.items():
        np.testing.assert_array_equal(materialize(part(placed, device)), dense[index])


@pytest.mark.parametrize("spec", [P("d"), P(None, "d")], ids=["inputs", "outputs"])
def test_a_sharded_leaf_computes_what_the_whole_one_does(spec: P) -> None:
    params = {"w": quantized(int4(), 64, 8), "b": weight(8)}
    run = jax.jit(jc.lift(lambda p, x: x @ p["w"] + p["b"][None]))
    placed = place(params, {"w": spec, "b": P("d")}, mesh())
    assert len(placed["w"].words.sharding.device_set) == 8
    assert placed["w"].words.addressable_shards[0].data.nbytes * 8 == 64 * 8 // 2
    np.testing.assert_allclose(
        run(placed, weight(3, 64)), run(params, weight(3, 64)), rtol=1e-5, atol=1e-5
    )


def test_specs_stand_where_the_arrays_stood() -> None:
    tree = {"layer": {"w": abstract(int4(), 64, 8), "b": jnp.zeros(8)}, "n": None}
    specs = {"layer": {"w": P("d", None), "b": P("d")}, "n": None}
    found = jc.shardings(tree, specs, mesh())
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert found["layer"]["b"] == P("d")
    assert found["layer"]["w"].words == P(None, "d")
    assert found["layer"]["w"].scale == P(None, "d")


def test_one_spec_stands_for_a_subtree() -> None:
    tree = {"a": {"w": abstract(int4(), 64, 8), "b": jnp.zeros((8, 8))}, "c": 1.0}
    found = jc.shardings(tree, {"a": P(None, "d"), "c": P()}, mesh())
    assert found["a"]["w"].words == P("d", None)
    assert found["a"]["b"] == P(None, "d")


# -- cuts that are refused

REFUSED = {
    "a group": (
        lambda: abstract(q.int4(group_size=32), 64, 8),
        P("d"),
        r"int4 g32: axis -2 of size 64 cannot be cut in 8 parts .* in \[2\]",
    ),
    "a word": (
        lambda: abstract(q.int4(), 8, 8),
        P("d"),
        r"axis -2 of size 8 cannot be cut in 8 parts inside words .* in \[2, 4\]",
    ),
    "a word of three bits": (
        lambda: abstract(q.int3(), 32, 8),
        P("d"),
        r"int3: .* cannot be cut in 8 parts .* in \[2, 4\]",
    ),
    "padding": (lambda: abstract(q.int4(), 15, 8), P("d"), r"size 15 .* in \[\]"),
    "outputs that do not divide": (
        lambda: abstract(q.int4(), 16, 6),
        P(None, "d"),
        "6 blocks of scales .* cannot be cut in 8 parts; shard it by a divisor of 6",
    ),
    "a later contracting axis": (
        lambda: abstract(int4(), 2, 8, 4, axes=(-3, -2)),
        P(None, "d"),
        r"of the contracting axes \(-3, -2\) only the first may be sharded",
    ),
    "a bitmask": (
        lambda: jax.eval_shape(
            lambda p: jc.compress(p, {"w": jc.prune.magnitude(sparsity=0.5)}),
            {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
        )["w"],
        P("d"),
        "bitmask dense: only the 0 stack axes can be sharded",
    ),
}


@pytest.mark.parametrize(("make", "spec", "message"), REFUSED.values(), ids=REFUSED)
def test_a_cut_inside_something_is_refused_by_name(
    make: Any, spec: P, message: str
) -> None:
    with pytest.raises(ValueError, match=f"shardings: at 'layers/0': .*{message}"):
        jc.shardings({"layers": [make()]}, spec, mesh())


@pytest.mark.parametrize(
    ("fmt", "size", "bits", "groups"),
    [
        (q.int4(), 24, 4, 1),
        (q.int4(group_size=4), 24, 4, 6),
        (q.int3(), 48, 3, 1),
        (q.int8(), 12, 8, 1),
        (q.mxfp4(), 96, 4, 3),
    ],
    ids=str,
)
def test_the_sizes_that_are_named_are_those_that_can_be_cut(
    fmt: Any, size: int, bits: int, groups: int
) -> None:
    def can_be_cut(n: int) -> bool:
        whole_bytes = size % n == 0 and size // n * bits % 8 == 0
        return whole_bytes and (groups == 1 or groups % n == 0)

    leaf = abstract(fmt, size, 4)
    expected = [n for n in range(2, size + 1) if can_be_cut(n)]
    for n in range(2, size + 1):
        on = AbstractMesh((n,), ("d",))
        if n in expected:
            assert tuple(jc.shardings(leaf, P("d"), on).words) == (None, "d")
            continue
        with pytest.raises(ValueError, match=f"cannot be cut in {n} parts") as refused:
            jc.shardings(leaf, P("d"), on)
        named = re.search(r"can be cut in (\[.*\])", str(refused.value))
        assert named is not None
        assert json.loads(named[1]) == expected


def test_a_spec_longer_than_the_rank_is_refused() -> None:
    leaf = abstract(int4(), 64, 8)
    with pytest.raises(ValueError, match="at 'w'"):
        jc.shardings({"w": leaf}, P(None, None, "d"), mesh())


def test_an_axis_that_the_mesh_lacks_is_named() -> None:
    leaf = abstract(int4(), 64, 8)
    with pytest.raises(ValueError, match=r"at 'w'.*'model'"):
        jc.shardings({"w": leaf}, P("model"), mesh())


def test_a_leaf_of_an_nnx_state_is_named_as_in_reports() -> None:
    state = nnx.State({"layer": {"kernel": nnx.Param(abstract(q.int4(), 8, 8))}})
    with pytest.raises(ValueError, match="at 'layer/kernel':"):
        jc.shardings(state, P("d"), mesh())
