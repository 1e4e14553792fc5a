"""The kernels to compile ahead of time, with the shapes of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import formats
from kernels_pallas.aot._dense import dense_matmul
from kernels_pallas.block_sparse_matmul import BlockSparse
from kernels_pallas.block_sparse_matmul import tpu as block_sparse
from kernels_pallas.codebook_matmul import CodebookWeight
from kernels_pallas.codebook_matmul import tpu as codebook
from kernels_pallas.formats import Format
from kernels_pallas.hashed_matmul import Hashing
from kernels_pallas.hashed_matmul import tpu as hashed
from kernels_pallas.layouts import GPU, TPU, Layout, Weight
from kernels_pallas.nm_sparse_matmul import NMSparse
from kernels_pallas.nm_sparse_matmul import tpu as nm_sparse
from kernels_pallas.quantized_matmul import gpu, tpu
from kernels_pallas.ragged_quantized_matmul import tpu as ragged
from kernels_pallas.scaled_matmul import tpu as scaled
from kernels_pallas.scaled_matmul.rows import operand_dtype

TPU_SIZE, GPU_SIZE = 4096, 8192
EXPERTS = 8


class Case(NamedTuple):
    """A kernel and the arguments to compile it for.

    Attributes:
      fn: Of activations and the arrays of a weight.
      args: Shapes and dtypes of the arguments, the activations first.
    """

    fn: Callable[..., Any]
    args: tuple[jax.ShapeDtypeStruct, ...]


def cases(platform: str) -> dict[str, Case]:
    """Every kernel of ``"tpu"`` or ``"gpu"``, by what the table calls it.

    On TPU a weight of 4096 x 4096 (eight of 1024 x 4096 for experts) meets 16 rows
    unless said; on a GPU of 8192 x 8192, as many rows as said.
    """
    return dict(_tpu() if platform == "tpu" else _gpu())


def _tpu() -> Iterator[tuple[str, Case]]:
    dense = _of((16, TPU_SIZE)), _of((TPU_SIZE, TPU_SIZE))
    yield "bfloat16", Case(dense_matmul, dense)
    for name, fmt, group in (
        *(("W4A16", formats.INT4, group) for group in (None, 32, 64, 128, 256)),
        *(("W8A16", formats.INT8, group) for group in (None, 128)),
        ("W4A16 zero points", formats.UINT4, 128),
        ("W3A16", formats.INT3, 128),
        ("W2A16", formats.INT2, 128),
        ("NF4A16", formats.NF4, 64),
        ("MXFP4A16", formats.FP4_E2M1, 32),
        ("FP8A16 e4m3", formats.FP8_E4M3, None),
        ("FP8A16 e5m2", formats.FP8_E5M2, None),
    ):
        yield _weight_only(name, fmt, group, rows=16, layout=TPU)
    for rows in (1, 128, 512):
        yield _weight_only("W4A16", formats.INT4, 128, rows=rows, layout=TPU)
    for name, fmt in (
        ("W8A8", formats.INT8),
        ("W4A8", formats.INT4),
        ("FP8 FP8", formats.FP8_E4M3),
    ):
        yield f"{name} channel, 32 rows", _scaled(fmt)
    yield "ragged W4A16 g128, 256 rows", _ragged()
    yield "codebook d=1 E=256", _codebook(d=1)
    yield "codebook d=8 E=256", _codebook(d=8)
    yield "hashed element, 256 buckets", _hashed((1, 1), 256)
    yield "hashed blocks 128 x 128", _hashed((128, 128), 2**18)
    yield "block-sparse 128 x 128, a tenth", _block_sparse()
    yield "2:4 bfloat16", _nm_sparse()


def _gpu() -> Iterator[tuple[str, Case]]:
    for name, fmt, group, rows in (
        *(("W4A16", formats.INT4, 128, rows) for rows in (1, 16, 32, 64, 256)),
        ("W4A16", formats.INT4, 32, 16),
        ("W4A16", formats.INT4, None, 16),
        ("W4A16 zero points", formats.UINT4, 128, 16),
        ("W8A16", formats.INT8, 128, 16),
        ("W8A16", formats.INT8, None, 16),
        ("W8A16", formats.INT8, 128, 256),
        ("W3A16", formats.INT3, 128, 16),
        ("W2A16", formats.INT2, 128, 16),
        ("NF4A16", formats.NF4, 64, 16),
        ("MXFP4A16", formats.FP4_E2M1, 32, 16),
        ("FP8A16 e4m3", formats.FP8_E4M3, None, 16),
        ("FP8A16 e5m2", formats.FP8_E5M2, None, 16),
    ):
        yield _weight_only(name, fmt, group, rows=rows, layout=GPU)


def _of(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _weight(fmt: Format, group: int | None, size: int, layout: Layout) -> Weight:
    """Shapes of the arrays of a weight ``[size, size]``, unsigned with zero points."""
    groups = 1 if group is None else size // group
    words = _of(layout.words_shape(size, size, groups, fmt), layout.dtype)
    side = _of((groups, size), jnp.float32)
    unsigned = isinstance(fmt, formats.Integer) and not fmt.signed
    return Weight(words, side, side if unsigned else None)


def _weight_only(
    name: str, fmt: Format, group: int | None, *, rows: int, layout: Layout
) -> tuple[str, Case]:
    on_tpu = layout == TPU
    size = TPU_SIZE if on_tpu else GPU_SIZE
    multiply = tpu.quantized_matmul if on_tpu else gpu.quantized_matmul
    weight = _weight(fmt, group, size, layout)

    def run(x: jax.Array, *arrays: jax.Array) -> jax.Array:
        return multiply(x, Weight(*arrays), fmt, out_dtype=x.dtype)

    grain = "channel" if group is None else f"g{group}"
    arrays = tuple(a for a in weight if a is not None)
    case = Case(run, (_of((rows, size)), *arrays))
    return f"{name} {grain}, {rows} row{'s' * (rows > 1)}", case


def _scaled(fmt: formats.Integer | formats.Float8) -> Case:
    weight = _weight(fmt, None, TPU_SIZE, TPU)

    def run(codes: jax.Array, words: jax.Array, side: jax.Array) -> jax.Array:
        scale = jnp.ones((codes.shape[0], 1), jnp.float32)
        return scaled.scaled_matmul(codes, scale, Weight(words, side), fmt)

    codes = _of((32, TPU_SIZE), operand_dtype(fmt))
    return Case(run, (codes, weight.words, weight.scale))


def _ragged() -> Case:
    one = _weight(formats.INT4, 128, TPU_SIZE, TPU)
    words, scale = (_of((EXPERTS, *a.shape[:-1], 1024), a.dtype) for a in one[:2])

    def run(x: jax.Array, words: jax.Array, scale: jax.Array, sizes: jax.Array) -> Any:
        weight = Weight(words, scale)
        return ragged.ragged_quantized_matmul(x, weight, sizes, formats.INT4)

    x, sizes = _of((256, TPU_SIZE)), _of((EXPERTS,), jnp.int32)
    return Case(run, (x, words, scale, sizes))


def _codebook(d: int) -> Case:
    count = TPU_SIZE // d
    words = _of((1, count // 4, TPU_SIZE), jnp.int32)
    books = _of((1, 1, 256, d), jnp.float32)
    run = lambda x, words, books: codebook.codebook_matmul(
        x, CodebookWeight(words, books), bits=8
    )
    return Case(run, (_of((16, TPU_SIZE)), words, books))


def _hashed(block: tuple[int, int], buckets: int) -> Case:
    run = lambda x, table: hashed.hashed_matmul(
        x, table, Hashing(block=block), n=TPU_SIZE
    )
    return Case(run, (_of((16, TPU_SIZE)), _of((buckets,), jnp.float32)))


def _block_sparse() -> Case:
    rows = TPU_SIZE // 128
    places = -(-rows // 10)
    values = _of((rows, places, 128, 128))
    columns = _of((rows, places), jnp.int32)
    run = lambda x, values, columns: block_sparse.block_sparse_matmul(
        x, BlockSparse(values, columns), None
    )
    return Case(run, (_of((16, TPU_SIZE)), values, columns))


def _nm_sparse() -> Case:
    groups = TPU_SIZE // 4
    values = _of((2, groups, TPU_SIZE))
    indices = _of((2, groups * 2 // 32, TPU_SIZE), jnp.int32)
    run = lambda x, values, indices: nm_sparse.nm_sparse_matmul(
        x, NMSparse(values, indices), None, n=2, m=4
    )
    return Case(run, (_of((16, TPU_SIZE)), values, indices))
