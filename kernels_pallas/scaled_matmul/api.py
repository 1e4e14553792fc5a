"""`int8_matmul` and `fp8_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_weight
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Float8, Integer
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight
from kernels_pallas.quantized_matmul.api import chunk_of
from kernels_pallas.quantized_matmul.gradients import cotangent, gradients
from kernels_pallas.scaled_matmul import tpu, xla
from kernels_pallas.scaled_matmul.rows import largest, operand_dtype, quantize_rows
from kernels_pallas.target import Choice, Target, current_target


class _Problem(NamedTuple):
    """What is static about a call."""

    stored: Stored
    fmt: Integer | Float8
    chunk: int
    dtype: Any
    interpret: Any


def int8_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Integer,
    *,
    x_scale: jax.Array | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    r"""Multiply int8 activations by integer weights, summing in int32.

    .. math:: y_{mn} = s_m \sum_g s_{ng} \sum_{k \in g} q_{mk} c_{nk}

    Differentiable in `x` (straight through the rounding; zero where a given scale
    clips), in `x_scale` (the codes held fixed) and in the weight's scales.

    Args:
      x: ``float[*stack, ..., K]``, rounded here; or ``int8``, with `x_scale`.
      weight: ``[*stack, N, ...]``, without zero points.
      fmt: Signed integers of 2 to 8 bits. Static.
      x_scale: float32 ``[*stack, ..., 1]`` or what broadcasts to it; by default the
        largest magnitude of each row over 127.
      **options: See `Options`.

    Returns:
      ``[*stack, ..., N]``. The sums of a group are exact.

    Raises:
      TypeError: If `x` is neither floating nor int8, or the words are not the layout's.
      ValueError: If the format is not of signed integers, there are zero points or
        codes without a scale, or as `quantized_matmul` does.

    Examples:
      >>> from kernels_pallas.formats import INT4
      >>> weight = Weight(jnp.array([[0x21], [0xF3]], jnp.uint8), jnp.ones((2, 1)))
      >>> int8_matmul(jnp.array([[127.0, 10.0]]), weight, INT4).tolist()
      [[147.0, 371.0]]

    References:
      Jacob et al., `Quantization and Training of Neural Networks
      <https://arxiv.org/abs/1712.05877>`_, 2018, eq. 4 without zero points; scales a
      token: Dettmers et al., `LLM.int8() <https://arxiv.org/abs/2208.07339>`_, 2022,
      section 2.1.
    """
    if not isinstance(fmt, Integer) or not fmt.signed or weight.zero is not None:
        refuse(
            "int8_matmul",
            "fmt",
            "be of signed integers without zero points",
            f"{fmt.name}, zero {'absent' if weight.zero is None else 'present'}",
            "Use quantized_matmul, which dequantizes.",
        )
    return _scaled_matmul("int8_matmul", x, weight, fmt, x_scale, **options)


def fp8_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Float8,
    *,
    x_scale: jax.Array | None = None,
    **options: Unpack[Options],
) -> jax.Array:
    r"""Multiply fp8 activations by fp8 weights, summing in float32.

    As `int8_matmul`, with both operands in the weight's format: activations are scaled
    so that a row's largest magnitude is the format's (448 for e4m3), and rounded.

    Args:
      x: ``float[*stack, ..., K]``, rounded here; or fp8, with `x_scale`.
      weight: ``[*stack, N, ...]``, without zero points.
      fmt: `formats.FP8_E4M3` or `formats.FP8_E5M2`. Static.
      x_scale: As for `int8_matmul`.
      **options: See `Options`.

    Returns:
      ``[*stack, ..., N]``.

    Raises:
      TypeError: If `x` is neither floating nor of the format, or the words are not the
        layout's.
      ValueError: If the format is not fp8, or as `int8_matmul` does.

    Examples:
      >>> from kernels_pallas.formats import FP8_E4M3
      >>> words = jnp.array([[1.5, -2.0]], jnp.float8_e4m3fn).view(jnp.uint8)
      >>> weight = Weight(words, jnp.ones((1, 1)))
      >>> fp8_matmul(jnp.array([[448.0, 64.0]]), weight, FP8_E4M3).tolist()
      [[544.0]]

    References:
      Micikevicius et al., `FP8 Formats for Deep Learning
      <https://arxiv.org/abs/2209.05433>`_, 2022, section 3.2.
    """
    if not isinstance(fmt, Float8) or weight.zero is not None:
        refuse(
            "fp8_matmul",
            "fmt",
            "be fp8 without zero points",
            f"{fmt.name}, zero {'absent' if weight.zero is None else 'present'}",
            "Use quantized_matmul, which dequantizes.",
        )
    return _scaled_matmul("fp8_matmul", x, weight, fmt, x_scale, **options)


class Options(TypedDict, total=False):
    """What both operations take.

    Attributes:
      n: Outputs, in a layout that pads them. Static.
      groups: Groups of inputs, in a layout that pads them. Static.
      layout: How the weight lies; portable by default. Static.
      dtype: Of the result; by default that of a floating `x`, else float32. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.
    """

    n: int | None
    groups: int | None
    layout: Layout
    dtype: Any
    target: Target | None
    interpret: Any


def choose(fmt: Integer | Float8, layout: Layout) -> Choice:
    """What runs."""
    name = operand_dtype(fmt).name if isinstance(fmt, Integer) else fmt.name
    if layout != PORTABLE:
        return Choice(layout.name, f"{name} {layout.name.upper()} kernel")
    return Choice("xla", f"{name} dot")


def _scaled_matmul(
    who: str,
    x: jax.Array,
    weight: Weight,
    fmt: Integer | Float8,
    x_scale: jax.Array | None,
    *,
    n: int | None = None,
    groups: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    target = current_target() if target is None else target
    encoded = x.dtype == operand_dtype(fmt)
    if not encoded and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise TypeError(
            f"{who}: x must be float32, bfloat16, float16 or {operand_dtype(fmt)}; got "
            f"{x.dtype}. Convert it."
        )
    if encoded and x_scale is None:
        refuse(who, "x_scale", "be given with codes", None, "See quantize_rows.")
    stored = check_weight(
        who, x, weight, fmt, n=n, groups=groups, layout=layout, target=target
    )
    dtype = jnp.dtype((jnp.float32 if encoded else x.dtype) if dtype is None else dtype)
    codes, scale, latent = _rounded(x, x_scale, fmt)
    run = functools.partial(
        _matmul,
        problem=_Problem(stored, fmt, chunk_of(stored, target), dtype, interpret),
    )
    for _ in range(weight.words.ndim - 2):
        run = jax.vmap(run)
    rows = lambda a: a.reshape(*weight.words.shape[:-2], -1, a.shape[-1])
    y = run(rows(latent), rows(codes), rows(scale), weight)
    return y.reshape(*x.shape[:-1], stored.n)


def _rounded(
    x: jax.Array, x_scale: jax.Array | None, fmt: Integer | Float8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales, and what the gradient of the inputs goes to."""
    if x.dtype == operand_dtype(fmt):
        assert x_scale is not None
        scale = jnp.broadcast_to(x_scale, (*x.shape[:-1], 1)).astype(jnp.float32)
        return x, scale, jnp.zeros(x.shape, jnp.float32)
    codes, scale = quantize_rows(jax.lax.stop_gradient(x), fmt, x_scale)
    if x_scale is None:
        return codes, scale, x
    inside = jnp.abs(x).astype(jnp.float32) <= largest(fmt) * scale
    return codes, scale, jnp.where(inside, x, jax.lax.stop_gradient(x))


@functools.partial(jax.custom_vjp, nondiff_argnames=("problem",))
def _matmul(
    latent: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    weight: Weight,
    problem: _Problem,
) -> jax.Array:
    del latent
    stored, fmt, _, dtype, interpret = problem
    if stored.layout == PORTABLE:
        y = xla.scaled_matmul(codes, scale, weight, fmt)
    else:
        y = tpu.scaled_matmul(codes, scale, weight, fmt, interpret=interpret)
    return y[:, : stored.n].astype(dtype)


def _forward(
    latent: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    weight: Weight,
    problem: _Problem,
) -> Any:
    y = _matmul(latent, codes, scale, weight, problem)
    return y, (latent, codes, scale, weight)


def _backward(problem: _Problem, residuals: Any, dy: jax.Array) -> Any:
    latent, codes, scale, weight = residuals
    stored = problem.stored
    plain = codes.astype(jnp.float32)
    dx, dw = gradients(dy, plain * scale, weight, stored, chunk=problem.chunk)
    dscale = (dx * plain).sum(-1, keepdims=True)
    return dx.astype(latent.dtype), cotangent(plain * 0, codes), dscale, dw


_matmul.defvjp(_forward, _backward)
