"""The H200 kernel of `quantized_matmul`: what a block of threads does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from kernels_pallas import _gpu_words
from kernels_pallas._gpu_words import BLOCK
from kernels_pallas.layouts import width

from . import _gpu_decode, _gpu_meaning, _gpu_registers
from ._gpu_config import Problem

plgpu: Any = mosaic_gpu
"""Of jax 0.11; the oldest supported one has other signatures."""
_PRODUCER_REGISTERS = 40


def launch(problem: Problem, interpret: Any) -> Callable[..., jax.Array]:
    """The kernel as a function of ``(x, words, scale[, zero])``.

    Returns:
      ``out_dtype[split_k, M', N']``, parts to be summed.
    """
    p = problem
    tiled = _tiled(p.depth)
    scratch = {
        "out_smem": plgpu.SMEM((p.config.strips, p.config.tile_m, BLOCK), p.out_dtype),
        "met": plgpu.Barrier(num_arrivals=p.consumers, num_barriers=1),
    }
    if p.config.splits > 1:
        shape = (p.consumers - p.config.strips, BLOCK, p.config.tile_m)
        scratch["sum_smem"] = plgpu.SMEM(shape, jnp.float32)
    if p.zeros:
        scratch["ones"] = plgpu.SMEM((BLOCK, p.depth), p.dtype, transforms=tiled)
    if p.staged:
        shape = (p.consumers, BLOCK, p.depth)
        scratch["a_smem"] = plgpu.SMEM(shape, p.dtype, transforms=tiled)
    _, rows, n = p.out_shape
    return plgpu.kernel(
        functools.partial(_body, problem),
        out_type=jax.ShapeDtypeStruct(p.out_shape, p.out_dtype),
        grid=(
            n // (p.config.strips * BLOCK),
            -(-rows // p.config.tile_m),
            p.config.split_k,
        ),
        grid_names=("n", "m", "k"),
        num_threads=p.consumers + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )


def _tiled(columns: int) -> tuple[Any, ...]:
    """How wgmma wants 16-bit operands to lie, `columns` inputs at a time."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)


def _body(p: Problem, *refs: Any, **scratch: Any) -> None:
    """One tile of the result, or a part of it."""
    *inputs, out = refs
    n, m, part = (jax.lax.axis_index(name) for name in ("n", "m", "k"))
    zero = jnp.int32(0) if p.staged else _gpu_registers.zero(inputs[0])
    run = Consumer(p, jax.lax.axis_index("wg"), zero, scratch)

    def epilogue(total: jax.Array) -> None:
        rows = pl.ds(m * p.config.tile_m, p.config.tile_m)
        columns = pl.ds(n * p.config.strips * BLOCK, p.config.strips * BLOCK)
        run.store(total, out.at[part, rows, columns])

    def compute(pipeline: Callable[[Any], Any]) -> None:
        if p.zeros:
            run.prepare()
        if p.group is not None:
            epilogue(pipeline(run.zeros()))
            return
        scale, *zero = inputs[2:]
        rows = pl.ds((n * p.config.strips + run.strip) * BLOCK, BLOCK)
        side = [_row(a.at[0, rows], p) for a in (scale, *zero)]
        epilogue(run.channels(pipeline, side))

    plgpu.emit_pipeline_warp_specialized(
        run.step,
        grid=(p.steps,),
        in_specs=_specs(p, n, m, part),
        max_concurrent_steps=p.config.stages,
        memory_registers=_PRODUCER_REGISTERS,
        wg_axis="wg",
        num_compute_wgs=p.consumers,
        compute_context=compute,
    )(*(inputs if p.group is not None else inputs[:2]))


