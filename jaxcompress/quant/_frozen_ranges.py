"""`frozen_ranges`: scales that follow the weights for some updates only."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._elements import Ternary
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._quantize import encode
from jaxcompress.quant._weights import of_leaf, within_range
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform
from jaxcompress.values import Site, check_weights, for_values, map_values


class FrozenRangesState(NamedTuple):
    """State of `frozen_ranges`.

    Attributes:
      ranges: By path, scales and zero points (or None) of each value.
      step: ``int32`` updates so far.
    """

    ranges: dict[str, tuple[tuple[jax.Array, jax.Array | None], ...]]
    step: jax.Array


def frozen_ranges(
    fmt: NumberFormat,
    *,
    after: int,
    activation_scale: Any = None,
    activation_zero: Any = None,
) -> Transform:
    """As `weights`, with scales that stop following the weights after some updates.

    Args:
      fmt: A number format with float scales, rounded to nearest; not ternary.
      after: Updates after which scales and zero points stay as they are. 0 keeps
        those of the first weights.
      activation_scale: As for `weights`.
      activation_zero: As for `weights`.

    Returns:
      A transform whose state holds the scales. Weights beyond a frozen range are
      clipped; with ``clip_gradient`` in the format their gradient is zero.

    Raises:
      ValueError: If the format is not of that kind or `after` is negative.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = frozen_ranges(int4(), after=0)
      >>> params, state = scheme.init({"w": jnp.array([[3.4], [-7.0]])})
      >>> scheme.compress({"w": jnp.array([[3.4], [-9.0]])}, state)["w"].materialize(
      ...     ).tolist()
      [[3.0], [-7.0]]

    References:
      Krishnamoorthi, `Quantizing deep convolutional networks
      <https://arxiv.org/abs/1806.08342>`_, 2018, section 3 (ranges in training).
      Differs: weights' ranges are those of the current weights, not averages.
    """
    by = f"quant.frozen_ranges({fmt.name})"
    if fmt.scale in ("e8m0", "nvfp4") or isinstance(fmt.element, Ternary):
        raise ValueError(f"{by}: the format must have float scales; use int4().")
    if fmt.rounding == "stochastic":
        raise ValueError(f"{by}: rounding must not be stochastic; use 'nearest'.")
    if after < 0:
        raise ValueError(f"{by}: after must not be negative; got {after}.")

    def encoded(w: jax.Array, site: Site, found: Any) -> QuantizedArray:
        scale, zero_point = found
        return encode(
            jax.lax.stop_gradient(w),
            fmt,
            axes=site.axes,
            scale=scale,
            zero_point=zero_point,
            activation_scale=of_leaf(activation_scale, w, site, fmt),
            activation_zero=of_leaf(activation_zero, w, site, fmt),
            path=site.path,
            check=False,
        )

    def ranges(params: Any) -> Any:
        def one(w: jax.Array, site: Site) -> tuple[jax.Array, jax.Array | None]:
            leaf = encoded(w, site, (None, None))
            zero = leaf.zero_point
            zero = None if zero is None else zero.astype(jnp.float32)
            return leaf.scales(), zero

        return for_values(one, params)

    def init(params: Any) -> tuple[Any, FrozenRangesState]:
        check_weights(params, who=by)
        return params, FrozenRangesState(ranges(params), jnp.zeros((), jnp.int32))

    def of_site(state: FrozenRangesState, site: Site) -> Any:
        return state.ranges[site.path][site.number]

    def view(params: Any, state: FrozenRangesState) -> Any:
        def fake(w: jax.Array, site: Site) -> StraightThrough:
            stored = encoded(w, site, of_site(state, site))
            gate = within_range(w, stored) if fmt.clip_gradient else None
            return StraightThrough(latent=w, stored=stored, gate=gate)

        return map_values(fake, params, by=by)

    def update(
        params: Any, state: FrozenRangesState, **extra: Any
    ) -> tuple[Any, FrozenRangesState]:
        del extra
        step = state.step + 1
        moving = lambda new, old: jnp.where(step <= after, new, old)
        found = jax.tree.map(moving, ranges(params), state.ranges)
        return params, FrozenRangesState(found, step)

    def compress(params: Any, state: FrozenRangesState) -> Any:
        return map_values(
            lambda w, site: encoded(w, site, of_site(state, site)).pack(),
            params,
            by=by,
        )

    return Transform(init, view, update, compress)
