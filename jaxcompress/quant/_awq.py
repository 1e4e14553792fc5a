"""`awq_weight`: input channels scaled up where the activations are large."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.leaf import Leaf
from jaxcompress.lift import Statistics
from jaxcompress.quant._elements import Binary, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._frame import Base, Frame, divided, output_error, round_weight
from jaxcompress.quant._granularity import split_blocks, spread
from jaxcompress.quant._quantize import Grid, encode
from jaxcompress.quant._ranges import Search, mse
from jaxcompress.quant._scaled import ScaledArray

CLIPPING = mse(steps=20, shrink=0.5)
"""How `awq_weight` shortens ranges, unless told otherwise."""


def awq_weight(
    w: jax.Array,
    fmt: NumberFormat,
    stats: Statistics | None,
    *,
    axes: Any = None,
    path: str = "w",
    alphas: int = 10,
    clipping: Search | None = CLIPPING,
    base: Base = round_weight,
) -> Leaf:
    r"""Quantize a weight whose channels are first scaled by what their activations are.

    .. math:: s^* = \arg\min_s \| (Q(W \operatorname{diag}(s))
       \operatorname{diag}(s)^{-1} - W) X \|, \quad
       s = s_X^\alpha \ \text{or}\ s = s_X^\alpha / s_W^{1 - \alpha}

    Each block's range is shortened where that lowers the error further.

    Args:
      w: ``float[*stack, *core]`` weight.
      fmt: The number format of the scaled weight. Static.
      stats: Of the rows that entered the matmul; with a gram the error is that of the
        outputs, else its diagonal stands for it. Without statistics the weight is
        quantized as it is.
      axes: As for `quantize`. Static.
      path: Named in errors. Static.
      alphas: Steps of the search over ``alpha`` in [0, 1], for each form of `s`.
        Static.
      clipping: The search for a block's range, where the format names none (and its
        scale is no mean, as of `ternary`); None for the whole range. Static.
      base: How the scaled weight is quantized, given the statistics of ``x / s``; the
        search for `s` rounds. Static.

    Returns:
      A leaf that divides activations by `s`: the one whose rounded weight has the least
      output error, as the statistics measure it; among them is ``s = 1``.

    Raises:
      ValueError: As `quantize` does; if `alphas` is not positive.

    Examples:
      >>> import jaxcompress as jc
      >>> from jaxcompress.lift import statistics
      >>> w = jnp.array([[0.3], [1.0], [-3.5]])
      >>> stats = statistics(jnp.array([[100.0, 1.0, 1.0]]))
      >>> find = lambda w, s: awq_weight(w, jc.quant.int3(), s).materialize()
      >>> round(jax.jit(find)(w, stats)[0, 0].item(), 2)
      0.3

    References:
      Lin et al., `AWQ <https://arxiv.org/abs/2306.00978>`_, 2023, eq. 4 and 5, section
      3.2 and (clipping) section 5.1; :math:`s_W`, the mean magnitude of a channel's
      weights over the largest of their blocks, is from its published code. Differs:
      :math:`s_X` is the root mean square of a channel, within 1e-4 of the largest, and
      channels that were never active are left alone; every candidate `s` has its ranges
      shortened, by the diagonal of the gram, and the last one by each block's own gram;
      activations are divided where the weight is used, not in the operation before it.
    """
    who = f"awq_weight to {fmt.name}"
    if alphas < 1:
        raise ValueError(f"{who}: alphas must be positive; got {alphas}.")
    frame = Frame.of(w, fmt, axes=axes, path=path, who=who)
    if stats is None:
        return base(w, fmt, None, axes=frame.roles, path=path)
    if fmt.search is None and not isinstance(fmt.element, Binary | Ternary):
        fmt = fmt.replace(search=clipping)
    a = frame.storage(w)
    s = _best_scale(a, frame, fmt, stats, alphas, path)
    scaled = frame.weight(a * frame.shared(s))
    inner = frame.quantized(base, scaled, fmt, divided(stats, s), path)
    return ScaledArray(inner=inner, channel_scale=frame.shared(s), layout=frame.layout)


def _best_scale(
    a: jax.Array,
    frame: Frame,
    fmt: NumberFormat,
    stats: Statistics,
    alphas: int,
    path: str,
) -> jax.Array:
    """The channel scales of least output error, ``float32[*stack, K]``."""
    plain = fmt.replace(activations=None, rounding="nearest")
    live = stats.total_square > 0
    size = jnp.sqrt(stats.total_square)
    activations = _centred_log(size, live)
    weights = _centred_log(_share_of_block(a, frame, plain, path), live)

    def scale(powers: jax.Array) -> jax.Array:
        return jnp.exp(powers[0] * activations - powers[1] * weights)

    def error(powers: jax.Array) -> jax.Array:
        s = scale(powers)
        leaf = encode(
            frame.weight(a * frame.shared(s)),
            plain,
            axes=frame.roles,
            importance=stats.total_square / jnp.square(s),
            path=path,
            check=False,
        )
        found = frame.storage(leaf.materialize()) / frame.shared(s)
        return output_error(found - a, stats, len(frame.stack))

    steps = jnp.arange(alphas + 1, dtype=jnp.float32) / alphas
    alone = jnp.stack([steps, jnp.zeros_like(steps)], -1)
    both = jnp.stack([steps, 1.0 - steps], -1)
    powers = jnp.concatenate([alone, both[:-1]])  # Both end in alpha = 1.
    best = powers[jax.lax.map(error, powers).argmin(0)]
    return scale(jnp.moveaxis(best, -1, 0)[..., None])


def _centred_log(size: jax.Array, live: jax.Array) -> jax.Array:
    """Logarithm of each channel's magnitude, the middle of its range being zero."""
    live &= size > 0
    size = jnp.log(jnp.where(live, size, 1.0))
    top = size.max(-1, keepdims=True, where=live, initial=-100.0)
    size = jnp.maximum(size, top - jnp.log(1e4))
    low = size.min(-1, keepdims=True, where=live, initial=100.0)
    return jnp.where(live, size - 0.5 * (top + low), 0.0)


def _share_of_block(
    a: jax.Array, frame: Frame, fmt: NumberFormat, path: str
) -> jax.Array:
    """Mean magnitude of each input's weights over the largest of their blocks."""
    w = frame.weight(a)
    grid = Grid.of(w, fmt, axes=frame.roles, path=path, check=False)
    blocks, flat = grid.blocks, jnp.abs(grid.flatten(w))
    largest = blocks.reduce(jnp.max, flat)
    parts, _ = split_blocks(flat, blocks.counts)
    share = parts / spread(jnp.where(largest > 0, largest, 1.0), flat.shape)
    share = blocks.flat.to_storage(share.reshape(flat.shape))
    return share.reshape(*frame.stack, -1, frame.inputs).mean(-2)
