"""FP8 matmuls with delayed scaling: scales from the magnitudes of past steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxcompress import tree
from jaxcompress.leaf import (
    STEP,
    WEIGHT,
    Cast,
    LayoutOp,
    Leaf,
    Ran,
    component,
    leaf_type,
    relayout,
    result_dtype,
    static,
)
from jaxcompress.precision._delayed_matmul import (
    BINS,
    Site,
    product,
    scales,
    shared,
)
from jaxcompress.precision._low_precision import (
    Rerouted,
    matrices,
    refuse_out_sharding,
)
from jaxcompress.precision._matmul import Element, canonical, check_formats
from jaxcompress.quant._elements import E4M3, E5M2


@leaf_type
class DelayedScalingArray(Rerouted):
    """A weight whose fp8 matmuls use scales from what the last steps have seen.

    The scale of a tensor is ``2^e`` with the largest exponent `e` seen in `window`
    updates, where a step sees the least `e` with ``absmax <= 2^e * largest``.

    Attributes:
      w: The weight, an array or a leaf.
      ages: ``float32[*stack, 3, 254]``: for x, w and the incoming gradient, how many
        updates ago each exponent (from -126 up) was seen; `window` if longer ago.
        Its cotangent is not a derivative: it is positive where the pass has *seen* an
        exponent, however many passes are summed or averaged. `observe` reads it.
      forward: Format of operands in the forward pass.
      backward: Format of incoming gradients.
      window: Updates that the scales look back.
      margin: Scales are `margin` powers of two larger than need be.
    """

    w: Any = component(role=WEIGHT)
    ages: jax.Array | None = component(role=STEP, default=None)
    forward: Element = static()
    backward: Element | None = static()
    window: int = static()
    margin: int = static()

    def relayout(self, op: LayoutOp) -> Leaf:
        """Move the weight; a stack shares one history from here on."""
        w = relayout(self.w, op)
        if w is NotImplemented:
            return NotImplemented
        ages = self._known_ages()
        return self.replace(w=w, ages=ages if isinstance(op, Cast) else shared(ages))

    def stacked(self, ndim: int) -> Leaf:
        """With ages for each stack entry; those they share observe the maximum."""
        w = self.w.stacked(ndim) if isinstance(self.w, Leaf) else self.w
        if w is NotImplemented:
            return NotImplemented
        ages = self._known_ages()
        if ages.ndim - 2 < ndim:
            ages = shared(ages).reshape((1,) * ndim + (3, BINS))
            ages = jnp.broadcast_to(ages, (*self.shape[:ndim], 3, BINS))
        return self.replace(w=w, ages=ages)

    def scales(self) -> jax.Array:
        """``float32[*stack, 3]``: scales of x, w and the incoming gradient."""
        return scales(self._known_ages(), self.window, self.margin)

    def dot_general(
        self, x: jax.Array, dimension_numbers: Any, *, leaf_is_lhs: bool, **params: Any
    ) -> Ran:
        """fp8 operands with scales known beforehand; see `delayed_scaling`."""
        refuse_out_sharding(params)
        (lc, rc), (lb, rb) = dimension_numbers
        if leaf_is_lhs:
            lc, rc, lb, rb = rc, lc, rb, lb
        left, n_left = canonical(x, lb, lc)
        right, n_right = canonical(self.materialize(), rb, rc)
        site = Site(
            batch=len(lb),
            left=n_left,
            forward=self.forward,
            backward=self.backward or self.forward,
            window=self.window,
            margin=self.margin,
        )
        y: Any = product(site, left, right, shared(self._known_ages()))
        if leaf_is_lhs:  # The result's axes are [batch, w free, x free].
            n = len(lb)
            middle, end = n + n_left, n + n_left + n_right
            y = jnp.transpose(y, (*range(n), *range(middle, end), *range(n, middle)))
        dtype = result_dtype(x, self, params)
        return Ran(y.astype(dtype), f"delayed {self.method}")

    def component_specs(
        self, spec: Sequence[Any], sizes: dict[Any, int]
    ) -> DelayedScalingArray:
        """The weight's own; ages are cut along the stack only."""
        ages = self._known_ages()
        own = PartitionSpec(*spec[: ages.ndim - 2], None, None)
        return self.replace(w=self.weight_specs(spec, sizes), ages=own)

    def _known_ages(self) -> jax.Array:
        if self.ages is None:
            raise ValueError(
                f"{self!r} has no ages: it comes from inside `observe`, which hides "
                "them from the optimizer; run the parameters themselves."
            )
        return self.ages


