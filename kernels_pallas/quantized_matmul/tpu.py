"""``x @ dequantize(w)`` on TPU: codes are decoded in fast memory, block by block.

Products are bfloat16 for bfloat16 x, and float32 (``precision=HIGHEST``, six passes)
for float32 x; sums are float32, across the blocks of K too.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import _tpu_decode as decode
from kernels_pallas.checks import check_sides
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format, Table
from kernels_pallas.layouts import Weight, signed_zero, width
from kernels_pallas.quantized_matmul._tpu_blocks import (
    RESIDENT_BYTES,
    SUBLANES,
    Blocks,
    blocks_for,
    k_unit,
)

_NAME = "quantized_matmul (TPU)"


def quantized_matmul(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Multiply by a quantized weight in the TPU layout.

    Args:
      x: ``bfloat16`` or ``float32`` ``[M, K]``, any M >= 1.
      weight: In `layouts.TPU`: ``int32[K' B / 32, N']`` words, ``float32[G', N']``
        scale and zero; ``K' >= K``.
      fmt: What its codes stand for; tables of at most 16 entries. Static.
      out_dtype: Of the result. Static.
      blocks: What one grid step works on; by default `blocks_for`. Static.
      interpret: Run on a CPU: True, or the parameters of the TPU interpreter. Static.

    Returns:
      ``out_dtype[M, N']``. With ``blocks.scale_after`` each product of bfloat16 x is
      exact but for tables, whose entries are rounded to bfloat16; else the scaled
      weight is rounded to bfloat16.

    Raises:
      TypeError: If x is neither ``bfloat16`` nor ``float32``.
      ValueError: If shapes or blocks do not fit together.
      NotImplementedError: For a table of more than 16 entries.

    References:
      Frantar et al., `MARLIN <https://arxiv.org/abs/2408.11743>`_, 2024, for the aim:
      a weight-only matmul at the rate of the memory.
    """
    check(x, weight, fmt)
    rows, inputs = x.shape[0], weight.words.shape[0] * 32 // width(fmt)
    groups, outputs = weight.scale.shape
    blocks = blocks or blocks_for(rows, outputs, inputs, fmt, groups)
    blocks = _clipped(blocks, rows, outputs, inputs, groups)
    x = jnp.pad(x, ((0, -rows % SUBLANES), (0, inputs - x.shape[1])))
    weight = weight._replace(zero=signed_zero(weight, fmt))
    call = _call(x, weight, fmt, jnp.dtype(out_dtype), blocks, interpret)
    return call(x, *(a for a in weight if a is not None))[:rows]


def check(x: jax.Array, weight: Weight, fmt: Format) -> None:
    """Raise what `quantized_matmul` says it raises of its operands."""
    bits, words = width(fmt), weight.words
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"{_NAME}: x must be bfloat16 or float32; got {x.dtype}. Convert it."
        )
    if isinstance(fmt, Table) and fmt.bits > decode.TABLE_BITS:
        raise NotImplementedError(
            f"{_NAME}: fmt must be a table of at most {2**decode.TABLE_BITS} entries; "
            f"got {len(fmt.values)}. Keep the weight in the portable layout."
        )
    if x.ndim != 2 or not x.size:
        refuse(_NAME, "x", "be [M, K], neither of them 0", x.shape, "Flatten it.")
    inputs, outputs = words.shape[0] * 32 // bits, words.shape[1]
    if words.dtype != jnp.int32 or x.shape[1] > inputs:
        rule = f"be int32[K' {bits} / 32, N'], K' >= {x.shape[1]}"
        got = f"{words.dtype}{list(words.shape)}"
        refuse(_NAME, "weight.words", rule, got, "Pack by layouts.repack(to=TPU).")
    check_sides(_NAME, weight, inputs, outputs)


def _clipped(blocks: Blocks, m: int, n: int, k: int, groups: int) -> Blocks:
    """`blocks`, none larger than the (padded) whole."""
    wholes = {"m": m + -m % SUBLANES, "n": n, "k": k}
    units = {"m": SUBLANES, "n": decode.LANES, "k": k_unit(k, groups)}
    sizes = {name: min(getattr(blocks, name), wholes[name]) for name in wholes}
    for name, size in sizes.items():
        if size != wholes[name] and (size < 1 or size % units[name]):
            rule = f"be a multiple of {units[name]}, or all of {wholes[name]}"
            refuse(_NAME, f"blocks.{name}", rule, size, "Leave it to blocks_for.")
    return dataclasses.replace(blocks, **sizes)


