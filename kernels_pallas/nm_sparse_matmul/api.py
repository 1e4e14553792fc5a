"""`nm_sparse_matmul`: the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.formats import Format, Table
from kernels_pallas.layouts import PORTABLE, Layout, width
from kernels_pallas.nm_sparse_matmul import tpu, xla
from kernels_pallas.nm_sparse_matmul._checks import check, check_sizes, outputs_of
from kernels_pallas.nm_sparse_matmul.layout import (
    NMSparse,
    groups_of,
    index_format,
    restore,
)
from kernels_pallas.quantized_matmul.gradients import no_gradient
from kernels_pallas.target import Choice, Target, current_target
from kernels_pallas.values import floats, with_floats


class _Problem(NamedTuple):
    """What is static about a call."""

    fmt: Format | None
    n: int
    m: int
    outputs: int
    scales: int
    layout: Layout
    choice: Choice
    at_once: int
    dtype: Any
    interpret: Any


def nm_sparse_matmul(
    x: jax.Array,
    weight: NMSparse,
    fmt: Format | None = None,
    *,
    n: int,
    m: int,
    outputs: int | None = None,
    scales: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply activations by a weight that keeps `n` of every `m` inputs.

    .. math:: y_{br} = \sum_g \sum_{i < n} x_{b, g m + \mathrm{index}(r, g, i)}\,
        v_{r g i}

    Differentiable in `x` and the kept weights (of codes: their scales and floating
    zero points); weights that are not kept have no gradient.

    Args:
      x: ``float[*stack, ..., K]``.
      weight: ``[*stack, N, K]``, by `pack`.
      fmt: What the codes of its values stand for; None if they are floats. Static.
      n: Weights kept. Static.
      m: Of so many: 4, 8 or 16. Static.
      outputs: N, in a layout that pads it. Static.
      scales: Scales of an output, in a layout that pads them. Static.
      layout: How the weight lies: portable, or as `repack` put it. Static.
      dtype: Of the result; by default that of `x`. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., N]``; sums are float32.

    Raises:
      TypeError: If `x` does not float, or the words are not the layout's.
      ValueError: If the pattern is unknown, shapes disagree, or the layout is another
        device's.

    Examples:
      >>> from kernels_pallas.nm_sparse_matmul import pack
      >>> weight = pack(jnp.array([[1.0, -4.0, 0.0, 3.0]]), n=2, m=4)
      >>> x = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
      >>> nm_sparse_matmul(x, weight, n=2, m=4).tolist()
      [[2960.0]]

    References:
      Mishra et al., `Accelerating Sparse Deep Neural Networks
      <https://arxiv.org/abs/2104.08378>`_, 2021, section 3. Differs: any n of m = 4, 8
      or 16.
    """
    target = current_target() if target is None else target
    check(x, weight, fmt, n, m, layout, target)
    outputs, scales = outputs_of(weight, x.shape[-1], m, outputs, scales, layout)
    check_sizes(
        weight,
        fmt,
        layout,
        n=n,
        m=m,
        groups=groups_of(x.shape[-1], m),
        outputs=outputs,
        scales=scales,
    )
    problem = _Problem(
        fmt,
        n,
        m,
        outputs,
        scales,
        layout,
        choose(weight, x, fmt, n=n, m=m, layout=layout, target=target),
        _at_once(outputs, x.shape[-1], target),
        jnp.dtype(x.dtype if dtype is None else dtype),
        interpret,
    )
    stack = weight.indices.ndim - (2 if layout == PORTABLE else 3)
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    rows = x.reshape(*x.shape[:stack], -1, x.shape[-1])
    return run(rows, weight).reshape(*x.shape[:-1], outputs)


