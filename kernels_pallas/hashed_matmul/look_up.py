"""Single weights of a hashed weight, wherever they stand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.hashed_matmul.reference import Hashing, places
from kernels_pallas.hashed_matmul.sums import exact_sums
from kernels_pallas.target import Target, current_target


@functools.partial(jax.jit, static_argnames=("hashing", "target"))
def look_up(
    buckets: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    hashing: Hashing,
    *,
    target: Target | None = None,
) -> jax.Array:
    """The weights at some places; differentiable in the buckets.

    Args:
      buckets: ``float[B]``.
      rows: ``int32[...]`` outputs of the whole weight.
      columns: ``int32[...]`` inputs; they broadcast.
      hashing: Which bucket a weight is. Static.
      target: The device; by default the one in use. Static.

    Returns:
      ``float32[...]``. The gradient is a sum in the same order at every call; on a GPU
      in fixed point, where order cannot matter.
    """
    target = current_target() if target is None else target
    run = _exactly if target.platform == "gpu" else _look_up
    return run(buckets.astype(jnp.float32), rows, columns, hashing)


def _look_up(
    buckets: jax.Array, rows: jax.Array, columns: jax.Array, hashing: Hashing
) -> jax.Array:
    at, negative = places(rows, columns, hashing, buckets=len(buckets))
    values = buckets.at[at].get(mode="promise_in_bounds")
    return jnp.where(negative, -values, values)


@functools.partial(jax.custom_vjp, nondiff_argnames=("hashing",))
def _exactly(
    buckets: jax.Array, rows: jax.Array, columns: jax.Array, hashing: Hashing
) -> jax.Array:
    return _look_up(buckets, rows, columns, hashing)


def _forward(
    buckets: jax.Array, rows: jax.Array, columns: jax.Array, hashing: Hashing
) -> Any:
    count = np.empty((len(buckets), 0))
    return _look_up(buckets, rows, columns, hashing), (count, rows, columns)


def _backward(hashing: Hashing, residuals: Any, dw: jax.Array) -> Any:
    buckets, rows, columns = residuals
    at, negative = places(rows, columns, hashing, buckets=len(buckets))
    signed = jnp.where(negative, -dw, dw)[..., None]
    return exact_sums(signed, at, len(buckets))[:, 0], None, None


_exactly.defvjp(_forward, _backward)
