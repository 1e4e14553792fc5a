"""What the H200 kernel does register by register, where Pallas has no word for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm as llvm_dialect
from jaxlib.mlir.dialects import vector

from kernels_pallas._gpu_words import BLOCK, THREADS

plgpu: Any = mosaic_gpu
llvm: Any = llvm_dialect
"""Of jax 0.11; the oldest supported one has other signatures."""


def load(words: Any) -> jax.Array:
    """A block of words, up to 16 bytes of a thread at a time: ``int32[B, 128]``."""
    return plgpu.load(words, layout=_strided(words.shape[0]), optimized=False)


def fragment(slots: list[jax.Array], dtype: Any) -> jax.Array:
    """`_gpu_meaning.fragment` by naming registers: no instruction."""
    layout = _strided(slots[0].shape[0])
    result = plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(slots), return_type=result)
    def assemble(context: Any, *slots: Any) -> Any:
        del context
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(np.dtype(dtype)))
        single = ir.VectorType.get((1,), slots[0].mlir_dtype)
        registers = []
        for loaded in zip(*(s.registers.flat for s in slots), strict=True):
            for word in range(ir.VectorType(loaded[0].type).shape[0]):
                for value in loaded:
                    one = vector.extract_strided_slice(single, value, [word], [1], [1])
                    registers.append(vector.bitcast(pair, one))
        shape = mgpu.WGMMA_LAYOUT.registers_shape((BLOCK, BLOCK))
        return mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(shape),
            _layout=mgpu.WGMMA_LAYOUT,
            _is_signed=None,
        )

    return assemble(*(plgpu.layout_cast(slot, layout) for slot in slots))


def permute_bytes(low: jax.Array, high: jax.Array, selector: jax.Array) -> jax.Array:
    """`_gpu_meaning.permute_bytes` as the instruction ``prmt.b32``."""
    shape = max((a.shape for a in (low, high, selector)), key=len)
    layout = _strided(shape[0])
    result = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * 3, return_type=result)
    def permute(context: Any, low: Any, high: Any, selector: Any) -> Any:
        del context
        return low._pointwise(_permute_register, high, selector)

    spread = lambda a: plgpu.layout_cast(jnp.broadcast_to(a, shape), layout)
    return permute(spread(low), spread(high), spread(selector))


def _permute_register(low: Any, high: Any, selector: Any) -> Any:
    """Of each word of a vector."""
    i32 = ir.IntegerType.get_signless(32)
    result = selector
    for i in range(ir.VectorType(selector.type).shape[0]):
        words = [vector.extract(v, [], [i]) for v in (low, high, selector)]
        word = llvm.inline_asm(i32, words, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
        result = vector.insert(word, result, [], [i])
    return result


def zero(memory: Any) -> jax.Array:
    """``int32``, a zero that no compiler knows to be one: the top bit of an address."""
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def top_bit(context: Any, memory: Any) -> Any:
        del context
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(memory))
        code = "{ .reg .b64 t; shr.u64 t, $1, 63; cvt.u32.u64 $0, t; }"
        bit = llvm.inline_asm(i32, [address], code, "=r,l")
        return mgpu.FragmentedArray.splat(bit, (), is_signed=True)

    return top_bit(memory)


def _strided(bits: int) -> Any:
    return plgpu.Layout.WG_STRIDED((bits, THREADS), vec_size=min(bits, 4))
