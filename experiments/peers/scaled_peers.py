"""AWQ and SmoothQuant of peers in PyTorch. Runs in their environment, without jax.

    python -m experiments.peers.scaled_peers layers.npz scaled.json

Each compresses a model of one linear layer, calibrated on the layer's rows; its outputs
are then measured. llm-compressor scales channels in the layer before, so its model has
a first layer that multiplies by one. A peer that fails is recorded with its error.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from experiments.peers import measure

LAYERS = ("query", "intermediate", "output", "512", "1024")
BATCH = 1024


class Multiply(torch.nn.Module):
    """By one, until a peer scales it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Model(torch.nn.Module):
    """One linear layer, and one before it that can be scaled."""

    def __init__(self, w: np.ndarray) -> None:
        super().__init__()
        self.before = Multiply(w.shape[0])
        self.linear = torch.nn.Linear(*w.shape, bias=False)
        self.linear.weight.data = torch.tensor(w).T.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.before(x))


def modelopt(layer: measure.Layer, name: str, algorithm: Any, group: int) -> Any:
    """One of ModelOpt's configurations, with an algorithm of its own choice."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, name)) | {"algorithm": algorithm}
    for entry in config["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"]["block_sizes"][-1] = group
    model = Model(layer["w"])
    rows = torch.tensor(layer["x"])[None].split(BATCH, 1)
    mtq.quantize(model, config, lambda model: [model(part) for part in rows])
    return model


def modifiers(duo: Any, alpha: float | None, weights: dict[str, Any] | str) -> list:
    """A recipe of llm-compressor: scales, then rounding."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if isinstance(weights, str):
        rounding = QuantizationModifier(targets=["Linear"], scheme=weights)
    else:
        group = {"targets": ["Linear"], "weights": weights}
        rounding = QuantizationModifier(config_groups={"g": group})
    if alpha is None:
        pairs = [AWQMapping("re:.*before", ["re:.*linear"])]
        return [AWQModifier(mappings=pairs, duo_scaling=duo), rounding]
    names = [[["re:.*linear"], "re:.*before"]]
    return [SmoothQuantModifier(smoothing_strength=alpha, mappings=names), rounding]


def llm_compressor(layer: measure.Layer, **recipe: Any) -> Any:
    """Its lifecycle on one layer, quantization disabled until all is calibrated: its
    sequential pipeline does so (its basic one searches AWQ's scales with it enabled).
    Without CUDA its AWQ fails to pin memory, so that is left out.
    """
    from llmcompressor.core import LifecycleCallbacks, create_session
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.utils.helpers import DisableQuantization

    IntermediatesCache.pin_memory = lambda self, index: None
    model = Model(layer["w"])
    rows = torch.tensor(layer["x"])[None].split(BATCH, 1)
    batches: Any = [{"x": part} for part in rows]
    with create_session() as session:
        session.initialize(
            model=model, recipe=modifiers(**recipe), calib_data=batches, start=-1
        )
        LifecycleCallbacks.calibration_start()
        with DisableQuantization(model):
            for batch in batches:
                model(**batch)
            LifecycleCallbacks.sequential_epoch_end(list(model.modules()))
        LifecycleCallbacks.calibration_end()
        session.finalize()
    return model


def awq(bits: int, group: int) -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    """Symmetric integers, and integers with a zero point."""
    int4 = "INT4_AWQ_CFG"
    for algorithm in ("awq_lite", "awq_clip", "awq_full") if bits == 4 else ():
        row = {"by": "modelopt", "symmetric": True, "settings": algorithm}
        yield (
            row,
            functools.partial(modelopt, name=int4, algorithm=algorithm, group=group),
        )
    for symmetric in (True, False):
        for duo in (True, "both"):
            weights = {"num_bits": bits, "strategy": "group", "group_size": group}
            weights |= {"symmetric": symmetric, "observer": "memoryless_mse"}
            row = {"by": "llmcompressor", "symmetric": symmetric}
            row |= {"settings": f"duo_scaling={duo}, memoryless_mse"}
            recipe = {"duo": duo, "alpha": None, "weights": weights}
            yield row, functools.partial(llm_compressor, **recipe)


def smoothquant() -> Iterator[tuple[dict[str, Any], Callable[..., Any]]]:
    """int8 weights a channel; activations a token, or with one scale found before."""
    for alpha in (0.5, 0.65, 0.8, 1.0):
        row = {"by": "modelopt", "activations": "static", "settings": f"alpha={alpha}"}
        options = {"name": "INT8_SMOOTHQUANT_CFG", "group": 0}
        algorithm = {"method": "smoothquant", "alpha": alpha}
        yield row, functools.partial(modelopt, algorithm=algorithm, **options)
        row = {"by": "llmcompressor", "activations": "token"}
        recipe = {"duo": None, "alpha": alpha, "weights": "W8A8"}
        yield (
            row | {"settings": f"alpha={alpha}"},
            functools.partial(llm_compressor, **recipe),
        )


def run(layer: measure.Layer, build: Callable[..., Any]) -> dict[str, float]:
    """Errors of the outputs; llm-compressor takes tokens as a batch of sequences."""
    model = build(layer)
    return measure.output_errors(
        layer, lambda x: model(torch.tensor(x)[None])[0].numpy()
    )


def main(layers: str, results: str) -> None:
    """Measure on all layers; one thread, since others may use the machine."""
    torch.set_num_threads(1)
    data, found = measure.load(layers), []
    names = ("torch", "llmcompressor", "nvidia-modelopt")
    versions = {name: importlib.metadata.version(name) for name in names}
    for name in LAYERS:
        cases: list[Any] = [("smoothquant", 8, 0, m) for m in smoothquant()]
        for group in measure.GROUPS:
            cases += [("awq", 4, group, m) for m in awq(4, group)]
        for kind, bits, group, (row, build) in cases:
            row |= {"method": kind, "layer": name, "bits": bits, "group": group}
            with torch.no_grad():
                task = functools.partial(run, data[name], build)
                found.append(row | measure.attempt(task))
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
