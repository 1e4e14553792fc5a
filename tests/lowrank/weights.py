"""Weights and leaves that the tests of this family share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from tests.jitted import run as run

MATRIX = jc.Axes(contract=(-2,))
STACK = jc.Axes(contract=(-2,), stack=1)
TABLE = jc.Axes(contract=(-1,))
CONV = jc.Axes(contract=(-4, -3, -2))


def draw(seed: int, *shape: int) -> jax.Array:
    """Normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def decaying(seed: int, m: int, n: int, *, rate: float = 0.7) -> jax.Array:
    """A matrix whose singular values fall by `rate` from one to the next."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=(m, n)), full_matrices=False)
    s = 10.0 * rate ** np.arange(min(m, n))
    return jnp.asarray((u * s) @ vt, jnp.float32)


def best_product(w: Any, rank: int) -> np.ndarray:
    """Eckart and Young's, of a matrix or a stack, in float64."""
    u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def energy(a: Any) -> float:
    """Sum of squares in float64."""
    return float(np.square(np.float64(a)).sum())


def sees(fn: Any, *args: Any, shape: tuple[int, ...]) -> bool:
    """Whether a lifted function makes an array of this shape, in any order of axes."""
    text = str(jax.make_jaxpr(jc.lift(fn))(*args))
    found = {
        tuple(sorted(map(int, part.split("]")[0].split(","))))
        for part in text.split("f32[")[1:]
        if part.split("]")[0]
    }
    return tuple(sorted(shape)) in found
