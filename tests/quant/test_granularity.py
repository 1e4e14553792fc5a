"""Which weights share a scale, by format and shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxcompress import quant as q
from tests.quant.oracles import FORMATS, both, heavy, symmetric

Index = tuple[int, ...]
SHAPES = {"matrix": (8, 6), "stack": (3, 8, 6), "conv": (3, 2, 4, 6)}
CONV = (-4, -3, -2)
GRANULARITIES: dict[str, tuple[str, Any, dict[str, Any], Callable[..., Any]]] = {
    "matrix": ("matrix", None, {}, lambda i, o: o),
    "matrix_tensor": (
        "matrix",
        None,
        {"granularity": q.PerTensor()},
        lambda i, o: None,
    ),
    "matrix_group": ("matrix", None, {"group_size": 4}, lambda i, o: (i // 4, o)),
    "matrix_block": (
        "matrix",
        None,
        {"granularity": q.Block2D(out=3, contract=4)},
        lambda i, o: (i // 4, o // 3),
    ),
    "matrix_left": ("matrix", -1, {"group_size": 2}, lambda o, i: (o, i // 2)),
    "matrix_inputs": (
        "matrix",
        None,
        {"granularity": q.PerChannel(axes=(-2,))},
        lambda i, o: i,
    ),
    "stack": ("stack", -2, {}, lambda l, i, o: (l, o)),
    "stack_tensor": (
        "stack",
        -2,
        {"granularity": q.PerTensor()},
        lambda l, i, o: l,
    ),
    "stack_group": ("stack", -2, {"group_size": 2}, lambda l, i, o: (l, i // 2, o)),
    "stack_block": (
        "stack",
        -2,
        {"granularity": q.Block2D(out=2, contract=8)},
        lambda l, i, o: (l, o // 2),
    ),
    "heads": ("stack", (-3, -2), {}, lambda h, i, o: o),
    "heads_group": (
        "stack",
        (-3, -2),
        {"group_size": 12},
        lambda h, i, o: ((h * 8 + i) // 12, o),
    ),
    "heads_reversed": (
        "stack",
        (-2, -3),
        {"group_size": 4},
        lambda h, i, o: ((i * 3 + h) // 4, o),
    ),
    "heads_apart": (
        "stack",
        (-3, -1),
        {"group_size": 9},
        lambda a, o, b: ((a * 6 + b) // 9, o),
    ),
    "heads_kept": (
        "stack",
        (-3, -2),
        {"granularity": q.PerChannel(axes=(-3,))},
        lambda h, i, o: h,
    ),
    "conv": ("conv", CONV, {}, lambda a, b, i, o: o),
    "conv_tensor": (
        "conv",
        CONV,
        {"granularity": q.PerTensor()},
        lambda a, b, i, o: None,
    ),
    "conv_group": (
        "conv",
        CONV,
        {"group_size": 8},
        lambda a, b, i, o: ((a * 8 + b * 4 + i) // 8, o),
    ),
    "conv_rows": (
        "conv",
        CONV,
        {"granularity": q.PerChannel(axes=(-3, -1))},
        lambda a, b, i, o: (b, o),
    ),
    "conv_block": (
        "conv",
        CONV,
        {"granularity": q.Block2D(out=2, contract=6)},
        lambda a, b, i, o: ((a * 8 + b * 4 + i) // 6, o // 2),
    ),
    "conv_stack": ("conv", -2, {}, lambda a, b, i, o: (a, b, o)),
}


@pytest.mark.parametrize("name", GRANULARITIES)
def test_weights_of_a_block_share_a_scale(name: str) -> None:
    kind, axes, options, block = GRANULARITIES[name]
    w = heavy(7, *SHAPES[kind])
    members: dict[Any, list[Index]] = defaultdict(list)
    for index in np.ndindex(w.shape):
        members[block(*index)].append(index)
    expected = np.empty(w.shape)
    for indices in members.values():
        at = tuple(zip(*indices, strict=True))
        expected[at] = symmetric(4)(np.float64(w[at]))
    _, found = both(w, q.int4(**options), axes)
    np.testing.assert_allclose(found, expected, rtol=2**-23)


@pytest.mark.parametrize("name", ["uint4", "ternary", "binary", "int8_wide"])
def test_sums_and_ranges_are_taken_over_merged_rows_too(name: str) -> None:
    """`PerChannel` of an input axis merges scales that stand apart in storage."""
    fmt, oracle = FORMATS[name]
    w = heavy(8, *SHAPES["conv"])
    fmt = fmt.replace(granularity=q.PerChannel(axes=(-3,)))
    expected = np.stack(
        [oracle(np.float64(w[:, b]).ravel()).reshape(3, 4, 6) for b in range(2)], 1
    )
    _, found = both(w, fmt, CONV)
    np.testing.assert_allclose(found, expected, rtol=2**-22)


def test_a_vector_is_one_channel() -> None:
    w = heavy(9, 16)
    _, found = both(w, q.int4())
    np.testing.assert_allclose(found, symmetric(4)(np.float64(w)), rtol=2**-23)


def test_axes_of_the_format_go_before_those_of_the_call() -> None:
    w = heavy(10, 8, 6)
    given_twice = both(w, q.int4(axes=-1), -2)[1]
    np.testing.assert_array_equal(given_twice, both(w, q.int4(), -1)[1])
    assert not np.array_equal(given_twice, both(w, q.int4())[1])
