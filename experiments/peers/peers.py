"""Peers in PyTorch that quantize weights alone. Runs in their environment, without jax.

    python -m experiments.peers.peers layers.npz found.json llmcompressor bitsandbytes
    python -m experiments.peers.peers layers.npz found.json gptqmodel

A peer that fails is recorded with its error.
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

Weights = Callable[[measure.Layer, int, int], np.ndarray]
LAYERS = ("query", "intermediate", "output", "512", "1024")
DAMPINGS = (0.01, 0.05)


def tensors(layer: measure.Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration rows, and the weight as torch keeps it, ``[out, in]``."""
    return torch.tensor(layer["x"]), torch.tensor(layer["w"]).T.contiguous()


def llm_compressor_scales(layer: measure.Layer, args: Any) -> dict[str, Any]:
    """Scales and zero points by the observer that the arguments name."""
    from llmcompressor.observers import Observer

    x, w = tensors(layer)
    watch = Observer.load_from_registry(args.observer, base_name="weight", args=args)
    if args.observer == "imatrix_mse":
        watch._imatrix_sum = x.square().sum(0)
        watch._imatrix_count = torch.tensor(len(x))
    found = watch(w).get_qparams()
    return {name: found[name][None] for name in ("scale", "zero_point")}


def llm_compressor_arguments(
    layer: measure.Layer, bits: int, group: int, observer: str, **options: Any
) -> dict[str, Any]:
    """Arguments of its `quantize_weight`."""
    from compressed_tensors.quantization import QuantizationArgs

    x, w = tensors(layer)
    options = {"symmetric": False, "actorder": "weight"} | options
    args = QuantizationArgs(
        num_bits=bits, strategy="group", group_size=group, observer=observer, **options
    )
    return {
        "weights": w[None],
        "hessians": (2 * x.T @ x / len(x))[None],
        "global_scale": None,
        "quant_args": args,
    } | llm_compressor_scales(layer, args)


def llm_compressor(
    layer: measure.Layer, bits: int, group: int, *, damping: float, **options: Any
) -> np.ndarray:
    """Its GPTQ, which works in place on what it is given."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = llm_compressor_arguments(layer, bits, group, **options)
    return quantize_weight(**arguments, percdamp=damping)[0][0].T.numpy()


def gptqmodel_task(w: torch.Tensor, bits: int, group: int, **options: Any) -> Any:
    """Its GPTQ object for one linear layer."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    config = QuantizeConfig(bits=bits, group_size=group, sym=False, **options)
    task = GPTQ(module, config)
    task.quantizer.configure(perchannel=True)
    return task


def gptqmodel(
    layer: measure.Layer, bits: int, group: int, *, damping: float, **options: Any
) -> np.ndarray:
    """Its GPTQ class, with its search for the range (mse)."""
    x, w = tensors(layer)
    task = gptqmodel_task(w, bits, group, damp_percent=damping, **options)
    task.add_batch(x[None], None)
    return task.quantize()[0].detach().float().T.numpy()


def hqq(layer: measure.Layer, bits: int, group: int) -> np.ndarray:
    """Without data; its zero points are floating."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        tensors(layer)[1],
        nbits=bits,
        group_size=group,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    return Quantizer.dequantize(packed, meta).float().T.numpy()


def nf4(layer: measure.Layer, bits: int, group: int) -> np.ndarray:
    """NormalFloat of bitsandbytes, floating scales of `group` inputs."""
    from bitsandbytes import functional

    assert bits == 4
    packed, state = functional.quantize_4bit(
        tensors(layer)[1], blocksize=group, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).float().T.numpy()


def of_llm_compressor() -> Iterator[tuple[dict[str, Any], Weights]]:
    """Its observers in their default settings and one wider search."""
    wide = {"maxshrink": 0.8, "norm": 2.0, "patience": 100}
    settings: list[dict[str, Any]] = [
        {"observer": "memoryless_minmax", "damping": 0.01},
        {"observer": "memoryless_mse", "observer_kwargs": wide, "damping": 0.01},
        {"observer": "imatrix_mse", "symmetric": True, "damping": 0.01},
        {"observer": "imatrix_mse", "actorder": None, "damping": 0.01},
        {"observer": "imatrix_mse", "actorder": "group", "damping": 0.01},
    ]
    for observer in ("memoryless_mse", "imatrix_mse"):
        settings += [{"observer": observer, "damping": d} for d in DAMPINGS]
    for options in settings:
        row = {"by": "llmcompressor", "groups": "consecutive", "settings": options}
        yield row, functools.partial(llm_compressor, **options)


def of_gptqmodel() -> Iterator[tuple[dict[str, Any], Weights]]:
    """Consecutive groups (`act_group_aware`), and groups of permuted inputs."""
    aware = {"desc_act": False, "act_group_aware": True, "mse": 2.4, "damping": 0.05}
    row = {"by": "gptqmodel", "groups": "consecutive", "settings": aware}
    yield row, functools.partial(gptqmodel, **aware)
    for mse, damping in ((2.4, 0.01), (2.4, 0.05), (2.0, 0.05)):
        options = {"desc_act": True, "mse": mse, "damping": damping}
        row = {"by": "gptqmodel", "groups": "permuted", "settings": options}
        yield row, functools.partial(gptqmodel, **options)


def methods(peer: str) -> Iterator[tuple[dict[str, Any], Weights]]:
    """What is known of each method, and the method."""
    if peer == "llmcompressor":
        yield from of_llm_compressor()
        yield {"by": "hqq", "groups": "consecutive", "settings": {}}, hqq
    if peer == "gptqmodel":
        yield from of_gptqmodel()
    if peer == "bitsandbytes":
        yield {"by": "bitsandbytes nf4", "groups": "consecutive", "settings": {}}, nf4


def versions() -> dict[str, str]:
    """Of what is installed here."""
    names = ("torch", "llmcompressor", "hqq", "bitsandbytes", "gptqmodel")
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {n: importlib.metadata.version(n) for n in names if n in installed}


def run(layer: measure.Layer, bits: int, group: int, weights: Weights) -> Any:
    """Errors of one method."""
    return measure.errors(layer, weights(layer, bits, group))


def main(layers: str, results: str, *peers: str) -> None:
    """Measure on all layers; one thread, since others may use the machine."""
    torch.set_num_threads(1)
    data, found = measure.load(layers), []
    for name in LAYERS:
        for peer in peers:
            formats = [(4, 64)] if peer == "bitsandbytes" else measure.FORMATS
            cases = [(b, g, m) for b, g in formats for m in methods(peer)]
            for bits, group, (row, weights) in cases:
                row |= {"layer": name, "bits": bits, "group": group}
                task = functools.partial(run, data[name], bits, group, weights)
                found.append(row | measure.attempt(task))
                print(found[-1], flush=True)
            measure.save(results, {"versions": versions(), "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
