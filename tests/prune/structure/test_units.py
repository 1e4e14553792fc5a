"""Units: which positions go together, by themselves."""

from __future__ import annotations

from jaxcompress.layout import reshape_pieces
from jaxcompress.prune.structure._units import Units


def kept(units: Units, *axes: tuple, gone: tuple[int, ...]) -> list[list[bool]]:
    """Which positions of axes are left when some nodes go."""
    removed = {n for g in gone for n in units.resolve((g,))}
    return [[not removed & set(units.resolve(u)) for u in axis] for axis in axes]


def test_units_that_are_equal_go_together() -> None:
    units = Units()
    a, b, c = (units.fresh(3, None) for _ in range(3))
    for pair in ((a, b), (b, c)):
        for u, v in zip(*pair, strict=True):
            units.unify(u, v, "test")
    assert kept(units, a, b, c, gone=a[1]) == [[True, False, True]] * 3


def test_a_column_is_a_head_and_a_channel_of_it() -> None:
    units = Units()
    columns = units.fresh(6, None)
    heads, channels = units.split(columns, 2, 3, None, "test")
    (left,) = kept(units, columns, gone=heads[1])
    assert left == [True] * 3 + [False] * 3
    (left,) = kept(units, columns, gone=channels[0])
    assert left == [False, True, True] * 2


def test_splitting_twice_gives_the_same_parts() -> None:
    units = Units()
    columns = units.fresh(6, None)
    first = units.split(columns, 2, 3, None, "test")
    again = units.split(columns, 2, 3, None, "test")
    same = lambda parts: [tuple(map(units.resolve, p)) for p in parts]
    assert same(first) == same(again)


def test_another_division_couples_what_it_cuts_through() -> None:
    units = Units()
    columns = units.fresh(6, None)
    units.split(columns, 2, 3, None, "test")
    units.split(columns, 3, 2, None, "test")
    for columns_gone in columns:
        for node in units.resolve(columns_gone):
            if units.facts(node).fixed is None:
                (left,) = kept(units, columns, gone=(node,))
                grid = [left[i : i + 3] for i in (0, 3)]
                other = [left[i : i + 2] for i in (0, 2, 4)]
                assert is_product(grid)
                assert is_product(other)


def is_product(grid: list[list[bool]]) -> bool:
    """Whether whole rows and columns went."""
    rows = [any(r) for r in grid]
    columns = [any(c) for c in zip(*grid, strict=True)]
    return grid == [[r and c for c in columns] for r in rows]


def test_what_is_laid_on_a_kept_unit_is_kept() -> None:
    units = Units()
    a, b = units.fresh(2, None), units.fresh(2, None)
    units.fix(a[0], "it is a result")
    for u, v in zip(a, b, strict=True):
        units.unify(v, u, "test")
    units.unify(b[1], (), "the operation 'test'")
    facts = [units.facts(units.resolve(u)[0]).fixed for u in b]
    assert facts == ["it is a result", "the operation 'test'"]


def test_bound_nodes_hand_on_what_is_known() -> None:
    units = Units()
    columns = units.fresh(4, None)
    units.fix(columns[3], "why")
    heads, channels = units.split(columns, 2, 2, None, "test")
    reasons = [units.facts(units.resolve(u)[0]).fixed for u in (*heads, *channels)]
    assert reasons == [None, "why", None, "why"]


def test_a_reshape_in_pieces() -> None:
    assert reshape_pieces((2, 3, 1, 4), (6, 2, 2)) == [([0, 1], [0]), ([3], [1, 2])]
    assert reshape_pieces((4, 6), (8, 3)) == [([0, 1], [0, 1])]
    assert reshape_pieces((1, 5), (5, 1, 1)) == [([1], [0])]
