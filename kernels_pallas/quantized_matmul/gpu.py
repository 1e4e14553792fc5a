"""``x @ dequantize(w)`` on Hopper GPUs: codes are decoded into wgmma's registers.

The weight is operand A, decoded by the threads that hold it, and x is operand B in
shared memory, so that a block of threads reads each code once and writes outputs by
rows of x. Copies run ahead in a warpgroup of their own. Sums are float32; scales and
zero points act on sums, so products of bfloat16 or float16 x are exact, but for tables,
whose entries are rounded. Needs jax 0.11.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import _gpu_words
from kernels_pallas.checks import check_sides
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Float8, Format, Integer, Table
from kernels_pallas.layouts import Weight, signed_zero, width

from ._gpu_config import Config, Problem, config_for

_NAME = "quantized_matmul (GPU)"
DENSE_ROWS = 512
"""Rows of x from which to dequantize once and multiply by XLA."""


def quantized_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    config: Config | None = None,
    num_sms: int = 132,
    interpret: Any = False,
) -> jax.Array:
    """Multiply by a quantized weight in the GPU layout.

    Args:
      x: ``bfloat16``, ``float16`` or ``float32`` ``[M, K]``, any M >= 1. ``float32`` is
        split into two ``bfloat16`` terms, at twice the rows and a relative error of
        ``2**-16``.
      weight: In `layouts.GPU`: ``int32[N' / 64, 2 K' B]`` words, ``float32[G', N']``
        scale and zero; ``K' >= K``.
      fmt: What its codes stand for; tables of 5 to 16 entries. Static.
      out_dtype: Of the result. Static.
      config: How the work is cut; by default `config_for`. Static.
      num_sms: Processors of the device. Static.
      interpret: Run on a CPU: True, or the parameters of the GPU interpreter. Static.

    Returns:
      ``out_dtype[M, N']``. From `DENSE_ROWS` rows on the weight is dequantized once,
      rounded to the dtype of x.

    Raises:
      ValueError: If shapes do not fit together.
      TypeError: If x has another dtype.
      NotImplementedError: For other tables and FP8 types, groups that are neither of 32
        nor of a multiple of 64 inputs, or jax before 0.11.

    References:
      Frantar et al., `MARLIN <https://arxiv.org/abs/2408.11743>`_, 2024, section 3, for
      the order of the words and the aim. Differs: wgmma with the operands swapped,
      scales after the dot.
    """
    weight = weight._replace(zero=signed_zero(weight, fmt))
    _check(x, weight, fmt)
    x = jnp.pad(x, ((0, 0), (0, _inputs(weight, fmt) - x.shape[1])))
    multiply = functools.partial(
        _multiply, weight=weight, fmt=fmt, num_sms=num_sms, interpret=interpret
    )
    if x.dtype == jnp.float32:
        high = x.astype(jnp.bfloat16)
        low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
        both = jnp.concatenate([high, low])
        terms = multiply(both, out_dtype=jnp.float32, config=config)
        return (terms[: x.shape[0]] + terms[x.shape[0] :]).astype(out_dtype)
    return multiply(x, out_dtype=jnp.dtype(out_dtype), config=config)


def dequantize(weight: Weight, fmt: Format) -> jax.Array:
    """The dense weight: ``float32[N', K']``."""
    codes = _gpu_words.restore(weight.words, bits=width(fmt))
    repeat = lambda a: jnp.repeat(a.T, codes.shape[1] // a.shape[0], axis=1)
    values = _stored(fmt).decode(codes)
    if weight.zero is not None:
        values -= repeat(weight.zero)
    return values * repeat(weight.scale)


def _multiply(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    out_dtype: Any,
    config: Config | None,
    num_sms: int,
    interpret: Any,
) -> jax.Array:
    """By the kernel, or dense if there are many rows."""
    m, k = x.shape
    if m >= DENSE_ROWS:
        dense = dequantize(weight, fmt).astype(x.dtype)
        y = jnp.matmul(x, dense.T, preferred_element_type=jnp.float32)
        return y.astype(out_dtype)
    groups, n = weight.scale.shape
    zeros = weight.zero is not None
    config = config or config_for(m, n, k, fmt, groups, zeros=zeros, num_sms=num_sms)
    problem = Problem(
        m=m if m < 8 else m + -m % 8,
        n=n,
        k=k,
        fmt=_stored(fmt),
        dtype=x.dtype,
        out_dtype=out_dtype if config.split_k == 1 else jnp.dtype(jnp.float32),
        group=k // groups if groups > 1 else None,
        zeros=zeros,
        config=config,
        staged=bool(interpret),
    )
    rows = problem.out_shape[1] if interpret else problem.m
    x = jnp.pad(x, ((0, rows - m), (0, 0)))
    words = weight.words.reshape(n // 64, k // 64, width(fmt), -1)
    sides = [a for a in (weight.scale, weight.zero) if a is not None]
    parts = _launch(problem, interpret)(x, words, *sides)
    y = parts[0] if config.split_k == 1 else parts.sum(axis=0)
    return y[:m].astype(out_dtype)


def _launch(problem: Problem, interpret: Any) -> Any:
    """The kernel, if this jax has what it is written in."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    parameters = getattr(plgpu, "InterpretGPUParams", None)
    if parameters is None:
        raise NotImplementedError(
            f"{_NAME}: jax must be 0.11 or later for Pallas Mosaic GPU; got "
            f"{jax.__version__}. Update it, or keep the weight in the portable layout."
        )
    from . import _gpu_kernel

    return _gpu_kernel.launch(problem, parameters() if interpret is True else interpret)


def _check(x: jax.Array, weight: Weight, fmt: Format) -> None:
    words = weight.words
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"{_NAME}: x must be bfloat16, float16 or float32; got {x.dtype}. "
            "Convert it."
        )
    _check_format(fmt)
    if x.ndim != 2 or not x.size:
        refuse(_NAME, "x", "be [M, K], neither of them 0", x.shape, "Flatten it.")
    inputs, outputs = _inputs(weight, fmt), 64 * words.shape[0]
    if words.dtype != jnp.int32 or x.shape[1] > inputs or inputs % 128:
        rule = f"be int32[N' / 64, 2 K' {width(fmt)}], 128 | K' >= {x.shape[1]}"
        got = f"{words.dtype}{list(words.shape)}"
        refuse(_NAME, "weight.words", rule, got, "Pack by layouts.repack.")
    check_sides(_NAME, weight, inputs, outputs)


def _check_format(fmt: Format) -> None:
    table = isinstance(fmt, Table) and width(fmt) != 4
    other = isinstance(fmt, Float8) and fmt.dtype not in (
        "float8_e4m3fn",
        "float8_e5m2",
    )
    if table or other:
        raise NotImplementedError(
            f"{_NAME}: fmt must be integers, a table of 5 to 16 entries, fp8_e4m3 or "
            f"fp8_e5m2; got {fmt.name}. Keep the weight in the portable layout."
        )


def _inputs(weight: Weight, fmt: Format) -> int:
    """``K'``."""
    return weight.words.shape[1] // (2 * width(fmt))


def _stored(fmt: Format) -> Format:
    """What the stored codes of an integer format are: signed, of 2, 4 or 8 bits."""
    return Integer(width(fmt)) if isinstance(fmt, Integer) else fmt