def delayed_scaling(
    params: Any,
    *,
    window: int = 16,
    margin: int = 0,
    stack: int = 0,
    forward: Element = E4M3,
    backward: Element = E5M2,
    where: tree.Rule = matrices,
) -> Any:
    r"""Wrap weights in leaves whose fp8 matmuls use scales known beforehand.

    Where scales come from the operands (`matmul_fp8`), rounding waits for their
    maximum. Here a tensor has one scale, from the maxima of past steps:

    .. math:: s = 2^{margin + \max_{i < window} e_{t-i}}, \quad
        e_t = \lceil \log_2 (\max |x_t| / q_{max}) \rceil

    What exceeds the range saturates, for the one step until it is seen. Train the
    result like any parameters: differentiate `lift` of the model in it, with an
    optimizer made by `observe`; `materialize` gives the weights back.

    Args:
      params: Parameter pytree.
      window: Updates that the scales look back.
      margin: Powers of two to spare.
      stack: Leading axes of the chosen weights along which each entry keeps a history
        of its own (scanned layers); else all entries share one.
      forward: `quant.E4M3` or `quant.E5M2`: format of operands. Static.
      backward: Format of incoming gradients. Static.
      where: The weights: a glob pattern, `jaxcompress.where` or a predicate.

    Returns:
      The parameters, with `DelayedScalingArray` leaves that have seen nothing yet:
      their first scales are 1. Tensors with infinite or NaN entries are not
      recorded, and give infinite or NaN results.

    Raises:
      ValueError: If a format is not fp8, a number is out of range, or `where`
        matches nothing.

    Examples:
      >>> import optax
      >>> from jaxcompress.precision import observe
      >>> params = delayed_scaling({"w": jnp.array([[896.0, 0.25]])})
      >>> tx = observe(optax.sgd(0.0))
      >>> loss = lambda p: p["w"].dot_general(
      ...     jnp.ones((1, 1)), (((1,), (0,)), ((), ())), leaf_is_lhs=False).out.sum()
      >>> grads = jax.grad(loss)(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["w"].scales()[1].item()  # 896 = 2 * 448, and 448 is e4m3's largest.
      2.0

    References:
      Micikevicius et al., `FP8 Formats for Deep Learning
      <https://arxiv.org/abs/2209.05433>`_, 2022, sections 2 and 3 (formats, scales of
      a tensor, saturation). Differs: the window of past maxima is common practice, not
      the paper's; scales are powers of two, so that rescaling loses no bits, and the
      history keeps exponents instead of maxima.
    """
    for name, element in (("forward", forward), ("backward", backward)):
        if element not in (E4M3, E5M2):
            raise ValueError(
                f"delayed_scaling: {name} must be quant.E4M3 or quant.E5M2; got "
                f"{element!r}."
            )
    check_formats(forward, backward, who="delayed_scaling")
    if window < 1 or margin < 0:
        raise ValueError(
            "delayed_scaling: window must be positive and margin not negative; got "
            f"window={window}, margin={margin}."
        )
    chosen = tree.choose({where: True}, params, who="delayed_scaling")
    flat, structure = tree.flatten(params)

    def wrap(path: str, w: Any) -> DelayedScalingArray:
        if not 0 <= stack < w.ndim:
            raise ValueError(
                f"delayed_scaling: stack must be below the rank of {path!r}; got "
                f"stack={stack} for shape {tuple(w.shape)}."
            )
        return DelayedScalingArray(
            w=w,
            ages=jnp.full((*w.shape[:stack], 3, BINS), window, jnp.float32),
            forward=forward,
            backward=backward,
            window=window,
            margin=margin,
        )

    return tree.unflatten(
        structure, {p: wrap(p, w) if p in chosen else w for p, w in flat.items()}
    )
