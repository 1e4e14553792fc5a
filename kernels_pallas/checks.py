"""What every operation on a quantized weight checks before anything is traced."""

from __future__ import annotations

import jax

from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import Layout, Stored, Weight
from kernels_pallas.target import Target


def check_weight(
    who: str,
    x: jax.Array,
    weight: Weight,
    fmt: Format,
    *,
    n: int | None,
    groups: int | None,
    layout: Layout,
    target: Target,
    kernels: tuple[str, ...] = ("tpu",),
) -> Stored:
    """What is static about the weight of a matmul.

    Args:
      who: The operation, for errors.
      x: ``[*stack, ..., K]``.
      weight: In `layout`, with the same stack.
      fmt: What its codes stand for.
      n: Outputs; None for all that are stored.
      groups: Groups of inputs; None for all that are stored.
      layout: How the weight lies.
      target: The device.
      kernels: Layouts that the operation has a kernel for.

    Raises:
      TypeError: If the words are not the layout's.
      ValueError: If the layout is another device's, shapes disagree, or groups do not
        divide K.
    """
    words, scale, zero = weight
    if words.dtype != layout.dtype:
        raise TypeError(
            f"{who}: words of the {layout.name} layout must be {layout.dtype}; got "
            f"{words.dtype}. Pack codes by kernels_pallas.packing, then "
            "kernels_pallas.layouts.repack."
        )
    if layout.name != "portable" and (
        layout.name != target.reads or layout.name not in kernels
    ):
        refuse(
            who,
            "layout",
            "be portable, or the device's where it has a kernel",
            f"{layout.name!r} on {target.kind!r}",
            "Undo it by kernels_pallas.layouts.unpack.",
        )
    stored_n, stored_groups = layout.sizes(scale.shape)
    stored = Stored(fmt, n or stored_n, x.shape[-1], groups or stored_groups, layout)
    _check_sizes(who, words.shape, stored)
    if zero is not None and zero.shape != scale.shape:
        refuse(
            who,
            "zero",
            f"have the shape of scale, {scale.shape}",
            zero.shape,
            "Broadcast it.",
        )
    stack = words.shape[:-2]
    if x.shape[: len(stack)] != stack or scale.shape[:-2] != stack:
        refuse(
            who,
            "x and scale",
            f"begin with the weight's stack {stack}",
            f"{x.shape} and {scale.shape}",
            "Move the stack to the front, or use jax.vmap.",
        )
    return stored


def _check_sizes(who: str, words: tuple[int, ...], stored: Stored) -> None:
    fmt, n, k, groups, layout = stored
    if k % groups:
        refuse(
            who,
            "scale",
            f"have a number of groups that divides the {k} inputs",
            groups,
            "Groups are consecutive inputs of equal number.",
        )
    wanted = layout.words_shape(n, k, groups, fmt)
    if words[-2:] != wanted:
        refuse(
            who,
            "words",
            f"be [..., {wanted[0]}, {wanted[1]}] for {n} outputs, {k} inputs and "
            f"{fmt.name} in the {layout.name} layout",
            words,
            "Check that x has the inputs that the weight was packed for.",
        )


def check_sides(who: str, weight: Weight, inputs: int, outputs: int) -> None:
    """Scale and zero point of a chip's layout, ``[G', N']``, fit its words."""
    _, scale, zero = weight
    if inputs % scale.shape[0] or scale.shape[1] != outputs:
        rule = f"be [G', {outputs}], G' a divisor of K' = {inputs}"
        refuse(who, "weight.scale", rule, scale.shape, "Pack by layouts.repack.")
    if zero is not None and zero.shape != scale.shape:
        rule = f"have the shape of weight.scale, {scale.shape}"
        refuse(who, "weight.zero", rule, zero.shape, "Broadcast it.")
