"""`int8_matmul`: checks, the choice of a kernel, gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.checks import check_weight
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Integer
from kernels_pallas.int8_matmul import tpu, xla
from kernels_pallas.int8_matmul.reference import quantize_rows
from kernels_pallas.layouts import PORTABLE, Layout, Stored, Weight
from kernels_pallas.quantized_matmul.api import Choice, chunk_of
from kernels_pallas.quantized_matmul.gradients import gradients, no_gradient
from kernels_pallas.target import Target, current_target

WHO = "int8_matmul"


class _Problem(NamedTuple):
    """What is static about a call."""

    stored: Stored
    dtype: Any
    interpret: Any


def int8_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Integer,
    *,
    x_scale: jax.Array | None = None,
    n: int | None = None,
    groups: int | None = None,
    layout: Layout = PORTABLE,
    dtype: Any = None,
    target: Target | None = None,
    interpret: Any = False,
) -> jax.Array:
    r"""Multiply int8 activations by integer weights, summing in int32.

    .. math:: y_{mn} = s_m \sum_g s_{ng} \sum_{k \in g} q_{mk} c_{nk}

    Differentiable in `x` (straight through the rounding; zero where a given scale
    clips), in `x_scale` (the codes held fixed) and in the weight's scales.

    Args:
      x: ``float[*stack, ..., K]``, rounded here; or ``int8``, with `x_scale`.
      weight: In `layout`, ``[*stack, N, ...]``, without zero points.
      fmt: Signed integers of 2 to 8 bits. Static.
      x_scale: float32 ``[*stack, ..., 1]`` or what broadcasts to it; by default the
        largest magnitude of each row over 127.
      n: Outputs, in a layout that pads them. Static.
      groups: Groups of inputs, in a layout that pads them. Static.
      layout: How the weight lies. Static.
      dtype: Of the result; by default that of a floating `x`, else float32. Static.
      target: The device; by default the one in use. Static.
      interpret: Run a Pallas kernel by its interpreter, as `pallas_call` takes it.

    Returns:
      ``[*stack, ..., N]``. The sums of a group are exact.

    Raises:
      TypeError: If `x` is neither floating nor int8, or the words are not the layout's.
      ValueError: If the format is not of signed integers, there are zero points or
        int8 codes without a scale, or as `quantized_matmul` does.

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
    target = current_target() if target is None else target
    _check(x, weight, fmt, x_scale)
    stored = check_weight(
        WHO, x, weight, fmt, n=n, groups=groups, layout=layout, target=target
    )
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    dtype = jnp.dtype((x.dtype if floats else jnp.float32) if dtype is None else dtype)
    codes, scale, latent = _rounded(x, x_scale)
    run = functools.partial(_matmul, problem=_Problem(stored, dtype, interpret))
    for _ in range(weight.words.ndim - 2):
        run = jax.vmap(run)
    rows = lambda a: a.reshape(*weight.words.shape[:-2], -1, a.shape[-1])
    y = run(rows(latent), rows(codes), rows(scale), weight)
    return y.reshape(*x.shape[:-1], stored.n)


def choose(layout: Layout) -> Choice:
    """What `int8_matmul` runs."""
    if layout != PORTABLE:
        return Choice(layout.name, f"int8 {layout.name.upper()} kernel")
    return Choice("xla", "int8 dot")


def _check(
    x: jax.Array, weight: Weight, fmt: Integer, x_scale: jax.Array | None
) -> None:
    if not isinstance(fmt, Integer) or not fmt.signed or weight.zero is not None:
        refuse(
            WHO,
            "fmt",
            "be of signed integers without zero points",
            f"{fmt.name}, zero {'absent' if weight.zero is None else 'present'}",
            "Use quantized_matmul, which dequantizes.",
        )
    if x.dtype != jnp.int8 and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{WHO}: x must be floating or int8; got {x.dtype}. Convert it."
        )
    if x.dtype == jnp.int8 and x_scale is None:
        refuse(WHO, "x_scale", "be given with int8 codes", None, "See quantize_rows.")


def _rounded(
    x: jax.Array, x_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales, and what the gradient of the inputs goes to."""
    if x.dtype == jnp.int8:
        assert x_scale is not None
        scale = jnp.broadcast_to(x_scale, (*x.shape[:-1], 1)).astype(jnp.float32)
        return x, scale, jnp.zeros(x.shape, jnp.float32)
    codes, scale = quantize_rows(jax.lax.stop_gradient(x), x_scale)
    if x_scale is None:
        return codes, scale, x
    inside = jnp.abs(x).astype(jnp.float32) <= 127.0 * scale
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
    stored, dtype, interpret = problem
    if stored.layout == PORTABLE:
        y = xla.int8_matmul(codes, scale, weight, stored.fmt)
    else:
        y = tpu.int8_matmul(codes, scale, weight, stored.fmt, interpret=interpret)
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
    chunk = chunk_of(stored.n, stored.k)
    plain = codes.astype(jnp.float32)
    dx, dw = gradients(dy, plain * scale, weight, stored, chunk=chunk)
    dscale = (dx * plain).sum(-1, keepdims=True)
    return dx.astype(latent.dtype), no_gradient(codes), dscale, dw


_matmul.defvjp(_forward, _backward)
