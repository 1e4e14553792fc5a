"""Kernels of convolutions, and what their factored forms share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.layout import resolve_axes
from jaxcompress.lowrank._factors import contract
from jaxcompress.lowrank._matrix import AxesOption
from jaxcompress.values import check_weight


class Kernel(NamedTuple):
    """Sizes of a kernel ``[*stack, *window, inputs, outputs]``; a matrix has no window.

    Attributes:
      stack: Of the axes that stack.
      window: Of the window.
      inputs: Of the inputs.
      outputs: Of the outputs.
    """

    stack: tuple[int, ...]
    window: tuple[int, ...]
    inputs: int
    outputs: int

    @classmethod
    def of(cls, w: Any, axes: AxesOption, *, path: str, who: str) -> Kernel:
        """Check a weight whose every axis but the last is contracted.

        Raises:
          ValueError: If others are, or its axes are unknown.
          TypeError: If it is not real floating.
        """
        check_weight(w, path, who)
        roles = resolve_axes(w.shape, axes, who=who, path=path)
        core = tuple(range(roles.stack - w.ndim, 0))
        if len(core) < 2 or tuple(sorted(roles.contract)) != core[:-1]:
            raise ValueError(
                f"{who}: of a weight [*window, in, out] all axes but the last are "
                f"contracted; {path!r} has shape {w.shape} and contracts "
                f"{roles.contract}. Leave it out of the rule."
            )
        sizes = tuple(w.shape[a] for a in core)
        return cls(tuple(w.shape[: roles.stack]), sizes[:-2], sizes[-2], sizes[-1])

    def flat(self, w: jax.Array) -> jax.Array:
        """``float32[*stack, k, inputs, outputs]``, the window flattened."""
        k = math.prod(self.window)
        shape = (*self.stack, k, self.inputs, self.outputs)
        return jnp.asarray(w).astype(jnp.float32).reshape(shape)


def channels_last(params: dict[str, Any], ndim: int) -> bool:
    """Whether a convolution's kernel is ``[*window, in, out]``, without groups."""
    numbers = params["dimension_numbers"]
    return params["feature_group_count"] == params["batch_group_count"] == 1 and tuple(
        numbers.rhs_spec
    ) == (ndim - 1, ndim - 2, *range(ndim - 2))


def along_channels(
    x: jax.Array, factor: Any, axis: int, params: dict[str, Any]
) -> jax.Array:
    """``x`` times ``[channels, r]`` along an axis, in float32; r is there then."""
    ran = contract(
        x,
        factor,
        (((axis,), (0,)), ((), ())),
        precision=params["precision"],
        preferred_element_type=jnp.float32,
    )
    return jnp.moveaxis(ran.out, -1, axis)
