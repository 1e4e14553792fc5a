"""The law of chains: a later transform preserves what an earlier one established."""

from __future__ import annotations

import pytest

import jaxcompress as jc
from tests.cases import CASES, PRESETS, Case, methods
from tests.laws.setting import (
    AXES,
    EVERY,
    assert_same,
    assert_settled,
    weights,
)

SHARES = 16
"""Of all pairs of two cases: one in each test run, the others in `make slow`."""

UNFIT = ("divide", "the smaller", "Leave it out of the rule")
"""Of errors: groups, ranks and axes of a weight need not be those of its values."""


def some_pairs(first: Case, share: int) -> list[Case]:
    """Every `SHARES`-th case, another set for each first.

    After a structure four fifths of the first share are left to the second: to what
    follows, a factor is an array like any other.
    """
    at = CASES.index(first)

    def share_of(i: int) -> int:
        late = first.structure and (i - at) % (5 * SHARES) != 0
        return (i - at) % SHARES or int(late)

    return [c for i, c in enumerate(CASES) if share_of(i) == share]


shares = pytest.mark.parametrize(
    "share",
    [pytest.param(n, marks=pytest.mark.slow if n else ()) for n in range(SHARES)],
)


@shares
@pytest.mark.parametrize("first", EVERY)
def test_a_later_transform_preserves_an_earlier_constraint(
    first: Case, share: int
) -> None:
    """A constraint holds where its own method changes nothing any more."""
    stack = {"stack": weights()["stack"]}
    alone = jc.select({"stack": first.rule()}, axes=AXES)
    seconds = some_pairs(first, share)
    refused = []
    for second in seconds:
        both = jc.chain(first.rule(), second.rule())
        transform = jc.select({"stack": both}, axes=AXES)
        try:
            params, state = transform.init(stack)
        except jc.OrderError:
            refused.append(str(second))
            continue
        except ValueError as error:
            if not (first.structure and any(why in str(error) for why in UNFIT)):
                raise
            continue
        result = jc.materialize(transform.compress(params, state))
        assert_same(jc.materialize(transform.view(params, state)), result)
        again = jc.materialize(alone.view(*alone.init(result)))
        assert_settled(first, again, result)
    # Nothing but the identity may follow what fixes the value of every weight, no
    # adapters a mask, and no gates gates; only the identity may precede a structure.
    masks = hasattr(jc.prune, first.fn.__name__)
    same = [str(first)] if first.adapts or first.structure else []  # They are there.
    leaves_values = first.structure and not first.shares
    free = masks or leaves_values or first.fn is jc.identity
    fixes_values = first.sealed or not free

    def may_follow(c: Case) -> bool:
        if c.fn is jc.identity or str(c) in same:
            return True
        late = c.structure and first.fn is not jc.identity
        again = first.once and str(c) == str(first)
        beside = c.adapts and (masks or first.masked)
        return not (fixes_values or late or again or beside)

    formats = {*methods(jc.quant), *PRESETS}
    on_values = lambda c: first.shares and c.fn.__name__ in formats | {"calibrated"}
    # Whether a structure may be made of another is for each of them to say.
    nested = lambda c: first.structure and c.structure and str(c) not in same
    judged = [c for c in seconds if c.adapts or not (on_values(c) or nested(c))]
    named = {str(c) for c in judged}
    wanted = [str(c) for c in judged if not may_follow(c)]
    assert [name for name in refused if name in named] == wanted
