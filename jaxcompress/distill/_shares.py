"""Divergences of two distributions, shared out to their classes.

Each function takes log-probabilities of teacher and student, of one shape. A class
whose probability is zero counts for nothing, also where its logarithm is -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Shares = Callable[[jax.Array, jax.Array], jax.Array]
"""``(log p of the teacher, log p of the student) -> shares``, of one shape."""


def forward_shares(t: jax.Array, s: jax.Array) -> jax.Array:
    """Shares of ``KL(teacher || student)``."""
    possible = t != -jnp.inf
    gap = jnp.where(possible, t, 0.0) - jnp.where(possible, s, 0.0)
    return jnp.exp(t) * gap


def reverse_shares(t: jax.Array, s: jax.Array) -> jax.Array:
    """Shares of ``KL(student || teacher)``."""
    return forward_shares(s, t)


def jensen_shannon_shares(beta: float | jax.Array) -> Shares:
    """Shares of the divergence of both from their mixture."""
    b = jnp.asarray(beta, jnp.float32)

    def shares(t: jax.Array, s: jax.Array) -> jax.Array:
        mixed = jnp.logaddexp(jnp.log(b) + t, jnp.log1p(-b) + s)
        return b * forward_shares(t, mixed) + (1.0 - b) * forward_shares(s, mixed)

    return shares


def excluded(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The student's logits without the classes that the teacher excludes."""
    return jnp.where(teacher == -jnp.inf, -jnp.inf, student)
