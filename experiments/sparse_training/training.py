"""One training run, the same for every method, in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxcompress as jc
from experiments.digits.run import MLP, Part
from experiments.sparse_training.methods import Settings, scheme

Place = Callable[[Any], Any]
"""Where the arrays of a tree lie; the identity on one device."""


class Trained(NamedTuple):
    """What a run leaves.

    Attributes:
      params: After the last step.
      state: State of the method.
      history: The method's state at each checkpoint, stacked.
      density: Mean over the steps of the fraction of kernel weights that are used.
    """

    params: Any
    state: Any
    history: Any
    density: jax.Array


def train(
    name: str,
    sparsity: float,
    settings: Settings,
    part: Part,
    key: jax.Array,
    *,
    sharded: Place = lambda tree: tree,
    whole: Place = lambda tree: tree,
) -> Trained:
    """Train with momentum on a cosine schedule, masks inside the optimizer.

    Args:
      name: The method.
      sparsity: What it prunes to.
      settings: All else.
      part: Images to train on.
      key: Decides the first weights, batches, and random masks.
      sharded: Where params are kept.
      whole: Where they are computed with.
    """
    model = MLP(settings.width)
    start, masks, batches = jax.random.split(key, 3)
    method = scheme(name, sparsity, settings, masks)
    tx = jc.optim.attach(optimizer(settings), method)
    apply: Callable[..., Any] = jc.lift(model.apply)

    def loss(params: Any, state: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = apply(whole(method.view(params, state)), x)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        if name == "Top-KAST":
            ce += settings.strength * jc.prune.top_kast_penalty(params, state)
        return ce

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, opt = carry
        state = jc.optim.state(opt)
        x, y = batch(part, settings, key)
        grads = whole(jax.grad(loss)(params, state, x, y))
        updates, opt = tx.update(grads, opt, params)
        params = sharded(optax.apply_updates(params, updates))
        return (params, opt), used(name, state)

    def segment(carry: Any, keys: jax.Array) -> tuple[Any, Any]:
        state = jc.optim.state(carry[1])
        carry, density = jax.lax.scan(step, carry, keys)
        return carry, (state, density)

    params = sharded(model.init(start, part.x[:1]))
    params, _ = method.init(params)
    keys = jax.random.split(batches, settings.steps)
    keys = keys.reshape(settings.checkpoints, -1)
    carry = params, tx.init(params)
    (params, opt), (history, density) = jax.lax.scan(segment, carry, keys)
    return Trained(params, jc.optim.state(opt), history, density.mean())


QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""Options of a compilation that takes a third of the time; most of it is that."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=QUICK)
def fit(
    name: str, sparsity: float, settings: Settings, part: Part, key: jax.Array
) -> Trained:
    """`train` on one device."""
    return train(name, sparsity, settings, part, key)


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Momentum on a cosine schedule, with weight decay on kernels."""
    rate = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=jc.weight_decay_mask),
        optax.sgd(rate, momentum=settings.momentum),
    )


def batch(
    part: Part, settings: Settings, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Images with noise, and labels."""
    choose, jitter = jax.random.split(key)
    index = jax.random.choice(choose, len(part.y), (settings.batch,), replace=False)
    x = part.x[index]
    return x + settings.jitter * jax.random.normal(jitter, x.shape), part.y[index]


def used(name: str, state: Any) -> jax.Array:
    """Fraction of kernel weights in the forward pass."""
    if name == "dense":
        return jnp.float32(1.0)
    kept = [m for masks in jc.prune.masks(state).values() for m in masks]
    total = sum(m.size for m in kept)
    return sum((m.sum(dtype=jnp.float32) for m in kept), jnp.float32(0)) / total
