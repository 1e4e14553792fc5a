"""`quantized_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_weight
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight
from kernels_pallas.quantized_matmul import gpu, tpu, xla
from kernels_pallas.quantized_matmul.gradients import gradients
from kernels_pallas.tables import tuned
from kernels_pallas.target import Choice, Target, current_target

WHO = "quantized_matmul"


class _Problem(NamedTuple):
    """What is static about a call."""

    stored: Stored
    choice: Choice
    settings: Any
    chunk: int
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
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{WHO}: x must be floating; got {x.dtype}. For integer activations use "
            "int8_matmul."
        )
    stored = check_weight(
        WHO,
        x,
        weight,
        fmt,
        n=n,
        groups=groups,
        layout=layout,
        target=target,
        kernels=("tpu", "gpu"),
    )
    stack = weight.words.ndim - 2
    m = x[(0,) * stack].size // stored.k
    choice = choose(m, stored.n, stored.k, fmt, layout=layout, target=target)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    settings = _settings(tuned(target.kind, m, stored), stored.layout)
    chunk = settings if isinstance(settings, int) else chunk_of(stored, target)
    problem = _Problem(stored, choice, settings, chunk, dtype, interpret)
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    rows = x.reshape(*x.shape[:stack], -1, x.shape[-1])
    return run(rows, weight).reshape(*x.shape[:-1], stored.n)


def choose(
    m: int, n: int, k: int, fmt: Format, *, layout: Layout, target: Target
) -> Choice:
    """What `quantized_matmul` runs for ``[m, k] x [k, n]``."""
    del m
    if layout != PORTABLE:
        return Choice(layout.name, f"{fmt.name} {layout.name.upper()} kernel")
    if target.platform == "cpu":
        rows = chunk_of(Stored(fmt, n, k, 1), target) // k
        at_once = "" if rows >= n else f", {rows} outputs at a time"
        return Choice("xla", f"{fmt.name} dequantized by planes{at_once}")
    return Choice("xla", f"{fmt.name} dequantized dot")


def chunk_of(stored: Stored, target: Target) -> int:
    """Weights to dequantize at a time: on a CPU a part, in 0.5 to 8 MB of float32.

    Ever fewer would leave its threads too little between two waits; with more, a
    program of 4-bit weights would take more memory than half a bfloat16 weight.
    """
    whole = stored.n * stored.k
    if target.platform != "cpu":
        return whole
    return max(min(whole * 7 // 64, 2**21), 2**17, stored.k)


def _settings(found: dict[str, Any] | None, layout: Layout) -> Any:
    """What a table says, as the form takes it: blocks, a config, or a chunk."""
    if found is None:
        return None
    kinds = {"tpu": tpu.Blocks, "gpu": gpu.Config}
    return kinds[layout.name](**found) if layout.name in kinds else found["chunk"]


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(x: jax.Array, weight: Weight, problem: _Problem) -> jax.Array:
    stored, choice, settings, chunk, dtype, interpret = problem
    fmt = stored.fmt
    match choice.kernel:
        case "tpu":
            x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
            y = tpu.quantized_matmul(
                x, weight, fmt, blocks=settings, interpret=interpret
            )
        case "gpu":
            y = gpu.quantized_matmul(
                x, weight, fmt, config=settings, interpret=interpret
            )
        case _:
            y = xla.quantized_matmul(x, weight, fmt, chunk=chunk)
    return y[:, : stored.n].astype(dtype)


def _forward(x: jax.Array, weight: Weight, problem: _Problem) -> Any:
    return _matmul(x, weight, problem), (x, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    x, weight = residuals
    return gradients(dy, x, weight, problem.stored, chunk=problem.chunk)


_matmul.defvjp(_forward, _backward)
