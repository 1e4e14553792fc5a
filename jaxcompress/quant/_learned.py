"""LSQ and LSQ+: quantization steps that are trained with the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcompress.leaf import (
    OrderError,
    map_value,
)
from jaxcompress.lift import Statistics
from jaxcompress.quant._calibrators import Method, activation_range, minmax
from jaxcompress.quant._elements import Integer
from jaxcompress.quant._format import NumberFormat
from jaxcompress.quant._quantize import Grid
from jaxcompress.quant._scales import compute_scales
from jaxcompress.quant._stepped import SteppedArray
from jaxcompress.quant._trained_activations import (
    Start,
    on_stack,
    trained_activations,
)
from jaxcompress.transform import Transform, identity
from jaxcompress.tree import flatten, unflatten
from jaxcompress.values import Site, check_weights, map_values

_MINMAX = minmax()


def lsq(
    fmt: NumberFormat,
    *,
    initial: Literal["mean", "range"] = "mean",
    stats: Mapping[str, Statistics] | None = None,
    method: Method = _MINMAX,
    activation_step: Any = None,
    learn_offset: bool = True,
) -> Transform:
    r"""Train the step of each block with the weights, and those of static activations.

    .. math::
        \hat v = s \lfloor \operatorname{clip}(v / s, -Q_n, Q_p) \rceil, \quad
        \frac{\partial \hat v}{\partial s} = \begin{cases}
            \lfloor v / s \rceil - v / s & -Q_n \le v / s \le Q_p \\
            -Q_n \text{ or } Q_p & \text{beyond} \end{cases}

    with the step's gradient divided by :math:`\sqrt{N Q_p}`, N the weights that share
    it (or the entries of an activation but for its first axis). The gradient of
    :math:`v` is 1 inside and 0 beyond. If the format's activations are static, their
    step is trained too, and if they are asymmetric a lowest value :math:`\beta`, of
    gradient 1 beyond and 0 inside (LSQ+).

    Args:
      fmt: Symmetric integers with float scales, of any granularity.
      initial: Steps at first: ``"mean"``, :math:`2\,\overline{|w|} / \sqrt{Q_p}`; or
        ``"range"``, the format's own scales (with its ``search``). Blocks of zeros
        start as weights of variance ``1 / K`` would.
      stats: Of `calibrate`, by path: the range that static activations start from.
      method: How, as for `activation_range`.
      activation_step: Instead of `stats`: one number, or a mapping from paths.
      learn_offset: Whether asymmetric activations train :math:`\beta`; else their
        lowest value is 0, as behind a ReLU.

    Returns:
      A transform whose ``init`` puts trained leaves in place of the weights; their
      components of role ``"step"`` are trained and not decayed. Steps are stored, and
      used in the view, rounded to 16 significant bits, without their sign.

    Raises:
      ValueError: If the format is not of that kind; if static activations have
        neither `stats` nor `activation_step`; from ``init``: weights that `quantize`
        refuses.

    Examples:
      >>> from jaxcompress.quant import int4
      >>> scheme = lsq(int4(), initial="range")
      >>> params, state = scheme.init({"w": jnp.array([[3.4], [-7.0]])})
      >>> params["w"].step.tolist()
      [[1.0]]
      >>> scheme.compress(params, state)["w"].materialize().tolist()
      [[3.0], [-7.0]]

    References:
      Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_,
      2020, eq. 1 to 5 and section 2.2; Bhalgat et al., `LSQ+
      <https://arxiv.org/abs/2004.09576>`_, 2020, section 3. Differs: the lowest code
      is left out unless the format keeps it; activations start from a calibrated
      range; :math:`\beta` is rounded to a multiple of the step, so that zero is on the
      grid, and its gradient is scaled as the step's.
    """
    by = f"quant.lsq({fmt.name})"
    _check_format(fmt, initial, by)
    activations = fmt.activations
    if activations is None or not activations.static:
        if stats is not None or activation_step is not None:
            raise ValueError(
                f"{by}: stats and activation_step belong to static activations; leave "
                "them out, or give the format static(...)."
            )
        return _learned(fmt, initial, by)
    element = activations.element
    if (stats is None) == (activation_step is None):
        raise ValueError(
            f"{by}: static activations need a range to start from; pass stats= of "
            "calibrate or activation_step=, one of them."
        )
    if not isinstance(element, Integer):
        raise ValueError(f"{by}: activations must be integers; got {element.label}.")
    offset = learn_offset and not element.symmetric

    def start(path: str, stack: tuple[int, ...]) -> Start:
        if activation_step is not None:
            step = on_stack(activation_step, path, stack, by)
            return Start(step, jnp.zeros_like(step) if offset else None)
        seen = on_path(stats, path, by)
        step, zero = activation_range(seen, activations, method=method)
        step = on_stack(step, path, stack, by)
        if not offset:
            return Start(step, None)
        assert zero is not None
        return Start(step, on_stack((element.low - zero) * step, path, stack, by))

    return trained_activations(
        _learned(fmt.replace(activations=None), initial, by),
        activations,
        start,
        gradient="lsq",
        axes=fmt.axes,
        by=by,
    )


def on_path(stats: Mapping[str, Statistics] | None, path: str, by: str) -> Statistics:
    """The statistics of a leaf."""
    if stats is None or path not in stats:
        raise ValueError(
            f"{by}: there are no statistics for {path!r}, only for "
            f"{sorted(stats or ())}; calibrate the function that uses it, or leave it "
            "out of the rule."
        )
    return stats[path]


def _check_format(fmt: NumberFormat, initial: str, by: str) -> None:
    element = fmt.element
    if (
        not isinstance(element, Integer)
        or not element.symmetric
        or element.fraction
        or fmt.scale in ("e8m0", "nvfp4")
    ):
        raise ValueError(
            f"{by}: the weights' format must be symmetric integers with float scales; "
            "use int4()."
        )
    if fmt.rounding != "nearest":
        raise ValueError(f"{by}: rounding must be 'nearest'; got {fmt.rounding!r}.")
    if initial not in ("mean", "range"):
        raise ValueError(f"{by}: initial must be 'mean' or 'range'; got {initial!r}.")


def _learned(fmt: NumberFormat, initial: str, by: str) -> Transform:
    """The weights' side of `lsq`."""

    def stepped(w: jax.Array, site: Site) -> SteppedArray:
        grid = Grid.of(w, fmt, axes=site.axes, path=site.path, check=True)
        a = jax.lax.stop_gradient(grid.flatten(w))
        largest = fmt.element.largest
        if initial == "mean":
            mean = grid.blocks.reduce(jnp.sum, jnp.abs(a)) / grid.blocks.sizes()
            step = 2.0 * mean / math.sqrt(largest)
        else:
            step = compute_scales(a, grid.blocks, grid.roles.stack, fmt).value
        blank = 2.0 / math.sqrt(grid.blocks.flat.k * largest)
        return SteppedArray(
            latent=w,
            step=grid.blocks.flat.to_storage(jnp.where(step > 0, step, blank)),
            fmt=fmt.replace(axes=None),
            layout=grid.blocks.layout,
        )

    def missing(w: jax.Array, site: Site) -> Any:
        raise ValueError(
            f"{by}: {site.path!r} has no learned steps; pass the params that init "
            "returned."
        )

    def init(params: Any) -> tuple[Any, tuple[()]]:
        check_weights(params, who=by)
        return _at_steps(lambda leaf: leaf, stepped, params, by), ()

    def view(params: Any, state: Any) -> Any:
        del state
        fake = lambda leaf: map_value(leaf.fake, leaf.latent)
        return _at_steps(fake, missing, params, by)

    def compress(params: Any, state: Any) -> Any:
        del state
        stored = lambda leaf: map_value(lambda w: leaf.encoded(w).pack(), leaf.latent)
        return _at_steps(stored, missing, params, by)

    return identity()._replace(init=init, view=view, compress=compress)


def _at_steps(
    f: Callable[[SteppedArray], Any],
    otherwise: Callable[[jax.Array, Site], Any],
    params: Any,
    by: str,
) -> Any:
    """`f` of every `SteppedArray`; `otherwise` of the values of leaves without one."""
    is_stepped = lambda x: isinstance(x, SteppedArray)

    def one(path: str, leaf: Any) -> Any:
        if not any(map(is_stepped, jax.tree.leaves(leaf, is_leaf=is_stepped))):
            return map_values(otherwise, {path: leaf}, by=by)[path]
        try:
            return jax.tree.map(
                lambda x: f(x) if is_stepped(x) else x, leaf, is_leaf=is_stepped
            )
        except OrderError as error:
            raise OrderError(f"{by} at {path!r}: {error}") from None

    flat, structure = flatten(params)
    return unflatten(structure, {path: one(path, leaf) for path, leaf in flat.items()})
