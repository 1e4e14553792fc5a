"""What `nm_sparse_matmul` refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.errors import refuse
from kernels_pallas.formats import Format
from kernels_pallas.layouts import PORTABLE, Layout, Weight
from kernels_pallas.nm_sparse_matmul.layout import (
    NMSparse,
    check_pattern,
    groups_of,
    index_format,
)
from kernels_pallas.target import Target

WHO = "nm_sparse_matmul"


def check(
    x: jax.Array,
    weight: NMSparse,
    fmt: Format | None,
    n: int,
    m: int,
    layout: Layout,
    target: Target,
) -> None:
    """Raise the errors of `nm_sparse_matmul` before anything is traced."""
    check_pattern(WHO, n, m)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{WHO}: x must be floating; got {x.dtype}. Convert it.")
    if isinstance(weight.values, Weight) != (fmt is not None):
        refuse(
            WHO,
            "fmt",
            "be given for codes, and only for them",
            f"{fmt} with values of type {type(weight.values).__name__}",
            "Codes are a kernels_pallas.layouts.Weight.",
        )
    words = [weight.indices]
    words += [weight.values.words] if isinstance(weight.values, Weight) else []
    if any(w.dtype != layout.dtype for w in words):
        raise TypeError(
            f"{WHO}: words of the {layout.name} layout must be {layout.dtype}; got "
            f"{[str(w.dtype) for w in words]}. Use nm_sparse_matmul.repack."
        )
    if layout.name not in ("portable", target.platform):
        refuse(
            WHO,
            "layout",
            "be the device's or portable",
            f"{layout.name!r} on {target.kind!r}",
            "Undo it by nm_sparse_matmul.restore.",
        )
    _check_stack(x, weight, layout)


def outputs_of(
    weight: NMSparse,
    k: int,
    m: int,
    outputs: int | None,
    scales: int | None,
    layout: Layout,
) -> tuple[int, int]:
    """Outputs and scales of each: those given, else all that are stored."""
    groups = groups_of(k, m)
    stored, most = weight.indices.shape[-1], 1
    if layout == PORTABLE:
        stored = weight.indices.shape[-2]
    if isinstance(weight.values, Weight):
        most = layout.sizes(weight.values.scale.shape)[1]
    outputs, scales = outputs or stored, scales or most
    if outputs > stored or (layout == PORTABLE and outputs != stored):
        refuse(
            WHO,
            "outputs",
            f"be those that are stored, {stored}, or of a padded layout fewer",
            outputs,
            "Slice the result instead.",
        )
    if groups % scales:
        refuse(
            WHO,
            "scales",
            f"divide the {groups} groups of {m} inputs",
            scales,
            "Give the number before repack; a scale serves whole groups.",
        )
    return outputs, scales


def _check_stack(x: jax.Array, weight: NMSparse, layout: Layout) -> None:
    axes = 2 if layout == PORTABLE else 3
    stack = weight.indices.shape[:-axes]
    leaves = jax.tree.leaves(weight.values)
    if isinstance(weight.values, Weight):
        leads = [leaves[0].shape[:-axes], *(a.shape[:-2] for a in leaves[1:])]
    else:
        leads = [leaves[0].shape[:-axes]]
    if any(lead != stack for lead in [x.shape[: len(stack)], *leads]) or (
        x.ndim <= len(stack)
    ):
        refuse(
            WHO,
            "x and values",
            f"begin with the stack of the indices, {stack}",
            f"{x.shape} and {[a.shape for a in leaves]}",
            "Move the stack to the front, or use jax.vmap.",
        )


def check_sizes(
    weight: NMSparse,
    fmt: Format | None,
    layout: Layout,
    *,
    n: int,
    m: int,
    groups: int,
    outputs: int,
    scales: int,
) -> None:
    """Raise if what is stored is not what so many groups and outputs take.

    Args:
      weight: Its arrays.
      fmt: What the codes of its values stand for; None if they are floats.
      layout: How they lie.
      n: Weights kept.
      m: Of so many, a group.
      groups: Of an output.
      outputs: Without padding.
      scales: Of an output, without padding.
    """
    values, rows = weight.values, layout.padded(outputs, groups, scales)[::-1]
    if layout == PORTABLE:
        shape = lambda f: layout.words_shape(outputs, groups * n, 1, f)
        side, kept = (outputs, scales), (outputs, groups * n)
    else:
        shape = lambda f: (n, *layout.words_shape(outputs, groups, scales, f))
        count = 1 if scales == 1 else rows[0] * scales // groups
        side, kept = (count, rows[1]), (n, *rows)
    places = (weight.indices, shape(index_format(m)))
    if isinstance(values, Weight):
        assert fmt is not None
        sides = [(a, side) for a in values[1:] if a is not None]
        wanted = [places, (values.words, shape(fmt)), *sides]
    else:
        wanted = [places, (values, kept)]
    if any(a.shape[-len(s) :] != s for a, s in wanted):
        refuse(
            WHO,
            "indices and values",
            f"end in {[s for _, s in wanted]} for {outputs} outputs of {groups} groups",
            [a.shape for a, _ in wanted],
            "Check that x has the inputs that the weight was packed for.",
        )