def _specs(p: Problem, n: Any, m: Any, part: Any) -> list[Any]:
    """What the stages of the pipeline hold: x, words and, of groups, their scales."""
    at = lambda step: part * p.steps + step
    x = plgpu.BlockSpec(
        (p.config.tile_m, p.config.tile_k),
        lambda step: (m, at(step)),
        transforms=_tiled(p.depth),
    )
    blocks = p.config.tile_k // BLOCK
    words = plgpu.BlockSpec(
        (p.config.strips, blocks, width(p.fmt), _gpu_words.THREADS),
        lambda step: (n, at(step), 0, 0),
    )
    if p.group is None:
        return [x, words]
    groups, each = (
        max(p.config.tile_k // p.group, 1),
        max(p.group // p.config.tile_k, 1),
    )
    side = plgpu.BlockSpec(
        (groups, p.config.strips * BLOCK),
        lambda step: (jax.lax.div(at(step), jnp.int32(each)), n),
    )
    return [x, words, side] + [side] * p.zeros


def _row(ref: Any, p: Problem) -> jax.Array:
    """One float for each output, as a factor of ``float32[64, tile_m]``."""
    row = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return jax.lax.broadcast_in_dim(row, (BLOCK, p.config.tile_m), [0])


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A warpgroup that multiplies: its strip, and its share of a stage's inputs."""

    p: Problem
    index: Any
    zero: jax.Array
    memory: Mapping[str, Any]

    @property
    def strip(self) -> Any:
        """Of the block's strips of 64 outputs."""
        return jax.lax.rem(self.index, jnp.int32(self.p.config.strips))

    @property
    def split(self) -> Any:
        """Of the warpgroups that share a strip."""
        return jax.lax.div(self.index, jnp.int32(self.p.config.strips))

    def zeros(self) -> jax.Array:
        """``float32[64, tile_m]``, outputs by rows of x."""
        shape = (BLOCK, self.p.config.tile_m)
        zeros = jnp.full(shape, 0.0, jnp.float32)
        return plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)

    def channels(
        self, pipeline: Callable[[Any], Any], side: list[jax.Array]
    ) -> jax.Array:
        """With one scale for each output: products of all inputs, then the scale."""
        return _scaled(self.accumulated(lambda *into: pipeline(into)), side)

    def accumulators(self) -> list[Any]:
        """Of the products and, where there are zero points, of x itself."""
        shape = (BLOCK, self.p.config.tile_m)
        return [plgpu.WGMMAAccumulatorRef(shape, jnp.float32)] * (1 + self.p.zeros)

    def step(self, indices: Any, x: Any, words: Any, *rest: Any) -> Any:
        """One stage."""
        del indices
        p, (*sides, carry) = self.p, rest
        share = p.config.tile_k // p.config.splits
        first = self.split * share
        if p.group is None:
            self.multiply(x, words, first, share, carry)
            plgpu.wgmma_wait(0)
            return carry
        for offset in range(0, share, max(p.chunk, BLOCK)):
            for parts, group in self.groups(x, words, first + offset):
                rows = pl.ds(self.strip * BLOCK, BLOCK)
                side = [_row(s.at[group, rows], p) for s in sides]
                carry += _scaled(parts, side)
        if p.staged:
            # The interpreter orders these reads and the next copies by a fence only.
            plgpu.commit_smem()
        return carry

    def groups(self, x: Any, words: Any, start: Any) -> Iterator[tuple[list, Any]]:
        """Sums of products of single scales from `start` on, and which scale it is."""
        p = self.p
        assert p.group is not None
        index = lambda at: jax.lax.div(at, jnp.int32(p.group))
        if p.depth == BLOCK:
            multiply = lambda *into: self.multiply(x, words, start, p.chunk, into)
            group = index(start) if p.group < p.config.tile_k else 0
            yield self.accumulated(multiply), group
            return
        a = self.operand(self.block(words, start))
        for half in range(0, BLOCK, p.depth):
            part = a[:, half : half + p.depth]
            b = x.at[:, pl.ds(start + half, p.depth)].T
            multiply = lambda *into, a=part, b=b: self.wgmma(into, a, b)
            yield self.accumulated(multiply), index(start + half)

    def accumulated(self, multiply: Callable[..., None]) -> list[jax.Array]:
        """What `multiply` adds to new accumulators."""

        def scope(*accumulators: Any) -> list[jax.Array]:
            multiply(*accumulators)
            return [a[...] for a in accumulators]

        return pl.run_scoped(scope, *self.accumulators())

    def multiply(self, x: Any, words: Any, start: Any, count: int, into: Any) -> None:
        """Add the products of `count` inputs of a stage, from `start` on."""
        for block in range(0, count, BLOCK):
            at = start + block
            b = x.at[:, pl.ds(at, BLOCK)].T
            self.wgmma(into, self.operand(self.block(words, at)), b)

    def block(self, words: Any, start: Any) -> Any:
        """The block of codes at an input of the stage."""
        return words.at[self.strip, jax.lax.div(start, jnp.int32(BLOCK))]

    def operand(self, words: Any) -> jax.Array:
        """The values of a block of codes."""
        p = self.p
        return _gpu_decode.decode(
            words[...] if p.staged else _gpu_registers.load(words),
            p.fmt,
            p.dtype,
            assemble=self.registers.fragment,
            permute=self.registers.permute_bytes,
            zero=self.zero,
        )

    @property
    def registers(self) -> Any:
        """The operations on registers, or what they mean."""
        return _gpu_meaning if self.p.staged else _gpu_registers

    def wgmma(self, into: Any, a: jax.Array, b: Any) -> None:
        """Add ``a @ b``, and sums over b where zero points need them."""
        if self.p.staged:
            staging = self.memory["a_smem"].at[self.index]
            staging[...] = a
            plgpu.commit_smem()
            plgpu.wgmma(into[0], staging, b)
        else:
            plgpu.wgmma(into[0], a, b)
        if self.p.zeros:
            plgpu.wgmma(into[1], self.memory["ones"], b)

    def prepare(self) -> None:
        """Write the ones that sum over x."""
        ones = self.memory["ones"]

        @pl.when(self.index == 0)
        def _() -> None:
            value = jnp.full(ones.shape, 1.0, ones.dtype)
            ones[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA)
            plgpu.commit_smem()

        self.meet()

    def meet(self) -> None:
        """Wait for the other warpgroups that multiply."""
        plgpu.barrier_arrive(self.memory["met"])
        plgpu.barrier_wait(self.memory["met"])

    def store(self, total: jax.Array, out: Any) -> None:
        """Sum over the warpgroups of a strip, then write the tile."""
        p = self.p
        if p.config.splits > 1:
            total = self.reduce(total, self.memory["sum_smem"])

        @pl.when(self.split == 0)
        def _() -> None:
            tile = self.memory["out_smem"].at[self.strip]
            turned = plgpu.layout_cast(
                total.astype(p.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.store(tile.T, turned, optimized=False)
            plgpu.commit_smem()
            columns = pl.ds(self.strip * BLOCK, BLOCK)
            plgpu.copy_smem_to_gmem(tile, out.at[:, columns])
            plgpu.wait_smem_to_gmem(0)

    def reduce(self, total: jax.Array, sum_smem: Any) -> jax.Array:
        """The sum over the splits, for the first of them."""
        strips, splits = self.p.config.strips, self.p.config.splits

        @pl.when(self.split > 0)
        def _() -> None:
            plgpu.store(sum_smem.at[self.index - strips], total, optimized=False)

        self.meet()
        for split in range(splits - 1):
            part = sum_smem.at[self.strip + split * strips]
            total += plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
        return total


def _scaled(parts: list[jax.Array], side: list[jax.Array]) -> jax.Array:
    """``(products - zero * sums) * scale``."""
    products = parts[0] if len(parts) == 1 else parts[0] - side[1] * parts[1]
    return products * side[0]