def _call(
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    out_dtype: jnp.dtype,
    blocks: Blocks,
    interpret: bool | pltpu.InterpretParams,
):
    """The `pl.pallas_call` over (M, N, K) blocks, K innermost."""
    (rows, inputs), (groups, outputs) = x.shape, weight.scale.shape
    m, n, k = blocks.m, blocks.n, blocks.k
    resident = m * inputs * x.dtype.itemsize <= RESIDENT_BYTES
    side = pl.BlockSpec(
        (max(1, groups * k // inputs), n), lambda i, j, l: (l if groups > 1 else 0, j)
    )
    kernel = functools.partial(
        _kernel, fmt=fmt, inputs=inputs, group=inputs // groups, blocks=blocks
    )
    return pl.pallas_call(
        kernel,
        name=f"quantized_matmul_{fmt.name}",
        out_shape=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
        grid=(pl.cdiv(rows, m), pl.cdiv(outputs, n), pl.cdiv(inputs, k)),
        in_specs=[
            pl.BlockSpec((m, inputs), lambda i, j, l: (i, 0))
            if resident
            else pl.BlockSpec((m, k), lambda i, j, l: (i, l)),
            pl.BlockSpec((k * width(fmt) // 32, n), lambda i, j, l: (l, j)),
            *[side] * (1 if weight.zero is None else 2),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, l: (i, j)),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )


def _kernel(x_ref, words_ref, scale_ref, *refs, fmt, inputs, group, blocks) -> None:
    """Add one block of K to the sum, and write it out after the last."""
    *zero_ref, out_ref, sum_ref = refs
    step = pl.program_id(2)
    last = step == pl.num_programs(2) - 1
    sides = (scale_ref, zero_ref[0] if zero_ref else None)
    accumulate(
        x_ref,
        words_ref,
        sides,
        sum_ref,
        step,
        fmt=fmt,
        inputs=inputs,
        group=group,
        blocks=blocks,
    )

    @pl.when(last)
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def accumulate(
    x_ref, words_ref, sides, sum_ref, step, *, fmt, inputs, group, blocks
) -> None:
    """Add block `step` of K to a sum, which the first one clears.

    Args:
      x_ref: ``[m, k]``, or all of K.
      words_ref: ``int32[k B / 32, n]``.
      sides: Refs of scales and zero points (or None), ``float32[groups, n]``.
      sum_ref: ``float32[m, n]``.
      step: Number of the block.
      fmt: What the codes stand for.
      inputs: ``K'``.
      group: Inputs of a group.
      blocks: ``k``, and when to scale.
    """

    @pl.when(step == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(length: int) -> None:
        whole = x_ref.shape[1] != blocks.k
        start = pl.multiple_of(step * blocks.k, decode.LANES) if whole else 0
        x = x_ref[:, pl.ds(start, length)]
        words = words_ref[: length * width(fmt) // 32]
        multiply = _scaled_after if blocks.scale_after else _scaled_before
        sum_ref[...] += multiply(x, words, *sides, fmt=fmt, group=min(group, length))

    tail = inputs % blocks.k
    if tail:
        last = step == inputs // blocks.k
        pl.when(~last)(lambda: add(blocks.k))
        pl.when(last)(lambda: add(tail))
    else:
        add(blocks.k)


def _scaled_after(x, words, scale_ref, zero_ref, *, fmt, group) -> jax.Array:
    """``sum_g scale_g (x_g @ code_g - zero_g sum(x_g))``."""
    total = jnp.zeros((x.shape[0], words.shape[1]), jnp.float32)
    for i, piece in enumerate(_split(words, group * width(fmt) // 32)):
        scale, zero = _sides(scale_ref, zero_ref, i, decode.unit(fmt))
        inputs = x[:, i * group : (i + 1) * group]
        product = _dot(inputs, decode.values(piece, fmt, dtype=x.dtype))
        if zero is not None:
            inputs = inputs.astype(jnp.float32)
            product -= jnp.sum(inputs, axis=1, keepdims=True) * zero
        total += product * scale
    return total


def _scaled_before(x, words, scale_ref, zero_ref, *, fmt, group) -> jax.Array:
    """``x @ (scale (code - zero))``."""
    scaled = []
    for i, piece in enumerate(_split(words, group * width(fmt) // 32)):
        scale, zero = _sides(scale_ref, zero_ref, i, decode.unit(fmt))
        w = decode.values(piece, fmt, dtype=x.dtype).astype(jnp.float32)
        scaled.append(((w if zero is None else w - zero) * scale).astype(x.dtype))
    return _dot(x, jnp.concatenate(scaled, axis=0))


def _sides(scale_ref, zero_ref, i: int, unit: float):
    """Scale and zero point of group `i`, ``float32[1, n]``, for multiples of `unit`."""
    row = slice(i, i + 1)
    zero = None if zero_ref is None else zero_ref[row] * (1 / unit)
    return scale_ref[row] * unit, zero


def _split(words: jax.Array, rows: int) -> list[jax.Array]:
    """The words of each group: decoded whole, a block costs 1.4x the cycles on v5e."""
    return [words[i : i + rows] for i in range(0, words.shape[0], rows)]


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
