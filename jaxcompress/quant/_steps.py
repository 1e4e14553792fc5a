"""Scales of a weight ``[K, R]``, searched by a weighted error, and its codes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.quant._elements import E4M3, Integer, Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._granularity import split_blocks, spread
from jaxcompress.quant._rounding import (
    divisor,
    power_of_two,
    round_scale,
)

_LOWEST_RATIO = 0.2
_POLISHES = 2


class Steps(NamedTuple):
    """Scales as used, float32, and zero points as float32 integers, or None."""

    scale: jax.Array
    zero: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static side of one weight ``[K, R]``.

    Attributes:
      fmt: The number format.
      out: Sizes of the output axes; their product is R.
      out_blocks: Blocks of outputs that share a scale, along each of them.
      groups: Blocks of consecutive inputs that share a scale.
      tied: Whether blocks of inputs have one scale together, which is not searched.
      candidates: Clipping ranges tried for a block; 1 leaves the largest weight's.
    """

    fmt: NumberFormat
    out: tuple[int, ...]
    out_blocks: tuple[int, ...]
    groups: int
    tied: bool
    candidates: int

    @property
    def blocks(self) -> int:
        """Blocks of outputs."""
        return math.prod(self.out_blocks)

    @property
    def has_zero(self) -> bool:
        """Whether there are zero points."""
        element = self.fmt.element
        return isinstance(element, Integer) and not element.symmetric

    def sum(self, a: jax.Array) -> jax.Array:
        """``[n, R] -> [blocks]``, over inputs and the outputs of a block."""
        return self._reduce(jnp.sum, a)

    def max(self, a: jax.Array) -> jax.Array:
        """``[n, R] -> [blocks]``, as `sum`."""
        return self._reduce(jnp.max, a)

    def _reduce(self, op: Callable[..., jax.Array], a: jax.Array) -> jax.Array:
        a = op(a, axis=0)
        if self.out == self.out_blocks:
            return a
        parts, within = split_blocks(a.reshape(self.out), self.out_blocks)
        return op(parts, axis=within).reshape(-1)

    def spread(self, a: jax.Array) -> jax.Array:
        """``[..., blocks] -> [..., R]``."""
        if self.out == self.out_blocks:
            return a
        lead = a.shape[:-1]
        parts, _ = split_blocks(jnp.zeros(self.out, jnp.float32), self.out_blocks)
        a = spread(a.reshape(*lead, *self.out_blocks), (*lead, *self.out))
        return jnp.broadcast_to(a, (*lead, *parts.shape)).reshape(*lead, -1)

    # -- codes

    def encode(self, x: jax.Array, steps: Steps) -> jax.Array:
        """Nearest codes of values, one scale each (or broadcast)."""
        element = self.fmt.element
        scaled = x / divisor(steps.scale)
        if isinstance(element, Ternary):
            return Integer(bits=2).encode(scaled, "nearest") & jnp.uint8(3)
        if steps.zero is None:
            return element.encode(scaled, "nearest")
        assert isinstance(element, Integer)
        shifted = jnp.clip(jnp.round(scaled) + steps.zero, element.low, element.high)
        return shifted.astype(jnp.int32).astype(jnp.uint8)

    def units(self, codes: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Values of codes before their scale."""
        units = self.fmt.element.decode(codes)
        return units if zero is None else units - zero

    def decode(self, codes: jax.Array, steps: Steps) -> jax.Array:
        """Values of codes."""
        return self.units(codes, steps.zero) * steps.scale

    # -- scales

    def store(self, scale: jax.Array, tensor: jax.Array) -> jax.Array:
        """The scale nearest to a real one that the format can store."""
        if self.fmt.scale == "e8m0":
            exponent = jnp.clip(jnp.round(jnp.log2(divisor(scale))), -126, 127)
            return jnp.where(scale > 0, power_of_two(exponent), 0.0)
        if self.fmt.scale == "nvfp4":
            return E4M3.decode(E4M3.encode(scale / divisor(tensor), "nearest")) * tensor
        stored = round_scale(jnp.maximum(scale, 0.0), self.fmt.scale, "nearest")
        return stored.astype(jnp.float32)

    def search(self, a: jax.Array, importance: jax.Array, tensor: jax.Array) -> Steps:
        r"""The scale of each block of outputs that makes the weighted error least.

        Ranges from that of the largest weight down to a fifth of it are tried, in equal
        ratios; the best is moved, while the error falls, to the least-squares scale of
        its codes, :math:`\sum d w q / \sum d q^2`, and to the next zero points.

        Args:
          a: ``float32[n, R]``, one block of inputs.
          importance: ``float32[n]``, what the squared error of an input counts for.
          tensor: ``float32`` scale of the tensor, for two-level scales.
        """
        weight = importance[:, None]
        first, zero = self._range(a)

        def consider(best: _Best, scale: jax.Array, zero: jax.Array | None) -> _Best:
            steps = Steps(self.store(scale, tensor), zero)
            full = self.full(steps)
            error = a - self.decode(self.encode(a, full), full)
            loss = self.sum(weight * jnp.square(error))
            better = loss < best.loss
            kept = jax.tree.map(
                lambda new, old: jnp.where(better, new, old), steps, best.steps
            )
            return _Best(jnp.where(better, loss, best.loss), kept)

        def polish(_: jax.Array, best: _Best) -> _Best:
            full = self.full(best.steps)
            q = self.units(self.encode(a, full), full.zero)
            fitted = self.sum(weight * a * q) / divisor(self.sum(weight * q * q))
            best = consider(best, fitted, best.steps.zero)
            for step in () if zero is None else (-1.0, 1.0):
                element = self.fmt.element
                assert isinstance(element, Integer)
                assert best.steps.zero is not None
                moved = jnp.clip(best.steps.zero + step, element.low, element.high)
                best = consider(best, best.steps.scale, moved)
            return best

        steps = Steps(self.store(first, tensor), zero)
        if self.candidates == 1:
            return steps
        ratios = jnp.asarray(
            np.geomspace(1.0, _LOWEST_RATIO, self.candidates, dtype=np.float32)
        )
        best = jax.lax.fori_loop(
            0,
            self.candidates,
            lambda i, best: consider(best, first * ratios[i], zero),
            _Best(jnp.full(first.shape, jnp.inf), steps),
        )
        return jax.lax.fori_loop(0, _POLISHES, polish, best).steps

    def full(self, steps: Steps) -> Steps:
        """``[blocks] -> [1, R]``."""
        return jax.tree.map(lambda s: self.spread(s)[None], steps)

    def _range(self, a: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The scale at which no weight is clipped, and its zero point."""
        element = self.fmt.element
        if not isinstance(element, Integer):
            return self.max(jnp.abs(a)) / element.largest, None
        high = jnp.maximum(self.max(a), 0.0)
        low = jnp.minimum(-self.max(-a), 0.0)
        bottom, top = element.range
        if element.symmetric:
            return jnp.maximum(high / top, low / bottom), None
        scale = (high - low) / (element.high - element.low)
        zero = element.low - jnp.round(low / divisor(scale))
        return scale, jnp.clip(zero, element.low, element.high)


class _Best(NamedTuple):
    loss: jax.Array
    steps: Steps


def static_steps(
    w: jax.Array, importance: jax.Array, tensor: jax.Array, problem: Problem
) -> Steps:
    """The scales of all groups of the weight as it is."""
    search = jax.vmap(problem.search, in_axes=(0, 0, None))
    groups = w.reshape(problem.groups, -1, w.shape[1])
    return search(groups, importance.reshape(problem.groups, -1), tensor)
