"""`attach`: a transform inside any `optax` optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from jaxcompress.transform import Transform


class AttachState(NamedTuple):
    """State of `attach`.

    Attributes:
      inner: The optimizer's state.
      scheme: The transform's state.
    """

    inner: Any
    scheme: Any


def attach(
    tx: optax.GradientTransformation, scheme: Transform
) -> optax.GradientTransformationExtraArgs:
    """Run a transform's update inside an optimizer's.

    The emitted updates already satisfy the constraint: ``params + updates`` has exact
    zeros where weights are pruned, so a training loop needs no further step. `attach`
    must be outermost of what changes updates: ``optax.chain(clip, attach(tx, s))`` and
    ``optax.MultiSteps(attach(tx, s), k)`` (which counts real steps) are right;
    ``optax.chain(attach(tx, s), optax.scale(0.1))`` breaks masks between steps.

    Args:
      tx: Any optimizer.
      scheme: Any transform; its view is `state` of the optimizer's state:
        ``scheme.view(params, optim.state(opt_state))``.

    Returns:
      An optimizer. Its ``init`` takes the params that ``scheme.init`` returned.

    Raises:
      ValueError: From ``init``, if the params have not been through ``scheme.init``;
        from ``update``, if it gets no params.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> tx = attach(optax.sgd(0.1), jc.prune.magnitude(sparsity=0.5))
      >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[0.0, -3.59999...], [2.7000..., 0.0]]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> AttachState:
        ready, scheme_state = scheme.init(params)
        if jax.tree.structure(ready) != jax.tree.structure(params):
            raise ValueError(
                "optim.attach: the scheme adds trainable leaves, so the optimizer must "
                "be initialized with them: params, _ = scheme.init(params) first."
            )
        return AttachState(tx.init(params), scheme_state)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, AttachState]:
        if params is None:
            raise ValueError(
                "optim.attach: update needs the parameters; call tx.update(grads, "
                "state, params)."
            )
        grads = updates
        updates, inner = tx.update(grads, state.inner, params, **extra)
        moved = optax.apply_updates(params, updates)
        held, scheme_state = scheme.update(moved, state.scheme, grads=grads)
        emitted = jax.tree.map(
            lambda new, mid, old, u: _difference(new, mid, old, u),
            held,
            moved,
            params,
            updates,
        )
        return emitted, AttachState(inner, scheme_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(held: Any, moved: Any, old: Any, update: Any) -> Any:
    """The optimizer's own update where the transform changed nothing, else the step."""
    if held is moved:
        return update
    return jax.numpy.where(held == moved, update, held - old)


def state(opt_state: Any) -> Any:
    """The transform's state inside an optimizer's, however deeply nested.

    Args:
      opt_state: State of `attach`, of an optimizer around it (`optax.chain`,
        `optax.MultiSteps`), or an object that holds one as ``opt_state``
        (`flax.training.train_state.TrainState`, `flax.nnx.Optimizer`).

    Raises:
      ValueError: If there is none, or more than one.
    """
    opt_state = getattr(opt_state, "opt_state", opt_state)
    is_ours = lambda x: isinstance(x, AttachState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            f"optim.state: expected one optimizer made by attach in the state; found "
            f"{len(found)}."
        )
    return found[0].scheme
