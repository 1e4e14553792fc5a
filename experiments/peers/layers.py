"""The layers that both sides compress: weights, calibration rows and held-out rows.

    python -m experiments.peers.layers layers.npz

Three synthetic square layers, and three kernels of MiniLM's fourth layer with the rows
that enter them when the float model reads STS-B: its train split to calibrate, its dev
split to hold out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from experiments import data
from experiments.models import minilm, sentences

SIZES = (512, 1024, 2048)
ROWS = 8192
KERNELS = {
    "query": "layers_3/attention/query",
    "intermediate": "layers_3/intermediate",
    "output": "layers_3/output",
}


def synthetic(n: int) -> dict[str, np.ndarray]:
    """Correlated inputs, one channel in 64 ten times as large; held-out ones alike."""
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(n // 4, n)) / np.sqrt(n // 4)
    large = rng.choice(n, n // 64, replace=False)

    def rows() -> np.ndarray:
        x = rng.normal(size=(2 * n, n // 4)) @ mix + 0.3 * rng.normal(size=(2 * n, n))
        x[:, large] *= 10
        return x.astype(np.float32)

    w = 0.02 * rng.normal(size=(n, n)) * np.exp(0.3 * rng.normal(size=(n, 1)))
    return {"x": rows(), "held": rows(), "w": w.astype(np.float32)}


def entering(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows that enter each of `KERNELS`, of all tokens but padding; `ROWS` of them."""
    model, params = minilm.load()
    rows: dict[str, list[np.ndarray]] = {name: [] for name in KERNELS}
    paths = {path: name for name, path in KERNELS.items()}

    for _, ids, mask in sentences.batches(texts):

        def keep(call: Any, args: Any, kwargs: Any, context: Any, mask: Any = mask):
            name = paths.get("/".join(context.module.path))
            if name is not None and context.method_name == "__call__":
                rows[name].append(np.asarray(args[0], np.float32)[mask])
            return call(*args, **kwargs)

        with nn.intercept_methods(keep):
            model.apply(params, ids, mask)
    rng = np.random.default_rng(0)
    joined = {name: np.concatenate(parts) for name, parts in rows.items()}
    chosen = rng.permutation(len(next(iter(joined.values()))))[:ROWS]
    return {name: x[chosen] for name, x in joined.items()}


def real() -> dict[str, dict[str, np.ndarray]]:
    """MiniLM's kernels ``[in, out]`` and the rows that enter them."""
    _, params = minilm.load()
    train, dev = (data.sts(f"stsb_{part}") for part in ("train", "dev"))
    x = entering((train.first + train.second)[::10])
    held = entering((dev.first + dev.second)[::3])
    layers = {}
    for name, path in KERNELS.items():
        w: Any = params["params"]
        for part in path.split("/"):
            w = w[part]
        kernel = np.asarray(w["kernel"], np.float32)
        layers[name] = {"x": x[name], "held": held[name], "w": kernel}
    return layers


def main(path: str) -> None:
    layers = {str(n): synthetic(n) for n in SIZES} | real()
    flat = {
        f"{name}/{a}": v for name, parts in layers.items() for a, v in parts.items()
    }
    np.savez(path, **flat)  # pyright: ignore[reportArgumentType]
    for name, parts in layers.items():
        size = np.abs(parts["x"]).max(0)
        print(
            f"{name}: w {parts['w'].shape}, x {parts['x'].shape}, held "
            f"{parts['held'].shape}; largest channel over the median one "
            f"{size.max() / np.median(size):.1f}"
        )


if __name__ == "__main__":
    main(sys.argv[1])
