"""A lifted int8 model beside the dense one, by batch size.

Four Dense layers of 1024 in W8A8: int8 weights a channel, int8 activations a token,
int32 sums. Target on CPU: no slower than float32 from batch 8 on.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record

LAYERS, WIDTH, BATCHES = 4, 1024, (1, 8, 32, 128, 512)


class Model(nn.Module):
    """Dense layers with ReLU between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(LAYERS - 1):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(WIDTH)(x)


def main() -> None:
    """Time both at every batch size and record the ratios."""
    model = Model()
    params: Any = model.init(jax.random.key(0), jax.numpy.ones((1, WIDTH)))
    packed = jc.compress(params, {"**/kernel": jc.presets.W8A8})
    dense, lifted = jax.jit(model.apply), jax.jit(jc.lift(model.apply))
    times = {}
    for batch in BATCHES:
        x = jax.random.normal(jax.random.key(1), (batch, WIDTH))
        times[f"batch {batch}"] = compare(
            {
                "dense": lambda x=x: lambda: dense(params, x),
                "int8": lambda x=x: lambda: lifted(packed, x),
            },
            to="dense",
            rounds=30,
            calls=max(1, 64 // batch),
        )
    bytes_ = {
        "dense": jc.report.size(params).memory_bytes,
        "int8": jc.report.size(packed).memory_bytes,
    }
    record(
        "int8_inference",
        __doc__,
        {
            "layers": LAYERS,
            "width": WIDTH,
            "scheme": jc.presets.W8A8.name,
            "memory_bytes": bytes_,
            "target_ratio": 1.0,
            "times": times,
        },
    )


if __name__ == "__main__":
    main()