def choose(
    weight: NMSparse,
    x: jax.Array,
    fmt: Format | None = None,
    *,
    n: int,
    m: int,
    layout: Layout,
    target: Target,
) -> Choice:
    """What `nm_sparse_matmul` runs.

    Args:
      weight: Its arrays, or their `jax.ShapeDtypeStruct`.
      x: Likewise.
      fmt: What the codes of its values stand for; None if they are floats.
      n: Weights kept.
      m: Of so many.
      layout: How the weight lies.
      target: The device.
    """
    kind = fmt.name if fmt else str(jax.tree.leaves(weight.values)[0].dtype)
    name = f"{n}:{m} of {kind}"
    if target.platform == "cpu":
        return Choice("xla", f"{name} expanded by planes, some outputs at a time")
    why = _why_not(weight, x, fmt, m, layout, target)
    if why is None:
        return Choice("tpu", f"{name} expanded by planes in the TPU kernel")
    return Choice("xla", f"{name} expanded by planes, then dots: {why}")


def _why_not(
    weight: NMSparse,
    x: jax.Array,
    fmt: Format | None,
    m: int,
    layout: Layout,
    target: Target,
) -> str | None:
    """Why the TPU kernel does not run; None if it does."""
    if target.platform != "tpu":
        return "there is no kernel for this device"
    if layout == PORTABLE:
        return "the weight is in the portable layout"
    if isinstance(fmt, Table) and len(fmt.values) > 16:
        return "tables of more than 16 entries are looked up by XLA"
    narrow = min(width(f) for f in (index_format(m), fmt) if f is not None)
    if narrow == 2 and any(old in target.kind for old in ("v2", "v3", "v4")):
        return f"codes of 2 bits do not compile for {target.kind}"
    dtypes = [x.dtype, *(a.dtype for a in jax.tree.leaves(weight.values) if not fmt)]
    if any(d not in (jnp.bfloat16, jnp.float32) for d in dtypes):
        return f"it multiplies bfloat16 and float32, not {[str(d) for d in dtypes]}"
    return None


def _at_once(outputs: int, k: int, target: Target) -> int:
    """Outputs that are dense at a time: on a CPU an 8th, 2 to 4 MB of float32."""
    if target.platform != "cpu":
        return outputs
    return max(1, max(min(outputs * k // 8, 2**20), 2**19) // k)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(x: jax.Array, weight: NMSparse, problem: _Problem) -> jax.Array:
    p = problem
    if p.choice.kernel == "tpu":
        y = tpu.nm_sparse_matmul(x, weight, p.fmt, n=p.n, m=p.m, interpret=p.interpret)
    else:
        portable = _portable(weight, x, p)
        y = xla.nm_sparse_matmul(x, portable, p.fmt, n=p.n, m=p.m, at_once=p.at_once)
    return y[:, : p.outputs].astype(p.dtype)


def _portable(weight: NMSparse, x: jax.Array, problem: _Problem) -> NMSparse:
    p = problem
    return restore(
        weight,
        p.fmt,
        n=p.n,
        m=p.m,
        k=x.shape[-1],
        outputs=p.outputs,
        scales=p.scales,
        layout=p.layout,
    )


def _forward(x: jax.Array, weight: NMSparse, problem: _Problem) -> Any:
    return _matmul(x, weight, problem), (x, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    (x, weight), p = residuals, problem

    def portable(given: Any) -> Any:
        values = with_floats(weight.values, given)
        return floats(_portable(weight._replace(values=values), x, p).values)

    _, back = jax.vjp(portable, floats(weight.values))
    plain = _portable(weight, x, p)
    dx = xla.input_gradient(
        dy, plain, p.fmt, n=p.n, m=p.m, k=x.shape[-1], at_once=p.at_once
    )
    found = xla.value_gradients(dy, x, plain, p.fmt, n=p.n, m=p.m, at_once=p.at_once)
    dvalues = with_floats(jax.tree.map(no_gradient, weight.values), back(found)[0])
    dweight = weight._replace(values=dvalues, indices=no_gradient(weight.indices))
    return dx.astype(x.dtype), dweight


_matmul.defvjp(_forward, _backward)
