"""What the losses of logits share: checks, masks, softened log-probabilities."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._check_teacher import require_defined


def check_logits(
    who: str,
    student: jax.Array,
    teacher: jax.Array,
    where: jax.Array | None,
    temperature: float | jax.Array = 1.0,
) -> None:
    """Refuse what no loss is defined for; a traced teacher's values go unchecked."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{who}: student and teacher must have the same shape (and vocabulary); "
            f"got {student.shape} and {teacher.shape}. Drop or pad classes that only "
            "one of them has, with -inf for those that do not exist."
        )
    check_float(who, "student", student)
    check_float(who, "teacher", teacher)
    check_where(who, where, student.shape[:-1])
    check_positive(who, "temperature", temperature)
    require_defined(who, teacher, where)


def check_float(who: str, name: str, a: jax.Array) -> None:
    """Refuse a scalar and what is not floating."""
    if a.ndim < 1 or not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(
            f"{who}: {name} must be floating, with classes or features on its last "
            f"axis; got {a.dtype}{list(a.shape)}. Pass the outputs before any argmax."
        )


def check_where(who: str, where: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask that has not one boolean an example."""
    if where is not None and (where.shape != shape or where.dtype != jnp.bool_):
        raise ValueError(
            f"{who}: where must have one boolean an example, bool{list(shape)}; got "
            f"{where.dtype}{list(where.shape)}. Broadcast it, or compare it with 0."
        )


def check_positive(who: str, name: str, value: float | jax.Array) -> None:
    """Refuse what is known and not positive and finite."""
    if not isinstance(value, Tracer) and not 0.0 < float(value) < math.inf:
        raise ValueError(
            f"{who}: {name} must be positive and finite; got {value}. At 1 nothing "
            "is softened."
        )


def counted(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """The logits of the examples that count; zeros for others, which may be NaN."""
    if where is None:
        return logits
    return jnp.where(where[..., None], logits, jnp.zeros_like(logits))


def kept(loss: jax.Array, where: jax.Array | None) -> jax.Array:
    """The loss of the examples that count; zero for others."""
    return loss if where is None else jnp.where(where, loss, jnp.zeros_like(loss))


def widened(logits: jax.Array, where: jax.Array | None) -> jax.Array:
    """The counted logits in float32."""
    return counted(jnp.asarray(logits), where).astype(jnp.float32)


def softened(
    logits: jax.Array, where: jax.Array | None, temperature: float | jax.Array
) -> jax.Array:
    """Log-probabilities at a temperature, in float32."""
    scaled = widened(logits, where) / jnp.asarray(temperature, jnp.float32)
    return jax.nn.log_softmax(scaled)


def squared(temperature: float | jax.Array) -> jax.Array:
    """The factor that keeps gradients from shrinking with the temperature."""
    return jnp.square(jnp.asarray(temperature, jnp.float32))
