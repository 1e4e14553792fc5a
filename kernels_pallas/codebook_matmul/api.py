"""`codebook_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.codebook_matmul import _tpu_blocks, xla
from kernels_pallas.codebook_matmul._checks import check_shapes, check_types
from kernels_pallas.codebook_matmul.layout import CodebookWeight, unpack
from kernels_pallas.layouts import PORTABLE, TPU, Layout
from kernels_pallas.target import Choice, Target, current_target


class _Problem(NamedTuple):
    """What is static about a call."""

    bits: int
    n: int
    layout: Layout
    kernel: str
    chunk: int
    interpret: Any


def codebook_matmul(
    x: jax.Array,
    weight: CodebookWeight,
    *,
    bits: int,
    n: int | None = None,
    layout: Layout = PORTABLE,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply activations by a weight made of codebook entries.

    .. math:: y_{mn} = s_n \sum_{v,j} x_{m, dv+j} \sum_{a=1}^{A}
        C^{(b(v), a)}_{c_{nav}, j}, \qquad b(v) = \lfloor v B / S \rfloor

    ``d`` consecutive inputs are one of ``S = ceil(K / d)`` sub-vectors. Codebooks are
    shared by all of them (``B = 1``; with ``d = 1`` shared scalars), or each of B runs
    of sub-vectors has its own (product quantization); ``A`` codes are added (additive
    quantization). Differentiable in `x`, the codebooks and the scale.

    Args:
      x: ``float[*stack, ..., K]``, any K: the last sub-vector may be cut.
      weight: In `layout`; each array begins with ``*stack``. A code past the last
        entry reads the last.
      bits: Of a code, 1 to 8. Static.
      n: Outputs, in a layout that pads them. Static.
      layout: How the codes lie, portable or `layouts.TPU`
        (`kernels_pallas.codebook_matmul.repack`). Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., N]`` of the dtype of `x`; sums are float32.

    Raises:
      TypeError: If `x` or the codebooks do not float, or the words are not the
        layout's.
      ValueError: If shapes disagree, or the layout is another device's.

    Examples:
      >>> from kernels_pallas import packing
      >>> entries = jnp.array([[1.0, 2.0], [3.0, 4.0]])[None, None]
      >>> codes = jnp.array([[[0, 1]], [[1, 1]]], jnp.uint8)
      >>> weight = CodebookWeight(packing.pack(codes, bits=1), entries)
      >>> x = jnp.array([[1.0, 10.0, 100.0, 1000.0]])
      >>> codebook_matmul(x, weight, bits=1).tolist()
      [[4321.0, 4343.0]]

    References:
      Han et al., `Deep Compression <https://arxiv.org/abs/1510.00149>`_, 2016, section
      3 (shared scalars). Stock et al., `And the Bit Goes Down
      <https://arxiv.org/abs/1907.05686>`_, 2020 (product). Egiazarian et al., `AQLM
      <https://arxiv.org/abs/2401.06118>`_, 2024, eq. 2 (additive, scale per output).
    """
    target = current_target() if target is None else target
    check_types(x, weight, layout, target)
    n = check_shapes(x, weight, bits, n, layout)
    stack, k = weight.words.ndim - 3, x.shape[-1]
    m = x[(0,) * stack].size // max(1, k)
    if m == 0:
        return jnp.zeros((*x.shape[:-1], n), x.dtype)
    shape = weight.codebooks.shape[-4:]
    choice = choose(m, n, k, shape, layout=layout, target=target)
    chunk = _chunk(n, k) if target.platform == "cpu" else _AT_ONCE
    problem = _Problem(bits, n, layout, choice.kernel, chunk, interpret)
    run = functools.partial(_matmul, problem=problem)
    for _ in range(stack):
        run = jax.vmap(run)
    rows = x.reshape(*x.shape[:stack], m, k)
    return run(rows, weight).reshape(*x.shape[:-1], n)


def choose(
    m: int,
    n: int,
    k: int,
    shape: tuple[int, ...],
    *,
    layout: Layout,
    target: Target,
) -> Choice:
    """What `codebook_matmul` runs for ``[m, k] x [k, n]``.

    Args:
      m: Rows of x.
      n: Outputs.
      k: Inputs.
      shape: Of the codebooks, ``(B, A, E, d)``.
      layout: How the codes lie.
      target: The device.
    """
    if layout == TPU and _tpu_blocks.fits(m, shape):
        adds = _tpu_blocks.adds_up(m, shape[-1])
        what = "partial products" if adds else "entries"
        return Choice("tpu", f"{what} gathered by the TPU kernel")
    why = " (the tables of its kernel do not fit in VMEM)" if layout == TPU else ""
    if xla.adds_up(m, shape[-1]):
        return Choice("xla", f"partial products gathered{why}")
    rows = _chunk(n, k) // max(1, k) if target.platform == "cpu" else n
    at_once = "" if rows >= n else f", {rows} outputs at a time"
    return Choice("xla", f"entries gathered, then a dot{at_once}{why}")


_AT_ONCE = 2**26
"""Weights to decode at a time on an accelerator: 256 MB of float32."""


def _chunk(n: int, k: int) -> int:
    """Weights to decode at a time on a CPU: a 16th, in 0.5 to 4 MB of float32."""
    return max(min(n * k // 16, 2**20), 2**17, k)


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(x: jax.Array, weight: CodebookWeight, problem: _Problem) -> jax.Array:
    if problem.kernel == "tpu":
        from kernels_pallas.codebook_matmul import tpu

        exact = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
        y = tpu.codebook_matmul(
            exact, weight, bits=problem.bits, interpret=problem.interpret
        )
        return y[:, : problem.n].astype(x.dtype)
    weight = _portable(weight, x, problem)
    run = xla.by_decoding
    if xla.adds_up(x.shape[0], weight.codebooks.shape[-1]):
        run = xla.by_partial_products
    return run(x, weight, bits=problem.bits, chunk=problem.chunk).astype(x.dtype)


def _portable(
    weight: CodebookWeight, x: jax.Array, problem: _Problem
) -> CodebookWeight:
    return unpack(
        weight,
        bits=problem.bits,
        n=problem.n,
        k=x.shape[-1],
        layout=problem.layout,
    )


def _forward(x: jax.Array, weight: CodebookWeight, problem: _Problem) -> Any:
    return _matmul(x, weight, problem), (x, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    def decoded(x: jax.Array, weight: CodebookWeight) -> jax.Array:
        portable = _portable(weight, x, problem)
        return xla.by_decoding(x, portable, bits=problem.bits, chunk=problem.chunk)

    _, pull = jax.vjp(decoded, *residuals)
    return pull(dy.astype(jnp.float32))


_matmul.defvjp(_forward, _backward)
