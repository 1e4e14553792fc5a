"""Loss scaling: gradients that would vanish in float16 are moved into its range."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxcompress.lift._compat import varying_axes

T = TypeVar("T")


class LossScale(NamedTuple):
    """A loss scale and its history.

    Attributes:
      value: ``float32[]``: what the loss is multiplied by.
      good_steps: ``int32[]``: steps since it last changed or a step was skipped.
      skipped: ``int32[]``: steps skipped so far.
    """

    value: jax.Array
    good_steps: jax.Array
    skipped: jax.Array

    @classmethod
    def of(cls, value: float) -> LossScale:
        """A scale with no history."""
        zero = jnp.zeros((), jnp.int32)
        return cls(jnp.asarray(value, jnp.float32), zero, zero)

    def scale(self, loss: jax.Array) -> jax.Array:
        """The loss times the scale, in float32: what to differentiate."""
        return loss.astype(jnp.float32) * self.value

    def unscale(self, grads: T) -> T:
        """Gradients of the loss itself, in float32; integers pass."""

        def divide(g: Any) -> Any:
            if not _is_float(g):
                return g
            wide = g.dtype if jnp.finfo(g.dtype).bits >= 32 else jnp.float32
            return g.astype(wide) / self.value.astype(wide)

        return jax.tree.map(divide, grads)

    def after(
        self,
        finite: jax.Array,
        *,
        period: int | None,
        factor: float,
        minimum: float,
        maximum: float,
    ) -> LossScale:
        """The scale for the next step; see `loss_scaling`."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        value = self.value
        if period is not None:
            grown = jnp.minimum(value * factor, maximum)
            shrunk = jnp.maximum(value / factor, minimum)
            value = jnp.where(good == period, grown, value)
            value = jnp.where(finite, value, shrunk)
            good = jnp.where(good == period, 0, good)
        return LossScale(value, good, self.skipped + (~finite).astype(jnp.int32))


class LossScalingState(NamedTuple):
    """State of `loss_scaling`.

    Attributes:
      scale: The loss scale.
      inner: The optimizer's state.
    """

    scale: LossScale
    inner: Any


def loss_scaling(
    tx: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    period: int | None = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
    maximum: float = 2.0**24,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Unscale gradients, and skip the steps in which any of them overflowed.

    The loss is to be scaled by the current scale, which stands in the optimizer's
    state: ``jax.grad(lambda p: loss_scale(opt_state).scale(loss(p)))``. Outermost of
    what looks at gradients: ``loss_scaling(optax.chain(clip, adam))`` clips unscaled
    gradients, and `optim.attach` goes inside, as does
    ``optax.MultiSteps(tx, k).gradient_transformation()``: an overflow then costs one
    mini-step. `optax.MultiSteps` around it is wrong: its running mean would keep an
    infinity that it has met for good.

    Args:
      tx: Any optimizer.
      initial: The first scale.
      period: Good steps in a row after which the scale grows; None keeps it constant
        (steps that overflow are skipped all the same).
      factor: It is multiplied by this, or divided after a skipped step. A power of
        two loses no bits.
      minimum: It shrinks no further.
      maximum: It grows no further.
      axis_name: Mesh axes, inside `jax.shard_map`, over which gradients differ
        from device to device; a step is then skipped on all of them. Under
        `jax.jit` the check is global by itself.

    Returns:
      An optimizer. If any gradient is infinite or NaN, its updates are zeros and the
      state of `tx` stays as it was; `tx` never sees such a gradient.

    Raises:
      ValueError: If a number is out of range.

    Examples:
      >>> tx = loss_scaling(optax.sgd(1.0), initial=4.0, period=2)
      >>> state = tx.init(jnp.zeros(()))
      >>> for grad in (2.0, jnp.inf, 2.0, 2.0):
      ...     update, state = tx.update(jnp.asarray(grad), state)
      ...     print(update.item(), loss_scale(state).value.item())
      -0.5 4.0
      0.0 2.0
      -1.0 2.0
      -1.0 4.0

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018, section 3.2 (scaling, skipped steps);
      Kuchaiev et al., `Mixed-Precision Training for NLP and Speech Recognition with
      OpenSeq2Seq <https://arxiv.org/abs/1805.10387>`_, 2018 (the schedule). Differs:
      the scale stays within bounds.
    """
    _check(initial, period, factor, minimum, maximum)
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> LossScalingState:
        return LossScalingState(LossScale.of(initial), tx.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, LossScalingState]:
        grads = state.scale.unscale(updates)
        finite = all_finite(grads, axis_name=axis_name)

        def take(grads: Any, inner: Any) -> Any:
            return tx.update(grads, inner, params, **extra)

        taken = jax.eval_shape(take, grads, state.inner)

        def skip(grads: Any, inner: Any) -> Any:
            del grads
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), taken[0])
            return jax.tree.map(_varying_as, (zeros, inner), taken)

        emitted, inner = jax.lax.cond(finite, take, skip, grads, state.inner)
        scale = state.scale.after(
            finite, period=period, factor=factor, minimum=minimum, maximum=maximum
        )
        return emitted, LossScalingState(scale, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _varying_as(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """`x` marked as varying over the manual mesh axes that `like` varies over."""
    missing = tuple(varying_axes(like) - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _check(
    initial: float, period: int | None, factor: float, minimum: float, maximum: float
) -> None:
    if not (0 < minimum <= initial <= maximum < math.inf):
        raise ValueError(
            "loss_scaling: 0 < minimum <= initial <= maximum must hold; got minimum="
            f"{minimum}, initial={initial}, maximum={maximum}."
        )
    if period is not None and period < 1:
        raise ValueError(f"loss_scaling: period must be positive; got {period}.")
    if not 1 < factor < math.inf:
        raise ValueError(f"loss_scaling: factor must be above 1; got {factor}.")


def all_finite(tree: Any, *, axis_name: Any = None) -> jax.Array:
    """Whether no floating entry of a pytree is infinite or NaN, on any device.

    Args:
      tree: Any pytree of arrays.
      axis_name: Mesh axes, inside `jax.shard_map`, to agree over.
    """
    finite = jnp.asarray(True)
    for x in jax.tree.leaves(tree):
        if _is_float(x):
            finite &= jnp.isfinite(x).all()
    if axis_name is None:
        return finite
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name) > 0


def loss_scale(opt_state: Any) -> LossScale:
    """The loss scale inside an optimizer's state, however deeply nested.

    Args:
      opt_state: State of `loss_scaling`, of an optimizer around it (`optax.chain`,
        `optax.MultiSteps`, `optim.attach`), or an object that holds one as
        ``opt_state`` (`flax.training.train_state.TrainState`,
        `flax.nnx.Optimizer`).

    Raises:
      ValueError: If there is none, or more than one.
    """
    opt_state = getattr(opt_state, "opt_state", opt_state)
    is_ours = lambda x: isinstance(x, LossScalingState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            "loss_scale: expected one optimizer made by loss_scaling in the state; "
            f"found {len(found)}."
        )
    arrays = (a if isinstance(a, jax.Array) else a[...] for a in found[0].scale)
    return LossScale(*arrays)  # NNX keeps arrays in variables, read by [...].


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
