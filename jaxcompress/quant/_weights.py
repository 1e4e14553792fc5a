"""`weights`: a number format as a transform, for quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import resolve_axes
from jaxcompress.quant._array import QuantizedArray
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._quantize import encode
from jaxcompress.straight_through import StraightThrough
from jaxcompress.transform import Transform
from jaxcompress.values import Site, check_weights, for_values, leaf_key, map_values


class WeightsState(NamedTuple):
    """State of `weights`.

    Attributes:
      key: For stochastic rounding, or None.
      step: ``int32`` updates so far; with `key` it determines the rounding.
    """

    key: jax.Array | None
    step: jax.Array


def weights(
    fmt: NumberFormat,
    *,
    key: jax.Array | None = None,
    activation_scale: Any = None,
    activation_zero: Any = None,
) -> Transform:
    """Train through the grid of a number format; store its codes.

    The view is the quantized weight with a straight-through gradient (clipped to the
    grid's range if the format says so), bit for bit what is stored.

    Args:
      fmt: The number format.
      key: For stochastic rounding; every update draws new noise.
      activation_scale: Calibrated scale of static activations: for every leaf, or a
        mapping from paths, as `calibrated` makes it.
      activation_zero: Its zero point, if they are asymmetric; likewise.

    Raises:
      ValueError: From ``init``: weights or groups that `quantize` refuses.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = weights(int4())
      >>> params, state = scheme.init({"w": jnp.array([[3.4], [-7.0]])})
      >>> scheme.view(params, state)["w"].materialize().tolist()
      [[3.0], [-7.0]]
      >>> scheme.compress(params, state)["w"]
      QuantizedArray(int4, float32[2, 1])

    References:
      Jacob et al., 2018, section 3 (training with simulated quantization); Bengio et
      al., 2013, section 3 (straight-through); Courbariaux et al., `BinaryConnect
      <https://arxiv.org/abs/1511.00363>`_, 2015, section 2.4 (clipping).
    """
    by = f"quant.weights({fmt.name})"

    def encoded(w: jax.Array, site: Site, state: WeightsState) -> QuantizedArray:
        noise = None
        if state.key is not None:
            noise = leaf_key(jax.random.fold_in(state.key, state.step), site)
        return encode(
            jax.lax.stop_gradient(w),
            fmt,
            axes=site.axes,
            key=noise,
            activation_scale=of_leaf(activation_scale, w, site, fmt),
            activation_zero=of_leaf(activation_zero, w, site, fmt),
            path=site.path,
            check=False,
        )

    def fake(w: jax.Array, site: Site, state: WeightsState) -> StraightThrough:
        stored = encoded(w, site, state)
        gate = within_range(w, stored) if fmt.clip_gradient else None
        return StraightThrough(latent=w, stored=stored, gate=gate)

    def init(params: Any) -> tuple[Any, WeightsState]:
        check_weights(params, who=by)
        state = WeightsState(key, jnp.zeros((), jnp.int32))
        for_values(
            lambda w, site: jax.eval_shape(lambda a: encoded(a, site, state), w), params
        )
        return params, state

    def view(params: Any, state: WeightsState) -> Any:
        return map_values(lambda w, site: fake(w, site, state), params, by=by)

    def update(
        params: Any, state: WeightsState, **extra: Any
    ) -> tuple[Any, WeightsState]:
        del extra
        return params, state._replace(step=state.step + 1)

    def compress(params: Any, state: WeightsState) -> Any:
        return map_values(lambda w, site: encoded(w, site, state).pack(), params, by=by)

    return Transform(init, view, update, compress)


def of_leaf(a: Any, w: jax.Array, site: Site, fmt: NumberFormat) -> Any:
    """A calibrated number: one for all, or that of the leaf's path."""
    if not isinstance(a, Mapping):
        return a
    by = f"quant.calibrated({fmt.name})"
    if site.path not in a:
        raise ValueError(
            f"{by}: there are no statistics for {site.path!r}, only for {sorted(a)}; "
            "calibrate the function that uses it, or leave it out of the rule."
        )
    found = jnp.asarray(a[site.path])
    axes = site.axes if fmt.axes is None else fmt.axes
    stack = resolve_axes(w.shape, axes, who=by, path=site.path).stack
    if found.shape not in ((), w.shape[:stack]):
        raise ValueError(
            f"{by}: the statistics of {site.path!r} are of a stack {found.shape}, the "
            f"weight's is {w.shape[:stack]}; state its axes, as with axes=-2."
        )
    return found


def within_range(w: jax.Array, stored: QuantizedArray) -> jax.Array:
    """Where a weight lies within the range of its grid.

    The largest weight may miss the grid's end by the rounding of its scale.
    """
    element = stored.element
    ends = jnp.asarray(element.range, jnp.float32)
    low, high = (
        stored.replace(words=jnp.full_like(stored.words, code)).materialize()
        for code in element.encode(ends, "nearest")
    )
    w = w.astype(jnp.float32) * (1.0 - 2.0**-20)
    return (w >= low.astype(jnp.float32)) & (w <= high.astype(jnp.float32))
