"""Peers in PyTorch that prune after training. Runs in their environment, without jax.

    python -m experiments.peers.pruning_peers layers.npz found.json

llm-compressor's SparseGPT and Wanda; ModelOpt's SparseGPT, which finds N:M masks and
leaves the weights as they were. A peer that fails is recorded with its error.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from experiments.peers import measure

LAYERS = ("query", "intermediate", "output", "512", "1024")
PATTERNS = {"50%": (0.5, 0, 0), "2:4": (0.5, 2, 4)}
DAMPINGS = (0.01, 0.1)
Weights = Callable[[measure.Layer], np.ndarray]


def linear(layer: measure.Layer) -> torch.nn.Linear:
    """The layer as a module."""
    w = torch.tensor(layer["w"]).T.contiguous()
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w
    return module


def moment(layer: measure.Layer) -> torch.Tensor:
    """The second moment of its rows."""
    x = torch.tensor(layer["x"])
    return x.T @ x / len(x)


def sparsegpt(layer: measure.Layer, *, pattern: str, damping: float) -> np.ndarray:
    """llm-compressor's `SparseGPTModifier`, in its default blocks of 128."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    sparsity, n, m = PATTERNS[pattern]
    module = linear(layer)
    moments = {module: moment(layer)}
    found = sparsify_weight(module, moments, sparsity, n, m, 128, damping, False)
    return found[1].numpy().T


def wanda(layer: measure.Layer, *, pattern: str) -> np.ndarray:
    """llm-compressor's `WandaPruningModifier`."""
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    sparsity, n, m = PATTERNS[pattern]
    module = linear(layer)
    squares = {module: torch.diag(moment(layer)).clone()}
    return sparsify_weight(module, squares, sparsity, n, m).numpy().T


def modelopt(layer: measure.Layer, *, damping: float) -> np.ndarray:
    """ModelOpt's `sparsegpt` mode: its mask on the weight."""
    from modelopt.torch.sparsity.weight_sparsity import sparsegpt as peer

    config = {
        "pattern": "2:4 sparsity",
        "col_block_size": 128,
        "row_block_size": -1,
        "hessian_damp": damping,
    }
    w = torch.tensor(layer["w"]).T.contiguous()
    mask = peer.create_sgpt_mask(w.clone(), moment(layer), config)
    return (w * mask).numpy().T


def methods() -> Iterator[tuple[dict[str, Any], Weights]]:
    """Every peer, pattern and setting."""
    for pattern in PATTERNS:
        row = {"by": "llmcompressor", "pattern": pattern}
        for damping in DAMPINGS:
            run = functools.partial(sparsegpt, pattern=pattern, damping=damping)
            yield row | {"method": "SparseGPT", "settings": {"damping": damping}}, run
        run = functools.partial(wanda, pattern=pattern)
        yield row | {"method": "Wanda", "settings": {}}, run
    for damping in DAMPINGS:
        row = {"by": "modelopt", "pattern": "2:4", "method": "SparseGPT mask"}
        yield (
            row | {"settings": {"damping": damping}},
            functools.partial(modelopt, damping=damping),
        )


def main(layers: str, results: str) -> None:
    """Measure on all layers; one thread, since others may use the machine."""
    torch.set_num_threads(1)
    data, found = measure.load(layers), []
    names = ("torch", "llmcompressor", "nvidia-modelopt")
    versions = {name: importlib.metadata.version(name) for name in names}
    for name in LAYERS:
        for row, weight in methods():

            def task(weight: Weights = weight, layer: Any = data[name]) -> Any:
                with torch.no_grad():
                    value = weight(layer)
                zeros = {"zeros": float(np.mean(value == 0))}
                return measure.errors(layer, value) | zeros

            found.append(row | {"layer": name} | measure.attempt(task))
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
