"""Codebooks of a weight by itself: k-means of sub-vectors, of residuals, of sums."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.codebook._array import CodebookArray
from jaxcompress.codebook._beam import beam_search
from jaxcompress.codebook._codes import Codes, Laid, lay, output_scale
from jaxcompress.codebook._lloyd import cluster, toward_means
from jaxcompress.transform import Transform, identity
from jaxcompress.values import Site, leaf_key, replace_weights

Importance = Mapping[str, jax.Array]
"""By path, what a squared error in each weight counts for; broadcast to its shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How codebooks are sought.

    Attributes:
      iterations: Of k-means, at most.
      rounds: Times that all codes and then all codebooks are chosen anew.
      width: Of the beam in which codes are chosen.
    """

    iterations: int = 100
    rounds: int = 0
    width: int = 1

    def check(self, who: str) -> None:
        """Refuse numbers that are out of range.

        Raises:
          ValueError: If one is.
        """
        for name, least in (("iterations", 1), ("rounds", 0), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{who}: {name} must be at least {least}; got "
                    f"{getattr(self, name)}."
                )


def clustered(
    codes: Codes,
    search: Search,
    *,
    key: jax.Array,
    importance: Importance | None,
    by: str,
) -> Transform:
    """The transform whose ``init`` puts a `CodebookArray` in place of each weight."""
    codes.check(by)
    search.check(by)

    def coded(w: jax.Array, site: Site) -> CodebookArray:
        counts = None
        if importance is not None:
            counts = _importance_at(importance, site.path, w.shape, by)
        return fit_weight(
            w,
            codes,
            search,
            key=leaf_key(key, site),
            importance=counts,
            axes=site.axes,
            path=site.path,
            who=by,
        )

    def init(params: Any) -> tuple[Any, tuple[()]]:
        ready = lambda x, path: isinstance(x, CodebookArray)
        return replace_weights(coded, params, ready=ready, by=by), ()

    return identity()._replace(init=init)


def _importance_at(
    importance: Importance, path: str, shape: tuple[int, ...], by: str
) -> jax.Array:
    if path not in importance:
        raise ValueError(
            f"{by}: there is no importance for {path!r}, only for "
            f"{sorted(importance)}; add it (1.0 for none), or leave it out of the rule."
        )
    counts = jnp.asarray(importance[path], jnp.float32)
    try:
        fits = jnp.broadcast_shapes(counts.shape, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{by}: importance must broadcast to the shape of {path!r}, {shape}; got "
            f"{counts.shape}. One a row of a table is [rows, 1]."
        )
    return counts.reshape((1,) * (len(shape) - counts.ndim) + counts.shape)


def fit_weight(
    w: jax.Array,
    codes: Codes,
    search: Search,
    *,
    key: jax.Array,
    importance: jax.Array | None = None,
    axes: Any = None,
    path: str = "w",
    who: str,
) -> CodebookArray:
    """One weight as codes and codebooks of least squared error, without data."""
    laid = lay(w, codes, axes=axes, path=path, who=who)
    counts = None
    if importance is not None:
        counts = laid.cut(jnp.broadcast_to(importance, w.shape))
    scale = None
    if codes.scale:
        scale = output_scale(laid.vectors, laid.real, codes)
    found, books = fit_vectors(laid, counts, scale, key, search)
    return laid.leaf(found, books, scale)


def fit_vectors(
    laid: Laid,
    counts: jax.Array | None,
    scale: jax.Array | None,
    key: jax.Array,
    search: Search,
) -> tuple[jax.Array, jax.Array]:
    """Codes ``int32[N, R, A, S]`` and codebooks ``float32[N, B, A, E, d]``.

    Args:
      laid: The weight.
      counts: ``float32[N, R, S, d]``, what squared errors count for, or None for 1.
      scale: ``float32[N, R]``, or None for 1.
      key: Decides the seeds.
      search: How.
    """
    vectors, blocks = laid.vectors, laid.blocks
    n, r, s, d = vectors.shape
    if scale is not None:
        square = jnp.broadcast_to(jnp.square(scale)[..., None, None], vectors.shape)
        counts = square if counts is None else counts * square
        vectors = vectors / scale[..., None, None]
    if not laid.real.all():
        real = jnp.broadcast_to(jnp.asarray(laid.real, jnp.float32), vectors.shape)
        counts = real if counts is None else counts * real

    def in_blocks(a: jax.Array | None) -> jax.Array | None:
        if a is None:
            return None
        a = a.reshape(n, r, blocks, s // blocks, d)
        return jnp.swapaxes(a, 1, 2).reshape(n * blocks, -1, d)

    keys = jax.random.split(key, n * blocks)
    data = (in_blocks(vectors), in_blocks(counts), keys)
    # What says nothing of the problem would compile it anew.
    like = dataclasses.replace(laid.codes, blocks=1, scale=False, axes=None)
    found, books = _fit(data, like, search)
    found = found.reshape(n, blocks, r, s // blocks, laid.codes.books)
    found = jnp.transpose(found, (0, 2, 4, 1, 3)).reshape(n, r, -1, s)
    return found, books.reshape(n, blocks, *books.shape[1:])


@functools.partial(jax.jit, static_argnames=("codes", "search"))
def _fit(data: Any, codes: Codes, search: Search) -> tuple[jax.Array, jax.Array]:
    """Codes ``[P, n, A]`` and codebooks ``[P, A, E, d]`` of problems ``[P, n, d]``."""

    def one(problem: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        x, m, key = problem
        found, books = _by_residuals(x, m, key, codes, search)
        if search.rounds:
            found, books = _improved(x, m, found, books, search)
        if codes.dtype != "float32":
            books = codes.rounded(books)
            found = beam_search(x, books, width=search.width, weights=m).codes
        return found, books

    return jax.lax.map(one, data)


def _by_residuals(
    x: jax.Array, m: jax.Array | None, key: jax.Array, codes: Codes, search: Search
) -> tuple[jax.Array, jax.Array]:
    """Each codebook by k-means of what those before it leave."""

    def stage(residual: jax.Array, key: jax.Array):
        found = cluster(
            residual,
            entries=codes.entries,
            key=key,
            weights=m,
            iterations=search.iterations,
        )
        left = residual - found.entries[found.codes]
        return left, (found.codes, found.entries)

    keys = jax.random.split(key, codes.books)
    _, (found, books) = jax.lax.scan(stage, x, keys)
    return found.T, books


def _improved(
    x: jax.Array,
    m: jax.Array | None,
    found: jax.Array,
    books: jax.Array,
    search: Search,
) -> tuple[jax.Array, jax.Array]:
    """Codes by beam search, and each codebook to its best given all others, in turn."""

    def residual(found: jax.Array, books: jax.Array) -> jax.Array:
        entries = [book[found[:, a]] for a, book in enumerate(books)]
        return x - functools.reduce(jnp.add, entries)

    def one_round(_: jax.Array, state: tuple[jax.Array, jax.Array]):
        found, books = state
        for a in range(books.shape[0]):
            left = residual(found, books)
            new, _ = toward_means(books[a], found[:, a], left, m)
            books = books.at[a].set(new)
        found = beam_search(x, books, width=search.width, weights=m, start=found).codes
        return found, books

    return jax.lax.fori_loop(0, search.rounds, one_round, (found, books))
