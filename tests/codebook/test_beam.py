"""Beam search against all sums there are."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.codebook import beam_search
from jaxcompress.codebook._beam import in_chunks


def draw(n: int, d: int, books: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(n, d))
    tables = rng.normal(size=(books, entries, d))
    return x.astype(np.float32), tables.astype(np.float32)


def best(x: np.ndarray, books: np.ndarray, m: np.ndarray) -> np.ndarray:
    """The least error of any sum, in float64."""
    sums = [
        sum(book[c].astype(np.float64) for book, c in zip(books, codes, strict=True))
        for codes in itertools.product(range(books.shape[1]), repeat=len(books))
    ]
    return (m[:, None] * (x[:, None].astype(np.float64) - sums) ** 2).sum(-1).min(1)


def error(
    x: np.ndarray, books: np.ndarray, codes: np.ndarray, m: np.ndarray
) -> np.ndarray:
    total = sum(book[codes[:, a]].astype(np.float64) for a, book in enumerate(books))
    return (m * (x - total) ** 2).sum(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("entries", [5, 8])
def test_one_codebook_is_exact(entries: int, weighted: bool) -> None:
    x, books = draw(50, 3, 1, entries)
    m = np.ones_like(x)
    if weighted:
        m = np.random.default_rng(0).uniform(0.1, 9.0, size=x.shape).astype(np.float32)
    found = beam_search(
        x, jnp.asarray(books), weights=jnp.asarray(m) if weighted else None
    )
    np.testing.assert_allclose(
        error(x, books, np.asarray(found.codes), m), best(x, books, m), rtol=1e-5
    )
    np.testing.assert_allclose(found.error, best(x, books, m), rtol=1e-4)


def test_a_beam_of_all_sums_is_exact_and_a_narrow_one_is_not() -> None:
    x, books = draw(60, 2, 2, 4)
    m = np.ones_like(x)
    wide = beam_search(x, jnp.asarray(books), width=4)
    np.testing.assert_allclose(
        error(x, books, np.asarray(wide.codes), m),
        best(x, books, m),
        rtol=1e-5,
        atol=1e-9,
    )
    np.testing.assert_allclose(wide.error, best(x, books, m), rtol=1e-3, atol=1e-6)
    narrow = beam_search(x, jnp.asarray(books), width=1)
    assert float(narrow.error.sum()) > 1.01 * float(wide.error.sum())


def test_codes_that_are_there_stay_where_none_are_better() -> None:
    x, books = draw(80, 4, 3, 4)
    m = np.ones_like(x)
    best_codes = beam_search(x, jnp.asarray(books), width=16).codes
    kept = beam_search(x, jnp.asarray(books), width=1, start=best_codes)
    given = error(x, books, np.asarray(best_codes), m)
    assert (error(x, books, np.asarray(kept.codes), m) <= given + 1e-6).all()
    fresh = beam_search(x, jnp.asarray(books), width=1)
    assert float(fresh.error.sum()) > float(kept.error.sum())


def test_each_code_is_the_best_given_the_others_before_it() -> None:
    """Without the last pass, greedy codes of these books could not reach zero."""
    books = jnp.array([[[1.0], [4.0]], [[0.0], [-3.0]]])
    found = beam_search(jnp.array([[-2.0]]), books)
    assert found.codes.tolist() == [[0, 1]]
    tricky = jnp.array([[[0.0], [6.0]], [[0.0], [4.0]]])
    assert beam_search(jnp.array([[4.0]]), tricky, width=2).codes.tolist() == [[0, 1]]


def test_rows_in_chunks_are_the_rows() -> None:
    x = jnp.arange(10.0)[:, None]
    np.testing.assert_array_equal(in_chunks(lambda a: a[0] * 2.0, (x,), size=4), x * 2)
