"""`observe`: histories of delayed scaling inside any `optax` optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress.leaf import is_leaf
from jaxcompress.precision._delayed import DelayedScalingArray


def observe(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Let an optimizer update the histories of `delayed_scaling` beside the weights.

    `tx` never sees the histories, so that clipping and moments are those of the
    weights alone. The emitted updates are exact: after ``params + updates`` an exponent
    that the pass has seen is of age 0, and any other one older. Gradients may have
    been summed, averaged over devices or mini-steps, or scaled before. It goes
    inside or outside `loss_scaling` and `optax.MultiSteps`.

    Args:
      tx: Any optimizer.

    Returns:
      An optimizer of the same parameters.

    Raises:
      ValueError: From ``update``, if it gets no params.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        return tx.init(_without_ages(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "precision.observe: update needs the parameters; call "
                "tx.update(grads, state, params)."
            )
        emitted, state = tx.update(
            _without_ages(updates), state, _without_ages(params), **extra
        )
        return jax.tree.map(_aged, emitted, updates, params, is_leaf=is_leaf), state

    return optax.GradientTransformationExtraArgs(init, update)


def _without_ages(params: Any) -> Any:
    return jax.tree.map(
        lambda x: x.replace(ages=None) if isinstance(x, DelayedScalingArray) else x,
        params,
        is_leaf=is_leaf,
    )


def _aged(emitted: Any, grad: Any, param: Any) -> Any:
    if not isinstance(emitted, DelayedScalingArray):
        return emitted
    older = jnp.minimum(param.ages + 1.0, float(param.window))
    new = jnp.where(grad.ages > 0, 0.0, older)
    return emitted.replace(ages=new - param.ages)
