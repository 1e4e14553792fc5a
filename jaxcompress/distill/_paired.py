"""What losses on features share: checks, masks, and vectors that may be zero."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcompress.distill._logits import check_float


def norm(x: jax.Array) -> jax.Array:
    """Length of the vectors along the last axis; gradient zero where it is zero."""
    square = jnp.square(x).sum(-1)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def unit(x: jax.Array) -> jax.Array:
    """The vectors scaled to length 1; zero ones stay so, with gradient zero."""
    length = norm(x)[..., None]
    some = length > 0
    return jnp.where(some, x / jnp.where(some, length, 1.0), 0.0)


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine of the angle between vectors along the last axis; 0 if one is zero."""
    return (unit(x) * unit(y)).sum(-1)


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of every row of `x` with every row of `y`, in float32."""
    return jnp.matmul(x, y.mT, precision="highest", preferred_element_type=jnp.float32)


def widened(x: jax.Array, where: jax.Array | None) -> jax.Array:
    """`x` in float32, zero where its leading axes do not count, which may be NaN."""
    if where is not None:
        mask = jnp.reshape(where, jnp.shape(where) + (1,) * (x.ndim - jnp.ndim(where)))
        x = jnp.where(mask, x, jnp.zeros_like(x))
    return jnp.asarray(x).astype(jnp.float32)


def pair(
    who: str, student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Both in float32 and masked; no gradient flows to the second.

    Raises:
      ValueError: If they are not floating, or the teacher's are not finite where they
        count, as far as they are not traced.
    """
    check_float(who, "student", student)
    check_float(who, "teacher", teacher)
    check_finite(who, teacher, where)
    return widened(student, where), jax.lax.stop_gradient(widened(teacher, where))


def check_finite(who: str, teacher: jax.Array, where: jax.Array | None) -> None:
    """Refuse NaN and infinities that count, where they are not traced."""
    if isinstance(teacher, Tracer) or isinstance(where, Tracer):
        return
    with jax.ensure_compile_time_eval():
        bad = int(_not_finite(teacher, where))
    if bad:
        raise ValueError(
            f"{who}: what counts of teacher must be finite; got {bad} NaN or infinite "
            f"of {teacher.size} entries. Leave such examples out with where=."
        )


def check_same(who: str, student: jax.Array, teacher: jax.Array) -> None:
    """Refuse features of different shapes."""
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"{who}: student and teacher must have the same shape; got "
            f"{jnp.shape(student)} and {jnp.shape(teacher)}. Where only the last axis "
            "differs, map the student's features with distill.linear_projector."
        )


def check_leading(
    who: str, student: jax.Array, teacher: jax.Array, *, last: int = 1
) -> None:
    """Refuse features that differ in more than their `last` axes."""
    s, t = jnp.shape(student), jnp.shape(teacher)
    if len(s) != len(t) or len(s) < last or s[:-last] != t[:-last]:
        raise ValueError(
            f"{who}: student and teacher must agree in all axes but the last; got "
            f"{s} and {t}. Pass features of the same examples and positions."
        )


def check_where(who: str, where: jax.Array | None, *shapes: tuple[int, ...]) -> None:
    """Refuse a mask that is not boolean or of none of the shapes."""
    if where is None:
        return
    dtype = jnp.asarray(where).dtype
    if jnp.shape(where) not in shapes or dtype != jnp.bool_:
        allowed = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(
            f"{who}: where must be bool of shape {allowed}, true for what counts; got "
            f"{dtype}{list(jnp.shape(where))}. Pass mask.astype(bool) for those axes."
        )


@jax.jit
def _not_finite(x: jax.Array, where: jax.Array | None) -> jax.Array:
    return (~jnp.isfinite(widened(x, where))).sum(dtype=jnp.int32)


class Batch(NamedTuple):
    """Features of a batch, one row an example.

    Attributes:
      student: ``float32[batch, features]``, zeros for examples left out.
      teacher: The same of the teacher, without a gradient.
      counts: ``bool[batch]``, the examples that count.
      pairs: ``bool[batch, batch]``, pairs of different examples that count.
      number: ``float32[]``, how many examples count.
    """

    student: jax.Array
    teacher: jax.Array
    counts: jax.Array
    pairs: jax.Array
    number: jax.Array


def batch(
    who: str, student: jax.Array, teacher: jax.Array, where: jax.Array | None
) -> Batch:
    """Rows of a batch from features whose first axis holds the examples.

    Raises:
      ValueError: If the batches differ in size, or `where` is not a mask of leading
        axes of both.
    """
    s, t = jnp.shape(student), jnp.shape(teacher)
    if len(s) < 2 or len(t) < 2 or s[0] != t[0]:
        raise ValueError(
            f"{who}: student and teacher must be [batch, ..., features] of the same "
            f"batch; got {s} and {t}. For several batches use jax.vmap."
        )
    common = [s[:n] for n in range(1, min(len(s), len(t))) if s[:n] == t[:n]]
    check_where(who, where, *common)
    x, y = pair(who, student, teacher, where)
    counts = jnp.ones(s[0], bool)
    if where is not None:
        counts = jnp.reshape(where, (s[0], -1)).any(-1)
    pairs = counts[:, None] & counts[None, :] & ~jnp.eye(s[0], dtype=bool)
    number = counts.sum(dtype=jnp.float32)
    return Batch(x.reshape(s[0], -1), y.reshape(s[0], -1), counts, pairs, number)


def at_least_one(number: jax.Array) -> jax.Array:
    """A divisor for sums over nothing, which are zero."""
    return jnp.maximum(number, 1.0)
