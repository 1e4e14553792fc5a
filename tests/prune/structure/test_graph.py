"""Groups of small models, against what can be read off their code."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import prune

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def tree(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}


def groups(graph: prune.Graph) -> set[Any]:
    """Size, axes with how many positions of them go together, and layers."""
    return {
        (
            g.size,
            frozenset((m.path, m.axis, m.positions.shape[1]) for m in g.members),
            g.layers,
        )
        for g in graph.removable
    }


def one(size: int, *members: tuple[str, int, int], layers: int = 1) -> set[Any]:
    return {(size, frozenset(members), layers)}


def test_hidden_features_couple_two_matmuls_and_a_bias() -> None:
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]
    graph = prune.dependency_graph(fn, tree(a=(3, 5), b=(5,), c=(5, 4)), X)
    assert groups(graph) == one(5, ("a", 1, 1), ("b", 0, 1), ("c", 0, 1))
    kept = {
        (m.path, m.axis): g.fixed for g in graph.groups if g.fixed for m in g.members
    }
    assert kept == {
        ("a", 0): "an argument has this axis",
        ("c", 1): "a result has this axis",
    }


def test_a_residual_stream_is_one_group() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["a"]
        return (h + jnp.tanh(h @ p["b"]) @ p["c"]) @ p["d"]

    graph = prune.dependency_graph(fn, tree(a=(3, 6), b=(6, 8), c=(8, 6), d=(6, 2)), X)
    stream = one(6, ("a", 1, 1), ("b", 0, 1), ("c", 1, 1), ("d", 0, 1))
    assert groups(graph) == stream | one(8, ("b", 1, 1), ("c", 0, 1))


def test_parts_of_a_concatenation_go_by_themselves() -> None:
    fn = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], 1) @ p["c"]
    graph = prune.dependency_graph(fn, tree(a=(3, 4), b=(3, 5), c=(9, 2)), X)
    assert groups(graph) == (
        one(4, ("a", 1, 1), ("c", 0, 1)) | one(5, ("b", 1, 1), ("c", 0, 1))
    )
    second = next(g for g in graph.removable if g.size == 5)
    places = {m.path: m.positions.ravel().tolist() for m in second.members}
    assert places == {"b": [0, 1, 2, 3, 4], "c": [4, 5, 6, 7, 8]}


def test_query_heads_go_with_the_keys_that_they_share() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        q = (x @ p["q"]).reshape(2, 4, 3)
        k, v = (jnp.repeat((x @ p[n]).reshape(2, 2, 3), 2, axis=1) for n in "kv")
        y = jax.nn.softmax(jnp.einsum("bhd,chd->hbc", q, k)) @ v.swapaxes(0, 1)
        return y.swapaxes(0, 1).reshape(2, 12) @ p["o"]

    graph = prune.dependency_graph(
        fn, tree(q=(3, 12), k=(3, 6), v=(3, 6), o=(12, 2)), X
    )
    assert groups(graph) == (
        one(2, ("q", 1, 6), ("k", 1, 3), ("v", 1, 3), ("o", 0, 6))
        | one(2, ("q", 1, 6), ("o", 0, 6))
        | one(3, ("q", 1, 4), ("k", 1, 2))
        | one(3, ("v", 1, 2), ("o", 0, 4))
    )


@pytest.mark.parametrize(
    ("groups_of", "into", "expected"),
    [
        (1, 4, one(4, ("a", 1, 1), ("w", 1, 1))),
        (4, 1, one(4, ("a", 1, 1), ("w", 2, 1), ("c", 0, 1))),
        (2, 2, one(2, ("a", 1, 2), ("w", 1, 1))),
    ],
    ids=["full", "depthwise", "grouped"],
)
def test_channels_of_convolutions(groups_of: int, into: int, expected: Any) -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        h = (x @ p["a"])[None]
        y = jax.lax.conv_general_dilated(
            h,
            p["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups_of,
        )
        return y.sum(1) @ p["c"]

    graph = prune.dependency_graph(fn, tree(a=(3, 4), w=(3, into, 4), c=(4, 2)), X)
    assert expected <= groups(graph)


def test_scanned_layers_may_lose_other_features_each_but_share_the_stream() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None)
        return jax.lax.scan(step, x @ p["a"], (p["b"], p["c"]))[0] @ p["d"]

    params = tree(a=(3, 4), b=(5, 4, 6), c=(5, 6, 4), d=(4, 2))
    graph = prune.dependency_graph(fn, params, X)
    assert groups(graph) == (
        one(4, ("a", 1, 1), ("b", 1, 1), ("c", 2, 1), ("d", 0, 1))
        | one(6, ("b", 2, 1), ("c", 1, 1), layers=5)
        | one(5, ("b", 0, 1), ("c", 0, 1))
    )
    (layers,) = (g for g in graph.removable if g.size == 5)
    assert layers.inexact == "a scan leaves the whole layer out"


def test_features_with_a_constant_of_their_own_are_those_of_all_layers() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        step = lambda h, w: (h + (h @ w[0] * jnp.arange(6.0)[None]) @ w[1], None)
        return jax.lax.scan(step, x @ p["a"], (p["b"], p["c"]))[0] @ p["d"]

    params = tree(a=(3, 4), b=(5, 4, 6), c=(5, 6, 4), d=(4, 2))
    graph = prune.dependency_graph(fn, params, X)
    assert one(6, ("b", 2, 1), ("c", 1, 1)) <= groups(graph)


def test_sums_over_what_is_not_zero_are_not_exact() -> None:
    softmax = lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"]
    graph = prune.dependency_graph(softmax, tree(a=(3, 5), b=(5, 2)), X)
    (group,) = graph.removable
    assert group.inexact is not None
    assert "reduce_max runs over it" in group.inexact
    assert "not the same as zeros: reduce_max" in str(graph)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda h: jnp.sort(h, axis=-1), "its order matters to 'sort'"),
        (lambda h: jnp.fft.fft(h).real, "enters the operation 'fft'"),
        (lambda h: jnp.cumsum(h, axis=-1), "its order matters to 'cumsum'"),
        (lambda h: h + h[:, 0][:, None], "is taken out of its axis alone"),
        (lambda h: h * h[:, :1], "is taken out of its axis alone"),
        (
            lambda h: h * jnp.broadcast_to(h[:, 1:2], h.shape),
            "is taken out of its axis alone",
        ),
    ],
)
def test_what_stands_in_the_way_is_named(fn: Any, reason: str) -> None:
    program = lambda p, x: fn(x @ p["a"]) @ p["b"]
    graph = prune.dependency_graph(program, tree(a=(3, 4), b=(4, 2)), X)
    columns = [
        g for g in graph.groups if ("a", 1) in {(m.path, m.axis) for m in g.members}
    ]
    assert reason in {g.fixed for g in columns}
    assert reason in str(graph)


def test_compressed_params_are_refused() -> None:
    packed = {"a": jc.quant.quantize(jnp.eye(4), jc.quant.int8())}
    with pytest.raises(ValueError, match=r"dependency_graph: .* 'a' is int8"):
        prune.dependency_graph(lambda p, x: x @ p["a"], packed, jnp.ones((1, 4)))


def test_costs_are_those_of_the_smaller_program() -> None:
    fn = lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"]
    params = {k: jnp.ones(s.shape) for k, s in tree(a=(3, 5), b=(5,), c=(5, 4)).items()}
    x = jnp.ones((2, 3))
    graph = prune.dependency_graph(fn, params, x)
    (group,) = graph.removable
    cost = prune.Cost(graph)
    assert cost({}) == (40, 2 * (2 * 3 * 5 + 2 * 5 * 4), (60, 80))
    gone = {group.number: np.array([True, True, False, False, False])}
    removal = prune.Removal.of(graph, gone)
    again = prune.dependency_graph(fn, removal.take(params), x)
    assert prune.Cost(again)({}) == cost(gone)
