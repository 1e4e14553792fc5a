"""Codes and codebooks of least output error: what errors of all inputs cost together.

With the inputs' second moment H, the error of a weight is ``tr(E H E^T)``, E its error
``[R, K]``. One sweep over the sub-vectors serves two algorithms: with H's triangular
factor each makes up for the errors of those before it (GPTQ, of vectors); with H itself
each is chosen given all others (coordinate descent).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.codebook._beam import beam_search
from jaxcompress.lift._second_moment import Factor, matmul

_HOLD = 1e-3


class Metric(NamedTuple):
    """What an error in a sub-vector costs, given errors in others.

    For sub-vector s of an output, with the weight w, an entry c and errors E, it is
    ``|root[s] (w - c) + others[s] E|^2``.

    Attributes:
      root: ``float32[S, d, d]``.
      others: ``float32[S, d, K]``, zero at the sub-vector's own inputs.
    """

    root: jax.Array
    others: jax.Array


def feeding_forward(factor: Factor, d: int) -> Metric:
    """Each sub-vector after those before it, which they alone disturb."""
    rows = factor.feedback * jnp.sqrt(factor.importance)[:, None]
    own, rest = _split(rows, d)
    return Metric(own, rest)


def given_all_others(h: jax.Array, d: int) -> Metric:
    """Each sub-vector given all others."""
    own, rest = _split(h, d)
    lower = jnp.linalg.cholesky(own)
    solve = jax.vmap(lambda a, b: jax.scipy.linalg.solve_triangular(a, b, lower=True))
    return Metric(jnp.matrix_transpose(lower), solve(lower, rest))


def _split(rows: jax.Array, d: int) -> tuple[jax.Array, jax.Array]:
    """Blocks on the diagonal ``[S, d, d]``, and the rows without them ``[S, d, K]``."""
    k = rows.shape[0]
    place = jnp.arange(k // d, dtype=jnp.int32)
    blocks = rows.reshape(k // d, d, k // d, d)
    own = blocks[place, :, place]
    rest = blocks.at[place, :, place].set(0.0)
    return own, rest.reshape(k // d, d, k)


class Coded(NamedTuple):
    """Codes of one weight and what they name.

    Attributes:
      codes: ``int32[R, A, S]``.
      books: ``float32[B, A, E, d]``.
      scale: ``float32[R]``.
    """

    codes: jax.Array
    books: jax.Array
    scale: jax.Array

    def decode(self) -> jax.Array:
        """The weight, ``float32[R, S, d]``."""
        return self.unscaled() * self.scale[:, None, None]

    def unscaled(self) -> jax.Array:
        """The weight before its scale."""
        blocks, books = self.books.shape[:2]
        s = self.codes.shape[-1]
        block = jnp.arange(s, dtype=jnp.int32) * blocks // s
        each = [self.books[block, a, self.codes[:, a]] for a in range(books)]
        return jnp.sum(jnp.stack(each), axis=0)


def sweep(
    w: jax.Array,
    real: jax.Array,
    coded: Coded,
    metric: Metric,
    width: int,
    start: jax.Array,
) -> jax.Array:
    """Choose the codes of every sub-vector in turn.

    Args:
      w: ``float32[R, S, d]``.
      real: ``float32[S, d]``, 0 where inputs are padding.
      coded: Codes that may stay where no others are better, codebooks and scales.
      metric: What errors cost.
      width: Of the beam. Static.
      start: Whether the errors at the start are those of the codes; else none. Traced.

    Returns:
      Codes ``int32[R, A, S]``.
    """
    r, s, d = w.shape
    blocks = coded.books.shape[0]
    error = jnp.where(start, (w - coded.decode()) * real[None], 0.0)

    def one(i: jax.Array, carry: tuple[jax.Array, jax.Array]):
        error, codes = carry
        root = metric.root[i] * real[i][None]
        target = matmul(w[:, i], root.T) + matmul(error, metric.others[i].T)
        books = coded.books[i * blocks // s]
        found = beam_search(
            target / coded.scale[:, None],
            matmul(books, jnp.broadcast_to(root.T, (books.shape[0], d, d))),
            width=width,
            start=codes[:, :, i],
        ).codes
        entries = [book[found[:, a]] for a, book in enumerate(books)]
        value = jnp.sum(jnp.stack(entries), axis=0) * coded.scale[:, None]
        put = jax.lax.dynamic_update_slice_in_dim
        error = put(error, (w[:, i] - value) * real[i][None], i * d, axis=1)
        return error, codes.at[:, :, i].set(found)

    state = (error.reshape(r, s * d), coded.codes)
    return jax.lax.fori_loop(0, s, one, state)[1]


def refit_books(
    w: jax.Array, real: jax.Array, coded: Coded, h: jax.Array, steps: int
) -> Coded:
    """Bring the codebooks towards their least squares, codes and scales given.

    Conjugate gradients on ``tr(E H E^T)``, scaled by the diagonal. A part of the
    diagonal holds the codebooks where they are: what one of two has more and the other
    less changes no sum.

    Returns:
      With an error at most that of `coded`.

    References:
      Hestenes & Stiefel, 1952, with the preconditioner of Jacobi.
    """
    decode = lambda books: coded._replace(books=books).decode() * real[None]
    _, gather = jax.vjp(decode, coded.books)
    cost = jnp.diagonal(h).reshape(real.shape) * real
    weigh = jax.vjp(lambda b: coded._replace(books=b).unscaled(), coded.books)[1]
    square = jnp.square(coded.scale)[:, None, None]
    diagonal = weigh(square * jnp.broadcast_to(cost, w.shape))[0]

    def spread(a: jax.Array) -> jax.Array:
        return matmul(a.reshape(a.shape[0], -1), h).reshape(a.shape)

    def scaled(a: jax.Array) -> jax.Array:
        return jnp.where(diagonal > 0, a / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)

    def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)

    def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        books, left, direction, along = state
        bent = gather(spread(decode(direction)))[0] + _HOLD * diagonal * direction
        length = ratio(along, jnp.sum(direction * bent))
        left = left - length * bent
        ready = scaled(left)
        after = jnp.sum(left * ready)
        direction_after = ready + ratio(after, along) * direction
        return books + length * direction, left, direction_after, after

    left = gather(spread((w - coded.decode()) * real[None]))[0]
    ready = scaled(left)
    state = (coded.books, left, ready, jnp.sum(left * ready))
    books = jax.lax.fori_loop(0, steps, step, state)[0]
    return lower(w, real, coded._replace(books=books), coded, h)


def refit_scale(w: jax.Array, real: jax.Array, coded: Coded, h: jax.Array) -> Coded:
    """The scale of least error of each output."""
    flat = lambda a: (a * real[None]).reshape(a.shape[0], -1)
    value = flat(coded.unscaled())
    along = matmul(value, h)
    square = jnp.sum(along * value, axis=1)
    scale = jnp.sum(along * flat(w), axis=1) / jnp.where(square > 0, square, 1.0)
    return coded._replace(scale=jnp.where(scale > 0, scale, coded.scale))


def lower(w: jax.Array, real: jax.Array, new: Coded, old: Coded, h: jax.Array) -> Coded:
    """The one of less error."""
    better = output_error(w, real, new, h) <= output_error(w, real, old, h)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)


def output_error(
    w: jax.Array, real: jax.Array, coded: Coded, h: jax.Array
) -> jax.Array:
    """``tr(E H E^T)``."""
    e = ((w - coded.decode()) * real[None]).reshape(w.shape[0], -1)
    return jnp.sum(e * matmul(e, h))
