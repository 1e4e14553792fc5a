"""`ragged_quantized_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_weight
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight, unpack
from kernels_pallas.quantized_matmul.api import chunk_of
from kernels_pallas.quantized_matmul.gradients import cotangent, no_gradient
from kernels_pallas.ragged_quantized_matmul import tpu, xla
from kernels_pallas.target import Choice, Target, current_target

WHO = "ragged_quantized_matmul"


class _Problem(NamedTuple):
    """What is static about a call."""

    stored: Stored
    chunk: int
    dtype: Any
    interpret: Any


def ragged_quantized_matmul(
    x: jax.Array,
    weight: Weight,
    group_sizes: jax.Array,
    fmt: Format,
    *,
    n: int | None = None,
    groups: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply each row by the quantized weight of its expert.

    .. math:: y_m = x_m \hat w_{e(m)}^\top, \quad e(m) = \min \{e : m < \sum_{i \le e}
        \text{group\_sizes}_i\}

    As `jax.lax.ragged_dot`, with weights of few bits. Differentiable in `x`, the scales
    and (floating) zero points.

    Args:
      x: ``float[M, K]``, rows sorted by expert.
      weight: In `layout`, ``[E, N, ...]``.
      group_sizes: ``int32[E]``: rows of each expert; rows past their sum give zeros.
      fmt: What the codes stand for. Static.
      n: Outputs, in a layout that pads them. Static.
      groups: Groups of inputs, in a layout that pads them. Static.
      layout: How the weight lies. Static.
      dtype: Of the result; by default that of `x`. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[M, N]``; sums are float32.

    Raises:
      TypeError: If `x` does not float or the words are not the layout's.
      ValueError: If shapes disagree, or as `quantized_matmul` does.

    Examples:
      >>> from kernels_pallas.formats import INT8
      >>> words = jnp.array([[[1, 2]], [[3, 4]]], jnp.uint8)  # Two experts, one output.
      >>> weight = Weight(words, jnp.ones((2, 1, 1)))
      >>> x = jnp.array([[1.0, 10.0], [1.0, 10.0], [5.0, 5.0]])
      >>> ragged_quantized_matmul(x, weight, jnp.array([1, 1]), INT8).tolist()
      [[21.0], [43.0], [0.0]]

    References:
      Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022, section 5:
      blocks of rows, each with the experts that have rows in it.
    """
    target = current_target() if target is None else target
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim != 2:
        raise TypeError(
            f"{WHO}: x must be floating [M, K], rows sorted by expert; got "
            f"{x.dtype}{list(x.shape)}. Flatten its leading axes."
        )
    if weight.words.ndim != 3 or group_sizes.shape != weight.words.shape[:1]:
        refuse(
            WHO,
            "group_sizes",
            "have one entry for each expert of weight.words [E, N, ...]",
            f"{group_sizes.shape} for words {weight.words.shape}",
            "Count the rows of each expert: jnp.bincount(experts, length=E).",
        )
    stored = check_weight(
        WHO,
        x,
        jax.tree.map(lambda a: a[0], weight),
        fmt,
        n=n,
        groups=groups,
        layout=layout,
        target=target,
    )
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    return _matmul(
        x,
        weight,
        group_sizes,
        _Problem(stored, chunk_of(stored, target), dtype, interpret),
    )


def choose(fmt: Format, *, layout: Layout) -> Choice:
    """What `ragged_quantized_matmul` runs."""
    if layout != PORTABLE:
        return Choice(layout.name, f"{fmt.name} ragged {layout.name.upper()} kernel")
    return Choice("xla", f"{fmt.name} dequantized by experts")


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(
    x: jax.Array, weight: Weight, group_sizes: jax.Array, problem: _Problem
) -> jax.Array:
    stored, chunk, dtype, interpret = problem
    if stored.layout == PORTABLE:
        y = xla.ragged_quantized_matmul(x, weight, group_sizes, stored.fmt, chunk=chunk)
    else:
        x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
        y = tpu.ragged_quantized_matmul(
            x, weight, group_sizes, stored.fmt, interpret=interpret
        )
    return y[:, : stored.n].astype(dtype)


def _forward(
    x: jax.Array, weight: Weight, group_sizes: jax.Array, problem: _Problem
) -> Any:
    return _matmul(x, weight, group_sizes, problem), (x, weight, group_sizes)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    x, weight, group_sizes = residuals
    stored = problem.stored

    def sides(scale: jax.Array, zero: jax.Array | None) -> Weight:
        given = weight._replace(scale=scale, zero=zero)
        return jax.vmap(lambda w: unpack(w, stored))(given)

    portable, back = jax.vjp(sides, weight.scale, weight.zero)
    dx, found = xla.gradients(
        dy,
        x,
        portable,
        group_sizes,
        stored.fmt,
        chunk=problem.chunk,
    )
    dscale, dzero = back(jax.tree.map(cotangent, found, portable))
    dw = Weight(no_gradient(weight.words), dscale, dzero)
    return dx.astype(x.dtype), dw, no_gradient(group_sizes)


_matmul.defvjp(_forward, _backward)
