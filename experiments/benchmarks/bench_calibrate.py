"""Calibration beside the plain forward pass, a batch at a time, both compiled.

Four Dense layers of 1024 at batch 512, and a small convolutional network at batch 32.
Statistics of channels; then with histograms too. Target: at most 1.3x the plain pass.
The result of the last layer enters no statistics, so calibration does not compute it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import compare, record
from jaxcompress import tree
from jaxcompress.lift._calibrate import collector

LAYERS, WIDTH, BATCH = 4, 1024, 512
CHANNELS, IMAGES, SIDE = (32, 64, 64), 32, 32
TARGET, ROUNDS = 1.3, 30


class Dense(nn.Module):
    """Dense layers with ReLU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS - 1):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(WIDTH)(x)


class Convolutional(nn.Module):
    """Convolutions with ReLU and pooling, and a Dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for channels in CHANNELS:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def times(model: nn.Module, x: jax.Array) -> dict[str, Any]:
    """Ratios of one model."""
    params: Any = model.init(jax.random.key(0), x)
    watched = frozenset(tree.flatten(params)[0])
    plain = jax.jit(model.apply)
    channels = collector(model.apply, watched)
    both = collector(model.apply, watched, histogram=True)

    def program(call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return lambda: functools.partial(call, *args)

    programs = {
        "plain": program(plain, params, x),
        "calibrate": program(channels, params, (x,)),
        "calibrate, histogram": program(both, params, (x,)),
    }
    return compare(programs, to="plain", rounds=ROUNDS, calls=3)


def main() -> None:
    """Time both models and record the ratios."""
    key = jax.random.key(1)
    x = jax.random.normal(key, (BATCH, WIDTH))
    images = jax.random.normal(key, (IMAGES, SIDE, SIDE, 3), jnp.float32)
    record(
        "calibrate",
        __doc__,
        {
            "layers": LAYERS,
            "width": WIDTH,
            "batch": BATCH,
            "channels": CHANNELS,
            "images": [IMAGES, SIDE, SIDE],
            "target_ratio": TARGET,
            "dense": times(Dense(), x),
            "convolutional": times(Convolutional(), images),
        },
    )


if __name__ == "__main__":
    main()
