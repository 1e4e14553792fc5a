"""Layer maps against the papers' own numbers, and students cut out of teachers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.distill import layer_map, take_layers
from tests.lift.programs import normal

KINDS = ("uniform", "skip", "last", "first", "spaced")


def from_one(*layers: int) -> tuple[int, ...]:
    return tuple(layer - 1 for layer in layers)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "expected"),
    [
        ("uniform", 4, 12, from_one(3, 6, 9, 12)),  # TinyBERT, g(m) = 3m.
        ("uniform", 6, 12, from_one(2, 4, 6, 8, 10, 12)),
        ("uniform", 4, 6, from_one(1, 3, 4, 6)),
        ("skip", 6, 12, from_one(2, 4, 6, 8, 10, 12)),  # PKD, and the last.
        ("skip", 4, 6, from_one(1, 2, 3, 4)),
        ("last", 6, 12, from_one(7, 8, 9, 10, 11, 12)),  # PKD, and the last.
        ("first", 2, 6, from_one(1, 2)),
        ("spaced", 2, 32, from_one(1, 32)),  # Distil-Whisper's decoder.
        ("spaced", 4, 12, from_one(1, 5, 8, 12)),  # 1, 4 2/3, 8 1/3, 12.
        ("spaced", 1, 6, from_one(6)),
    ],
)
def test_known_maps(kind: Any, student: int, teacher: int, expected: Any) -> None:
    assert layer_map(student, teacher, kind=kind) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_maps_rise_stay_inside_and_are_whole_for_equal_depth(kind: Any) -> None:
    for teacher in range(1, 15):
        assert layer_map(teacher, teacher, kind=kind) == tuple(range(teacher))
        for student in range(1, teacher + 1):
            found = layer_map(student, teacher, kind=kind)
            assert len(found) == student
            assert sorted(set(found)) == list(found)
            assert found[0] >= 0
            assert found[-1] < teacher
            if kind in ("uniform", "last", "spaced"):
                assert found[-1] == teacher - 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 3), "student_layers must be a positive integer; got 0"),
        ((2, 3.0), "teacher_layers must be a positive integer; got 3.0"),
        ((4, 3), "student_layers must be at most teacher_layers; got 4 and 3"),
    ],
)
def test_counts_are_checked(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer_map: {message}"):
        layer_map(*args)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'spaced'.*'even'"):
        layer_map(2, 4, kind="even")  # pyright: ignore[reportArgumentType]


# -- take_layers


def numbered(n: int) -> dict[str, Any]:
    """Eleven layers or more: as text, 10 sorts before 2."""
    layers = {f"layers_{i}": {"w": normal(i, 2, 2)} for i in range(n)}
    return {"params": {"embed": normal(99, 3, 2), **layers, "head": normal(98, 2, 3)}}


def test_numbered_layers_are_renamed_and_the_rest_is_untouched() -> None:
    params = numbered(12)
    student = take_layers(params, "params/layers_{}", layer_map(4, 12))["params"]
    assert list(student) == ["embed", *(f"layers_{i}" for i in range(4)), "head"]
    for i, teacher in enumerate((2, 5, 8, 11)):
        assert student[f"layers_{i}"]["w"] is params["params"][f"layers_{teacher}"]["w"]
    assert student["head"] is params["params"]["head"]
    assert len(params["params"]) == 14


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples_of_layers(kind: Any) -> None:
    params = {"layers": kind({"w": normal(i, 2)} for i in range(4))}
    student = take_layers(params, "layers/{}", [3, 0, 3])["layers"]
    assert type(student) is kind
    for layer, i in zip(student, (3, 0, 3), strict=True):
        assert layer["w"] is params["layers"][i]["w"]


def test_stacked_layers_are_cut_under_jit_too() -> None:
    params = {"layers": {"w": normal(0, 5, 2, 3), "b": normal(1, 5, 3)}, "head": X}
    run = jax.jit(lambda p: take_layers(p, "layers", (0, 4, 2)))
    for student in (take_layers(params, "layers", (0, 4, 2)), run(params)):
        for name, stack in params["layers"].items():
            expected = np.asarray(stack)[[0, 4, 2]]
            np.testing.assert_array_equal(student["layers"][name], expected)
    assert take_layers(params, "layers", [1])["head"] is X


X = normal(3, 2, 2)


def test_compressed_stacks_are_cut_as_they_are() -> None:
    quantize = jax.jit(lambda w: jc.quant.quantize(w, jc.quant.int4(axes=-2)))
    w = normal(0, 4, 8, 3)
    student = take_layers({"layers": quantize(w)}, "layers", [3, 1])["layers"]
    dense = jax.jit(jc.materialize)
    np.testing.assert_array_equal(dense(student), dense(quantize(w))[np.array([3, 1])])


def test_the_student_computes_what_the_chosen_layers_compute() -> None:
    """A scan over the student's layers, against a loop over the teacher's."""
    weights, chosen, x = normal(0, 6, 3, 3), layer_map(2, 6), normal(9, 4, 3)
    h = np.asarray(x, np.float64)
    for i in chosen:
        h = np.tanh(h @ np.asarray(weights[i], np.float64))
    step = lambda x, w: (jnp.tanh(x @ w), None)
    run = jax.jit(lambda p, x: jax.lax.scan(step, x, p["layers"])[0])
    y = run(take_layers({"layers": weights}, "layers", chosen), x)
    np.testing.assert_allclose(y, h, rtol=1e-5, atol=1e-6)


def test_an_nnx_state_with_numbers_as_keys() -> None:
    state = nnx.State({"layers": nnx.State({i: nnx.Param(X + i) for i in range(3)})})
    student = take_layers(state, "layers/{}", [2, 1])
    assert isinstance(student, nnx.State)
    pure = nnx.to_pure_dict(student)
    assert list(pure["layers"]) == [0, 1]
    np.testing.assert_array_equal(pure["layers"][0], X + 2)
    np.testing.assert_array_equal(pure["layers"][1], X + 1)


@pytest.mark.parametrize(
    ("path", "indices", "message"),
    [
        ("params/layers_{}", [], "indices is empty"),
        ("params/layers_{}", [12], r"among the layers \[0, 1, 2.*got 12"),
        ("params/layers_{}", [-1], "got -1"),
        ("params/layer_{}", [0], r"no layer is at 'params/layer_\{\}'.*'layers_0'"),
        ("param/layers_{}", [0], "there is no 'param' among .'params'"),
        ("params/layers_{}/w", [0], "in its last key"),
        ("params", [0], r"stacked alike, \[layers, ...\]; .*\(2,\), \(3,\)"),
        ("params/embed/{}", [0], "leads through a "),
        ("params/embed", [3], r"among the layers \[0, 1, 2\] .*got 3"),
    ],
)
def test_mistakes_are_named(path: str, indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"take_layers: .*{message}"):
        take_layers(numbered(12), path, indices)


def test_a_stack_that_cannot_be_cut_is_refused() -> None:
    quantize = lambda w: jc.quant.quantize(w, jc.quant.int8(axes=(-3, -2)))
    leaf = jax.eval_shape(quantize, normal(0, 4, 8, 3))
    with pytest.raises(ValueError, match="cannot be cut by layer; take the layers"):
        take_layers({"layers": leaf}, "layers", [0])
