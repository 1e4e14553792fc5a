"""Tables that grow: old places stay, new buckets begin as the one they split."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import hashing as h
from kernels_pallas.hashed_matmul import places
from tests.hashing.test_array import draw
from tests.jitted import run

GROWS = h.Hashing(seed=1, linear=True)


def leaf(hashing: h.Hashing = GROWS) -> h.HashedArray:
    return h.fit_hashed(draw(0, 24, 16), ratio=64.0, hashing=hashing)


def bucket_of(count: int) -> np.ndarray:
    rows = jnp.arange(16, dtype=jnp.int32)[:, None]
    columns = jnp.arange(24, dtype=jnp.int32)[None]
    at, _ = run(lambda r, c: places(r, c, GROWS, buckets=count), rows, columns)
    return np.asarray(at)


def test_one_more_bucket_takes_places_from_one_alone() -> None:
    start = leaf()
    assert start.buckets.shape == (6,)
    before = start
    for count in (7, 8, 9):
        after = h.grow(before, count)
        np.testing.assert_array_equal(
            *(run(lambda f: f.materialize(), f) for f in (before, after))
        )
        split = count - 1 - 2 ** int(np.log2(count - 1))
        old, new = bucket_of(count - 1), bucket_of(count)
        moved = old != new
        assert set(old[moved]) <= {split}
        assert set(new[moved]) <= {count - 1}
        assert after.buckets[-1] == before.buckets[split]
        before = after
    far = h.grow(start, 30)
    for count in range(10, 31):
        before = h.grow(before, count)
    np.testing.assert_array_equal(far.buckets, before.buckets)


def test_grown_buckets_fit_better() -> None:
    w = draw(0, 24, 16)
    few, many = (h.fit_hashed(w, ratio=r, hashing=GROWS) for r in (64.0, 8.0))
    error = lambda leaf: jnp.square(w - leaf.materialize()).sum()
    assert run(error, many) < run(error, few)


@pytest.mark.parametrize(
    ("start", "count", "message"),
    [
        (h.Hashing(), 8, "cannot grow"),
        (GROWS, 5, "cannot be taken away"),
        (GROWS, 2**31, "must be from 6"),
    ],
)
def test_what_is_refused(start: h.Hashing, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"grow: .*{message}"):
        h.grow(leaf(start), count)
