"""`quantized_embedding_lookup`: checks and gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Weight
from kernels_pallas.quantized_embedding_lookup import xla
from kernels_pallas.quantized_embedding_lookup.reference import Mode
from kernels_pallas.target import Choice, Target

WHO = "quantized_embedding_lookup"


class _Problem(NamedTuple):
    """What is static about a call."""

    fmt: Format
    k: int
    mode: Mode
    dtype: Any


def quantized_embedding_lookup(
    ids: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    k: int,
    mode: Mode = "clip",
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    r"""Rows of a quantized table; only the rows that are read are dequantized.

    .. math:: y_{tk} = (d(c_{i_t k}) - z_{i_t g(k)})\, s_{i_t g(k)}

    Differentiable in the scales and (floating) zero points.

    Args:
      ids: ``integer[*stack, ...]``.
      weight: In the portable layout, ``[*stack, V, ...]``: a row a token, groups along
        the row.
      fmt: What its codes stand for. Static.
      k: Size of a row. Static.
      mode: What ids outside the table read, as `jnp.take` has it. ``"clip"``: the
        nearest row, so the first for negative ids. ``"fill"``: NaN, and negative ids
        down to ``-V`` count from the end. Static.
      dtype: Of the result; by default that of the scales. Static.

    Returns:
      ``dtype[*stack, ..., K]``; the arithmetic is float32.

    Raises:
      TypeError: If the ids are not integers or the words not the portable layout's.
      ValueError: If shapes disagree, groups do not divide K, or the mode is neither.

    Examples:
      >>> from kernels_pallas.formats import INT4
      >>> weight = Weight(jnp.array([[0x21], [0xF3]], jnp.uint8), jnp.ones((2, 1)))
      >>> quantized_embedding_lookup(jnp.array([1, 7, 0]), weight, INT4, k=2).tolist()
      [[3.0, -1.0], [3.0, -1.0], [1.0, 2.0]]
    """
    _check(ids, weight, fmt, k, mode)
    problem = _Problem(fmt, k, mode, jnp.dtype(dtype or weight.scale.dtype))
    stack = weight.words.ndim - 2
    run = functools.partial(_lookup, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    flat = ids.reshape(*ids.shape[:stack], -1)
    return run(flat, weight).reshape(*ids.shape, k)


def choose(fmt: Format, *, target: Target) -> Choice:
    """What `quantized_embedding_lookup` runs: plain XLA on every device."""
    return Choice("xla", f"rows of {fmt.name} gathered, then dequantized")


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _lookup(ids: jax.Array, weight: Weight, problem: _Problem) -> jax.Array:
    fmt, k, mode, dtype = problem
    y = xla.quantized_embedding_lookup(ids, weight, fmt, k=k, mode=mode)
    return y.astype(dtype)


def _forward(ids: jax.Array, weight: Weight, problem: _Problem) -> Any:
    return _lookup(ids, weight, problem), (ids, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    """Rows are dequantized again; what several tokens read gets the sum of theirs."""
    fmt, k, mode, _ = problem
    run = functools.partial(xla.quantized_embedding_lookup, fmt=fmt, k=k, mode=mode)
    _, pull = jax.vjp(run, *residuals)
    return pull(dy.astype(jnp.float32))


_lookup.defvjp(_forward, _backward)


def _check(ids: jax.Array, weight: Weight, fmt: Format, k: int, mode: str) -> None:
    words, scale, zero = weight
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{WHO}: ids must be integers; got {ids.dtype}. Use astype.")
    if words.dtype != PORTABLE.dtype:
        raise TypeError(
            f"{WHO}: words must be {PORTABLE.dtype}, of the portable layout; got "
            f"{words.dtype}. Undo another layout by kernels_pallas.layouts.unpack."
        )
    if mode not in ("clip", "fill"):
        refuse(WHO, "mode", "be 'clip' or 'fill'", repr(mode), "See jnp.take.")
    rows, groups = PORTABLE.sizes(scale.shape)
    if groups < 1 or k % groups:
        refuse(
            WHO,
            "scale",
            f"have a number of groups that divides the {k} of a row",
            groups,
            "Groups are consecutive places of equal number.",
        )
    wanted = (*scale.shape[:-2], *PORTABLE.words_shape(rows, k, groups, fmt))
    if words.shape != wanted:
        refuse(
            WHO,
            "words",
            f"be {wanted} for rows of {k} in {fmt.name} with scale {scale.shape}",
            words.shape,
            "Check k, and that rows are packed along their last axis.",
        )
    if zero is not None and zero.shape != scale.shape:
        refuse(WHO, "zero", f"be {scale.shape}", zero.shape, "Broadcast it.")
    stack = words.shape[:-2]
    if ids.shape[: len(stack)] != stack:
        refuse(
            WHO,
            "ids",
            f"begin with the weight's stack {stack}",
            ids.shape,
            "Move the stack to the front, or use jax.vmap.",
        )
