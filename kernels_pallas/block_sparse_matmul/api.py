"""`block_sparse_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.block_sparse_matmul import tpu, xla
from kernels_pallas.block_sparse_matmul._checks import check, outputs
from kernels_pallas.block_sparse_matmul.layout import (
    BlockSparse,
    block_shape,
    restore,
)
from kernels_pallas.formats import Format, Table
from kernels_pallas.layouts import PORTABLE, Layout, Weight
from kernels_pallas.quantized_matmul.gradients import no_gradient
from kernels_pallas.target import Choice, Target, current_target
from kernels_pallas.values import floats, with_floats


class _Problem(NamedTuple):
    """What is static about a call."""

    fmt: Format | None
    layout: Layout
    choice: Choice
    at_once: int
    dtype: Any
    products: Any
    interpret: Any


def block_sparse_matmul(
    x: jax.Array,
    weight: BlockSparse,
    fmt: Format | None = None,
    *,
    n: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply activations by a weight of which only some blocks are stored.

    .. math:: y_{m, r b_n + i} =
        \sum_c \sum_j x_{m, \mathrm{col}(r, c)\, b_k + j}\, v_{r c i j}

    Differentiable in `x` and the stored values (of codes: their scales and floating
    zero points); blocks that are not stored have no gradient.

    Args:
      x: ``float[*stack, ..., K]``.
      weight: ``[*stack, N, K]``, by `pack`.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Outputs, where they are no multiple of the blocks'. Static.
      layout: How codes lie: portable, or as `repack` put them. Static.
      dtype: Of the result; by default that of `x`. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., N]``; sums are float32.

    Raises:
      TypeError: If `x` does not float, or columns or words are of another dtype.
      ValueError: If shapes disagree, or the layout is another device's.

    Examples:
      >>> from kernels_pallas.block_sparse_matmul import pack
      >>> w = jnp.array([[0.0, 0.0, 1.0, 2.0], [3.0, 0.0, 0.0, 0.0]])
      >>> block_sparse_matmul(jnp.ones((1, 4)), pack(w, block=(1, 2))).tolist()
      [[3.0, 3.0]]

    References:
      Gray et al., `GPU Kernels for Block-Sparse Weights
      <https://cdn.openai.com/blocksparse/blocksparsepaper.pdf>`_, 2017. Differs: a
      fixed number of places in each row of blocks.
    """
    target = current_target() if target is None else target
    check(x, weight, fmt, layout, target)
    stack = weight.columns.ndim - 2
    bn = block_shape(weight.values, fmt, layout)[0]
    n = outputs(n, weight.columns.shape[-2], bn)
    problem = _Problem(
        fmt,
        layout,
        choose(weight, x, fmt, layout=layout, target=target),
        _at_once(weight.columns.shape[-2], bn, target),
        jnp.dtype(x.dtype if dtype is None else dtype),
        _products(x, weight, target),
        interpret,
    )
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    rows = x.reshape(*x.shape[:stack], -1, x.shape[-1])
    return run(rows, weight)[..., :n].reshape(*x.shape[:-1], n)


def choose(
    weight: BlockSparse,
    x: jax.Array,
    fmt: Format | None = None,
    *,
    layout: Layout,
    target: Target,
) -> Choice:
    """What `block_sparse_matmul` runs.

    Args:
      weight: Its arrays, or their `jax.ShapeDtypeStruct`.
      x: Likewise.
      fmt: What the codes of its values stand for; None if they are floats.
      layout: How codes lie.
      target: The device.
    """
    block = block_shape(weight.values, fmt, layout)
    kind = fmt.name if fmt else str(jax.tree.leaves(weight.values)[0].dtype)
    name = f"{kind} blocks of {block[0]} x {block[1]}"
    if target.platform == "cpu":
        return Choice("xla", f"{name} gathered and multiplied row by row")
    why = _why_not(weight, x, fmt, block, layout, target)
    if why is None:
        return Choice("tpu", f"{name}, columns picked in the TPU kernel")
    return Choice("xla", f"{name} gathered, batched dot: {why}")


def _why_not(
    weight: BlockSparse,
    x: jax.Array,
    fmt: Format | None,
    block: tuple[int, int],
    layout: Layout,
    target: Target,
) -> str | None:
    """Why the TPU kernel does not run; None if it does."""
    if target.platform != "tpu":
        return "there is no kernel for this device"
    if fmt is not None and layout == PORTABLE:
        return "codes are in the portable layout"
    if isinstance(fmt, Table) and len(fmt.values) > 16:
        return "tables of more than 16 entries are looked up by XLA"
    dtypes = [x.dtype, *(a.dtype for a in jax.tree.leaves(weight.values) if not fmt)]
    if any(d not in (jnp.bfloat16, jnp.float32) for d in dtypes):
        return f"it multiplies bfloat16 and float32, not {[str(d) for d in dtypes]}"
    rows, places = weight.columns.shape[-2:]
    itemsize = max(jnp.dtype(d).itemsize for d in dtypes)
    return tpu.refusal(x.shape[-1], block, rows * places, itemsize)


def _at_once(rows: int, bn: int, target: Target) -> int:
    """Rows of blocks at a time: on a CPU about 128 outputs, else all."""
    if target.platform != "cpu":
        return rows
    most = max(1, 128 // bn)
    return next(d for d in range(most, 0, -1) if rows % d == 0)


def _products(x: jax.Array, weight: BlockSparse, target: Target) -> Any:
    """Their dtype by XLA; a CPU multiplies nothing narrower than float32 well."""
    if target.platform == "cpu" or isinstance(weight.values, Weight):
        return jnp.float32
    return jnp.promote_types(x.dtype, weight.values.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(x: jax.Array, weight: BlockSparse, problem: _Problem) -> jax.Array:
    p = problem
    if p.choice.kernel == "tpu":
        y = tpu.block_sparse_matmul(x, weight, p.fmt, interpret=p.interpret)
    else:
        y = xla.block_sparse_matmul(
            x, _portable(weight, p), p.fmt, at_once=p.at_once, dtype=p.products
        )
    return y.astype(p.dtype)


def _portable(weight: BlockSparse, problem: _Problem) -> BlockSparse:
    if problem.fmt is None or problem.layout == PORTABLE:
        return weight
    return restore(weight, problem.fmt, layout=problem.layout)


def _forward(x: jax.Array, weight: BlockSparse, problem: _Problem) -> Any:
    return _matmul(x, weight, problem), (x, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    x, weight = residuals

    def portable(given: Any) -> Any:
        values = with_floats(weight.values, given)
        return floats(_portable(weight._replace(values=values), problem).values)

    _, back = jax.vjp(portable, floats(weight.values))
    dx, found = xla.gradients(
        dy, x, _portable(weight, problem), problem.fmt, at_once=problem.at_once
    )
    dvalues = with_floats(jax.tree.map(no_gradient, weight.values), back(found)[0])
    dweight = weight._replace(values=dvalues, columns=no_gradient(weight.columns))
    return dx.astype(x.dtype), dweight


_matmul.defvjp(_forward, _backward)
