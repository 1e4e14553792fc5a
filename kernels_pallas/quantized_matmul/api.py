"""`quantized_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Layout, Weight, unpack
from kernels_pallas.quantized_matmul import xla
from kernels_pallas.target import Target, current_target

WHO = "quantized_matmul"


class Choice(NamedTuple):
    """What runs.

    Attributes:
      kernel: ``"tpu"``, ``"gpu"`` or ``"xla"``.
      how: In words, for reports.
    """

    kernel: str
    how: str


class _Problem(NamedTuple):
    """What is static about a call."""

    fmt: Format
    layout: Layout
    n: int
    groups: int
    choice: Choice
    dtype: Any
    interpret: Any


def quantized_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    n: int | None = None,
    groups: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply activations by a weight of few bits, dequantized on the way.

    .. math:: y_{mn} = \sum_k x_{mk} (d(c_{nk}) - z_{n g(k)})\, s_{n g(k)}

    Differentiable in `x`, the scales and (floating) zero points.

    Args:
      x: ``float[*stack, ..., K]``.
      weight: In `layout`, ``[*stack, N, ...]``.
      fmt: What its codes stand for. Static.
      n: Outputs, in a layout that pads them. Static.
      groups: Groups of inputs, in a layout that pads them. Static.
      layout: How the weight lies. Static.
      dtype: Of the result; by default that of `x`. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., N]``; sums are float32.

    Raises:
      TypeError: If `x` does not float or the words are not the layout's.
      ValueError: If shapes disagree, groups do not divide K, or the layout is another
        device's.

    Examples:
      >>> from kernels_pallas.formats import INT4
      >>> weight = Weight(jnp.array([[0x21], [0xF3]], jnp.uint8), jnp.ones((2, 1)))
      >>> quantized_matmul(jnp.array([[1.0, 10.0]]), weight, INT4).tolist()
      [[21.0, -7.0]]
    """
    target = current_target() if target is None else target
    n, groups = _check(x, weight, fmt, n, groups, layout, target)
    stack = weight.words.ndim - 2
    m = x[(0,) * stack].size // max(1, x.shape[-1])
    choice = choose(m, n, x.shape[-1], fmt, layout=layout, target=target)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    problem = _Problem(fmt, layout, n, groups, choice, dtype, interpret)
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    rows = x.reshape(*x.shape[:stack], -1, x.shape[-1])
    return run(rows, weight).reshape(*x.shape[:-1], n)


def choose(
    m: int, n: int, k: int, fmt: Format, *, layout: Layout, target: Target
) -> Choice:
    """What `quantized_matmul` runs for ``[m, k] x [k, n]``."""
    del m
    if layout != PORTABLE:
        return Choice(layout.name, f"{fmt.name} {layout.name.upper()} kernel")
    if target.platform == "cpu":
        rows = _chunk(n, k) // k
        at_once = "" if rows >= n else f", {rows} outputs at a time"
        return Choice("xla", f"{fmt.name} dequantized by planes{at_once}")
    return Choice("xla", f"{fmt.name} dequantized dot")


def _chunk(n: int, k: int) -> int:
    """Weights to dequantize at a time on a CPU: a 16th, in 0.5 to 4 MB of float32."""
    return max(min(n * k // 16, 2**20), 2**17, k)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(x: jax.Array, weight: Weight, problem: _Problem) -> jax.Array:
    fmt, k = problem.fmt, x.shape[-1]
    match problem.choice.kernel:
        case "tpu":
            from kernels_pallas.quantized_matmul import tpu

            y = tpu.quantized_matmul(x, weight, fmt, interpret=problem.interpret)
        case "gpu":
            from kernels_pallas.quantized_matmul import gpu

            y = gpu.quantized_matmul(x, weight, fmt, interpret=problem.interpret)
        case _:
            chunk = _chunk(problem.n, k)
            y = xla.quantized_matmul(x, weight, fmt, chunk=chunk)
    return y[:, : problem.n].astype(problem.dtype)


def _forward(x: jax.Array, weight: Weight, problem: _Problem) -> Any:
    return _matmul(x, weight, problem), (x, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    x, weight = residuals
    fmt, n, k = problem.fmt, problem.n, x.shape[-1]

    def sides(scale: jax.Array, zero: jax.Array | None) -> Weight:
        given = weight._replace(scale=scale, zero=zero)
        return unpack(
            given, fmt, n=n, k=k, groups=problem.groups, layout=problem.layout
        )

    portable, back = jax.vjp(sides, weight.scale, weight.zero)
    chunk = _chunk(n, k)
    dx = xla.input_gradient(dy, portable, fmt, k=k, chunk=chunk)
    found = xla.scale_gradients(dy, x, portable, fmt, chunk=chunk)
    dscale, dzero = back(jax.tree.map(_cotangent, found, portable))
    return dx.astype(x.dtype), Weight(_cotangent(None, weight.words), dscale, dzero)


def _cotangent(value: Any, like: jax.Array) -> Any:
    """In the dtype of what it belongs to; integers have none."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return value.astype(like.dtype)
    return np.zeros(like.shape, jax.dtypes.float0)


_matmul.defvjp(_forward, _backward)


def _check(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    n: int | None,
    groups: int | None,
    layout: Layout,
    target: Target,
) -> tuple[int, int]:
    """Outputs and groups; or an error before anything is traced."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{WHO}: x must be floating; got {x.dtype}. For integer activations use "
            "int8_matmul."
        )
    words, scale, zero = weight
    if words.dtype != layout.dtype:
        raise TypeError(
            f"{WHO}: words of the {layout.name} layout must be {layout.dtype}; got "
            f"{words.dtype}. Pack codes by kernels_pallas.packing, then "
            "kernels_pallas.layouts.repack."
        )
    if layout.name not in ("portable", target.platform):
        refuse(
            WHO,
            "layout",
            "be the device's or portable",
            f"{layout.name!r} on {target.kind!r}",
            "Undo it by kernels_pallas.layouts.unpack.",
        )
    k = x.shape[-1]
    stored_n, stored_groups = layout.sizes(scale.shape)
    n, groups = n or stored_n, groups or stored_groups
    if k % groups:
        refuse(
            WHO,
            "scale",
            f"have a number of groups that divides the {k} inputs",
            groups,
            "Groups are consecutive inputs of equal number.",
        )
    wanted = layout.words_shape(n, k, groups, fmt)
    if words.shape[-2:] != wanted:
        refuse(
            WHO,
            "words",
            f"be [..., {wanted[0]}, {wanted[1]}] for {n} outputs, {k} inputs and "
            f"{fmt.name} in the {layout.name} layout",
            words.shape,
            "Check that x has the inputs that the weight was packed for.",
        )
    if zero is not None and zero.shape != scale.shape:
        refuse(
            WHO,
            "zero",
            f"have the shape of scale, {scale.shape}",
            zero.shape,
            "Broadcast it.",
        )
    stack = words.shape[:-2]
    if x.shape[: len(stack)] != stack or scale.shape[:-2] != stack:
        refuse(
            WHO,
            "x and scale",
            f"begin with the weight's stack {stack}",
            f"{x.shape} and {scale.shape}",
            "Move the stack to the front, or use jax.vmap.",
        )
    return n, groups
