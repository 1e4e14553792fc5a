"""Half of MobileNetV2 removed by L1 norms of filters: masked equals removed.

The net is trained for a few steps on CIFAR-10 first, so that running statistics and
filters are no longer those of its initialization.

    python -m experiments.structured.mobilenet_run [--steps 40]
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc
from experiments import data
from experiments.models import mobilenet, resnet
from experiments.post_training.report import Report
from experiments.structured.resnet_run import RESULTS, seconds, speed_up

BATCH, LEARNING_RATE, KEPT = 50, 1e-3, 0.5


def train(model: Any, variables: Any, images: data.Images, steps: int) -> Any:
    """A few steps of Adam."""
    tx = optax.adam(LEARNING_RATE)

    def loss(params: Any, stats: Any, x: jax.Array, y: jax.Array) -> Any:
        run = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        logits, seen = run({"params": params, "batch_stats": stats}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), seen["batch_stats"]

    @jax.jit
    def step(variables: Any, opt: Any, x: jax.Array, y: jax.Array) -> Any:
        params = variables["params"]
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, stats), grads = grad(params, variables["batch_stats"], x, y)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "batch_stats": stats}, opt, value

    opt = tx.init(variables["params"])
    for i in range(steps):
        part = slice(i * BATCH, (i + 1) * BATCH)
        x = jnp.asarray(resnet.normalize(images.x[part]))
        variables, opt, value = step(variables, opt, x, jnp.asarray(images.y[part]))
        if i % 10 == 9:
            print(f"  step {i + 1} of {steps}: loss {float(value):.4f}", flush=True)
    return variables


def main() -> None:
    """Train a little, remove, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    images = data.cifar10("train", options.data_dir)
    model = mobilenet.MobileNetV2()
    x = jnp.asarray(resnet.normalize(images.x[-100:]))
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    variables = train(model, variables, images, options.steps)
    smaller = jc.prune.structured(
        model.apply,
        variables,
        x[:2],
        importance=jc.prune.filter_norm(order=1),
        parameters=KEPT,
        scope="group",
    )
    found = np.asarray(jax.jit(smaller.fn)(smaller.params, x))
    masked = np.asarray(jax.jit(model.apply)(smaller.removal.mask(variables), x))
    difference = float(np.abs(found - masked).max() / np.abs(masked).max())
    dense = seconds(model.apply, variables)
    report = Report("mobilenet", __doc__, folder=RESULTS)
    report.add(
        "mobilenetv2",
        "L1, half of the parameters",
        f"{options.steps} steps of training before",
        difference,
        same_predictions=int((found.argmax(-1) == masked.argmax(-1)).sum()),
        images=len(x),
        parameters=[smaller.before.parameters, smaller.after.parameters],
        flops=[smaller.before.flops // 2, smaller.after.flops // 2],
        speed_up=speed_up(dense, seconds(smaller.fn, smaller.params)),
    )
    print(
        jc.report.pruning(
            model.apply, variables, smaller.params, x[:1], fn_after=smaller.fn
        )
    )


if __name__ == "__main__":
    main()
