"""What `codebook_matmul` refuses, before anything is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.codebook_matmul.layout import CodebookWeight, vectors
from kernels_pallas.errors import refuse
from kernels_pallas.formats import Integer
from kernels_pallas.layouts import PORTABLE, Layout
from kernels_pallas.target import Target

WHO = "codebook_matmul"


def check_types(
    x: jax.Array, weight: CodebookWeight, layout: Layout, target: Target
) -> None:
    """Raise for dtypes and layouts that do not fit."""
    for name, array in (("x", x), ("codebooks", weight.codebooks)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{WHO}: {name} must be floating; got {array.dtype}. Convert by astype."
            )
    if layout != PORTABLE and (layout.name, target.platform) != ("tpu", "tpu"):
        refuse(
            WHO,
            "layout",
            "be portable, or the TPU's on a TPU",
            f"{layout.name!r} on {target.kind!r}",
            "Undo it by kernels_pallas.codebook_matmul.unpack.",
        )
    if weight.words.dtype != layout.dtype:
        raise TypeError(
            f"{WHO}: words of the {layout.name} layout must be {layout.dtype}; got "
            f"{weight.words.dtype}. Pack codes by kernels_pallas.packing, then "
            "kernels_pallas.codebook_matmul.repack."
        )


def check_shapes(
    x: jax.Array, weight: CodebookWeight, bits: int, n: int | None, layout: Layout
) -> int:
    """The number of outputs, or an error."""
    words, codebooks, scale = weight
    if not 1 <= bits <= 8:
        refuse(WHO, "bits", "be 1 to 8", bits, "A code has at most 256 entries.")
    if words.ndim < 3:
        refuse(
            WHO,
            "words",
            "have axes for outputs, codes that are added, and packed sub-vectors",
            words.shape,
            "Add an axis of size 1 for one code a sub-vector.",
        )
    outputs = words.shape[-3 if layout == PORTABLE else -1]
    n, stack = n or outputs, words.shape[:-3]
    if codebooks.ndim != words.ndim + 1:
        refuse(
            WHO,
            "codebooks",
            f"be [*stack, B, A, E, d] for words of shape {words.shape}",
            codebooks.shape,
            "Add axes of size 1 for one block of inputs and one code a sub-vector.",
        )
    count = vectors(weight, x.shape[-1])
    _check_codebooks(codebooks.shape, count, bits)
    _check_words(words.shape, codebooks.shape[-3], n, count, bits, layout)
    if x.shape[: len(stack)] != stack or codebooks.shape[:-4] != stack:
        refuse(
            WHO,
            "x and codebooks",
            f"begin with the weight's stack {stack}",
            f"{x.shape} and {codebooks.shape}",
            "Move the stack to the front, or use jax.vmap.",
        )
    if scale is not None and scale.shape != (*stack, outputs):
        refuse(WHO, "scale", f"be {(*stack, outputs)}", scale.shape, "One an output.")
    return n


def _check_codebooks(shape: tuple[int, ...], count: int, bits: int) -> None:
    blocks, _, entries, d = shape[-4:]
    if entries > 2**bits:
        refuse(
            WHO,
            "codebooks",
            f"have at most {2**bits} entries for codes of {bits} bits",
            entries,
            "Raise bits, up to 8.",
        )
    if count % blocks:
        refuse(
            WHO,
            "codebooks",
            f"have a number of blocks that divides the {count} sub-vectors of {d}",
            blocks,
            "Blocks are consecutive sub-vectors of equal number.",
        )


def _check_words(
    shape: tuple[int, ...], books: int, n: int, count: int, bits: int, layout: Layout
) -> None:
    a, b = layout.words_shape(n, count, 1, Integer(bits))
    wanted = (a, books, b) if layout == PORTABLE else (books, a, b)
    if shape[-3:] != wanted:
        refuse(
            WHO,
            "words",
            f"be [*stack, {', '.join(map(str, wanted))}] for {n} outputs, {count} "
            f"sub-vectors of {books} codes of {bits} bits in the {layout.name} layout",
            shape,
            "Check that x has the inputs that the weight was packed for.",
        )
