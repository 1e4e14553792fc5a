"""`RotatedArray` and `rotated_weight`: a random Hadamard rotation of the inputs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.layout import Layout
from jaxcompress.leaf import FROZEN, WEIGHT, Leaf, component, leaf_type, static
from jaxcompress.lift import Statistics
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Base, Frame, round_weight
from jaxcompress.quant._matmul import Site
from jaxcompress.quant._wrapped import WrappedArray, shared_spec


def hadamard(x: jax.Array, block: int) -> jax.Array:
    r"""The orthonormal Walsh-Hadamard transform of consecutive blocks of the last axis.

    .. math:: y = \frac{1}{\sqrt b} H_b x, \quad
       H_{2b} = \begin{pmatrix} H_b & H_b \\ H_b & -H_b \end{pmatrix}

    Args:
      x: ``float[..., K]``.
      block: Power of two that divides ``K``. Static.

    Returns:
      ``float32[..., K]``; the transform is its own inverse.

    Raises:
      ValueError: If `block` is not a power of two that divides ``K``.

    Examples:
      >>> hadamard(jnp.array([2.0, 0.0, 0.0, 0.0]), 4).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(
            "hadamard: block must be a power of two that divides the last axis of x; "
            f"got {block} for {x.shape}."
        )
    y = x.astype(jnp.float32)
    half = 1
    while half < block:
        y = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = y[..., 0, :], y[..., 1, :]
        y = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return y.reshape(x.shape) * (block**-0.5)


@leaf_type
class RotatedArray(WrappedArray):
    """``w = D H inner`` along the contracting axes; activations become ``H D x``.

    ``H`` is block-diagonal, of orthonormal Walsh-Hadamard matrices; ``D`` is a diagonal
    of random signs. Activations that the inner leaf quantizes are quantized rotated.

    Attributes:
      inner: The leaf of the rotated weight.
      signs: ``int8[*stack, *1, K]``, each 1 or -1.
      block: Size of the Hadamard matrices.
      layout: How the axes lie in storage.
    """

    inner: Leaf = component(role=WEIGHT)
    signs: jax.Array = component(role=FROZEN)
    block: int = static()
    layout: Layout = static()

    @property
    def method(self) -> str:
        """``"int4 g128 rotated"``."""
        return f"{self.inner.method} rotated"

    def _weight(self, inner: jax.Array) -> jax.Array:
        return self.signs.astype(jnp.float32) * hadamard(inner, self.block)

    def _shared(self) -> tuple[Any, ...]:
        return (self.signs,)

    def _enter(self, rows: jax.Array, site: Site) -> jax.Array:
        signs = self._for_rows(self.signs, site).astype(jnp.float32)
        return hadamard(rows.astype(jnp.float32) * signs, self.block)

    def _leave(self, entered: jax.Array, rows: jax.Array, site: Site) -> jax.Array:
        del rows
        signs = self._for_rows(self.signs, site).astype(jnp.float32)
        return signs * hadamard(entered, self.block)

    def _side_specs(
        self, out: list[Any], major: Any, sizes: dict[Any, int]
    ) -> dict[str, Any]:
        names = major if isinstance(major, tuple) else (major,)
        parts = 1
        for name in names:
            parts *= 1 if name is None else sizes[name]
        if parts > 1 and (self._k // self.block) % parts:
            raise ValueError(
                f"{self.method}: {self._k} channels in blocks of {self.block} cannot "
                f"be cut in {parts} parts; give rotated_weight a block of at most "
                f"{self._k // parts}."
            )
        return {"signs": shared_spec(self.signs, [*out, major])}


def rotated_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    key: jax.Array,
    axes: Any = None,
    path: str = "w",
    block: int | None = None,
    base: Base = round_weight,
) -> Leaf:
    r"""Quantize a weight whose inputs are rotated, which spreads its outliers.

    .. math:: x^T w = (H D x)^T (H D w)

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of ``H D w``. Static.
      stats: Of the rows that entered the matmul, or None.
      key: Decides the signs.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      block: Size of the Hadamard matrices, a power of two that divides the inputs; by
        default the largest (an odd number of inputs gets signs alone). Static.
      base: How the rotated weight is quantized; its statistics are those of ``H D x``,
        the gram :math:`H D G D H`. Without a gram, squares are their mean over the
        signs; absmax is a bound. Static.

    Returns:
      A leaf whose inner leaf is the base's; ``x @ w`` costs ``log2(block)`` additions
      an input more. Up to rounding, the rotation alone changes nothing.

    Raises:
      ValueError: As `quantize` does; if `block` does not divide; or if the format's
        activations are static, whose scale is not known after a rotation.

    Examples:
      >>> import jaxcompress as jc
      >>> w = jnp.zeros((64, 1)).at[3, 0].set(64.0)
      >>> rotate = lambda w, k: rotated_weight(w, jc.quant.int4(), None, key=k)
      >>> leaf = jax.jit(rotate)(w, jax.random.key(0))
      >>> leaf, round(leaf.inner.scales().item() * 7, 2)
      (RotatedArray(int4 rotated, float32[64, 1]), 8.0)

    References:
      Ashkboos et al., `QuaRot <https://arxiv.org/abs/2404.00456>`_, 2024, section 3
      (randomized Hadamard transforms). Differs: each weight's inputs are rotated where
      it is used (`fuse_rotations` moves rotations into other weights); sizes that are
      not powers of two get equal blocks, not Hadamard matrices of their own size.
    """
    who = f"rotated_weight to {fmt.name}"
    if fmt.activations is not None and fmt.activations.static:
        raise ValueError(
            f"{who}: static activations at {path!r} have no scale after a rotation; "
            "use dynamic activations."
        )
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    a = frame.storage(w)
    k = a.shape[-1]
    block = k & -k if block is None else block
    signs = jax.random.rademacher(key, (*frame.stack, k), jnp.int8)
    rotate = functools.partial(_rotate, signs=signs.astype(jnp.float32), block=block)
    turned = hadamard(frame.shared(signs).astype(jnp.float32) * a, block)
    inner = frame.quantized(
        base,
        frame.weight(turned),
        fmt,
        None if stats is None else _rotated_statistics(stats, rotate, block),
        path,
    )
    return RotatedArray(
        inner=inner, signs=frame.shared(signs), block=block, layout=frame.layout
    )


def _rotate(a: jax.Array, *, signs: jax.Array, block: int) -> jax.Array:
    """``H D a`` along the last axis of ``[*stack, ..., K]``."""
    extra = (1,) * (a.ndim - signs.ndim)
    return hadamard(
        a * signs.reshape(*signs.shape[:-1], *extra, signs.shape[-1]), block
    )


def _rotated_statistics(stats: Statistics, rotate: Any, block: int) -> Statistics:
    def mean(a: jax.Array) -> jax.Array:
        parts = a.reshape(*a.shape[:-1], -1, block)
        return jnp.repeat(parts.mean(-1), block, axis=-1)

    gram = stats.gram
    if gram is None:
        total_square = mean(stats.total_square)
    else:
        gram = rotate(jnp.matrix_transpose(rotate(gram)))
        total_square = jnp.maximum(jnp.diagonal(gram, axis1=-2, axis2=-1), 0.0)
    return Statistics(
        count=stats.count,
        absmax=mean(stats.absmax) * block**0.5,
        total=rotate(stats.total),
        total_square=total_square,
        gram=gram,
    )
