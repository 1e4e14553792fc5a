"""Weight-only matmul by plain XLA: what runs on a CPU, and where no kernel fits.

On a CPU the weight is dequantized some rows at a time. (A whole dense weight is slow
there not for the arithmetic but because its buffer is new at every call, and every page
of it faults.) Codes of less than 8 bits are taken apart by planes, the first codes of
all bytes, the second ones, and so on; each plane is multiplied with its own inputs,
which saves putting the codes side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from kernels_pallas import packing
from kernels_pallas.chunks import map_rows, sum_rows
from kernels_pallas.formats import Format
from kernels_pallas.layouts import Weight


def quantized_matmul(
    x: jax.Array, weight: Weight, fmt: Format, *, chunk: int | None = None
) -> jax.Array:
    """``x @ dequantize(weight).T``.

    Args:
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What its codes stand for. Static.
      chunk: Weights to dequantize at a time; None for all. Static.

    Returns:
      ``float32[M, N]``.
    """
    k = x.shape[-1]
    parts = _parts(x.astype(jnp.float32), weight, fmt)

    def rows(weight: Weight) -> jax.Array:
        whole = weight.scale.shape[-1] == 1
        dense = _values(weight, fmt, k) if whole else _scaled(weight, fmt, k)
        y = _total(_dot(w, x, 1) for w, x in zip(dense, parts, strict=True))
        return y * weight.scale.astype(jnp.float32) if whole else y

    return map_rows(rows, weight, _at_once(weight, k, chunk)).T


def input_gradient(
    dy: jax.Array, weight: Weight, fmt: Format, *, k: int, chunk: int | None = None
) -> jax.Array:
    """``dy @ dequantize(weight)``.

    Args:
      dy: ``float[M, N]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What its codes stand for. Static.
      k: Inputs. Static.
      chunk: As for `quantized_matmul`.

    Returns:
      ``float32[M, K]``.
    """

    def rows(part: tuple[Weight, jax.Array]) -> list[jax.Array]:
        weight, dy = part
        return [_dot(dy, w, 0) for w in _scaled(weight, fmt, k)]

    rows_of = (weight, dy.astype(jnp.float32).T)
    parts = sum_rows(rows, rows_of, _at_once(weight, k, chunk))
    dx = jnp.stack(parts, axis=-1)
    return dx.reshape(dx.shape[0], -1)[:, :k]


def scale_gradients(
    dy: jax.Array,
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    chunk: int | None = None,
) -> Weight:
    """Cotangents of the scales and zero points.

    Args:
      dy: ``float[M, N]``.
      x: ``float[M, K]``.
      weight: In the portable layout, ``[N, K]``.
      fmt: What its codes stand for. Static.
      chunk: As for `quantized_matmul`.

    Returns:
      float32 cotangents in the place of scale and zero, words as they are.
    """
    k, groups = x.shape[-1], weight.scale.shape[-1]
    parts = _parts(x.astype(jnp.float32), weight, fmt)

    def rows(part: tuple[Weight, jax.Array]) -> jax.Array:
        weight, dy = part
        values = _planes(weight, fmt, k)
        dw = [_dot(dy, x.T, 1) for x in parts]
        grouped = [d.reshape(*d.shape[:1], groups, -1) for d in dw]
        sums = _total((d * v).sum(-1) for d, v in zip(grouped, values, strict=True))
        return jnp.stack([sums, _total(d.sum(-1) for d in grouped)], axis=1)

    rows_of = (weight, dy.astype(jnp.float32).T)
    found = map_rows(rows, rows_of, _at_once(weight, k, chunk))
    dscale = found[:, 0].astype(weight.scale.dtype)
    if weight.zero is None:
        return weight._replace(scale=dscale)
    dzero = -found[:, 1] * weight.scale
    return weight._replace(scale=dscale, zero=dzero.astype(weight.zero.dtype))


def _at_once(weight: Weight, k: int, chunk: int | None) -> int:
    """Rows of a chunk."""
    return weight.words.shape[0] if chunk is None else max(1, chunk // k)


def _total(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contract the same axis of two matrices."""
    dims = (((axis,), (axis,)), ((), ()))
    highest = jax.lax.Precision.HIGHEST
    product = functools.partial(jax.lax.dot_general, dimension_numbers=dims)
    # On a CPU all float32 products are exact, and slower if told so.
    return jax.lax.platform_dependent(
        a, b, cpu=product, default=functools.partial(product, precision=highest)
    )


def _per(weight: Weight, fmt: Format, k: int) -> int:
    """Planes: codes after which the phase in a byte repeats, if groups allow it."""
    per = packing.period(fmt.bits)
    groups = weight.scale.shape[-1]
    return per if groups == 1 or k // groups % per == 0 else 1


def _parts(x: jax.Array, weight: Weight, fmt: Format) -> list[jax.Array]:
    """The inputs of each plane, ``[M, K / planes]``."""
    per = _per(weight, fmt, x.shape[-1])
    x = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % per)))
    return [x[:, i::per] for i in range(per)]


def _planes(weight: Weight, fmt: Format, k: int) -> list[jax.Array]:
    """Values before their scale, ``float32[rows, G, ...]`` for each plane."""
    per = _per(weight, fmt, k)
    if per == 1:
        planes = [packing.unpack(weight.words, bits=fmt.bits, count=k)]
    else:
        planes = packing.planes(weight.words, bits=fmt.bits, count=-(-k // per) * per)
    values = [fmt.decode(p).reshape(*weight.scale.shape, -1) for p in planes]
    if weight.zero is None:
        return values
    return [v - weight.zero.astype(jnp.float32)[..., None] for v in values]


def _values(weight: Weight, fmt: Format, k: int) -> list[jax.Array]:
    return [v.reshape(v.shape[0], -1) for v in _planes(weight, fmt, k)]


def _scaled(weight: Weight, fmt: Format, k: int) -> list[jax.Array]:
    scale = weight.scale.astype(jnp.float32)[..., None]
    return [(v * scale).reshape(scale.shape[0], -1) for v in _planes(weight, fmt, k)]
