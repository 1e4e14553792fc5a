"""The peers' side: reads layers, writes errors and seconds. Runs in its own venv.

    python peers.py layers.npz peers.json

needs torch, llmcompressor, gptqmodel and hqq; no jax. A peer that fails is recorded
with its error.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Layer = tuple[torch.Tensor, torch.Tensor]


def llmcompressor(layer: Layer, bits: int, group: int) -> torch.Tensor:
    """GPTQ with activation order by weight; scales of the minimum and maximum."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    x, w = layer
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=group,
        actorder="weight",
    )
    parts = w.reshape(w.shape[0], -1, group)
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-(2 ** (bits - 1)) - torch.round(low / scale)).clamp(
        -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    h = 2 * x.T @ x / len(x)
    return quantize_weight(
        w.clone()[None], h[None], scale[None], zero[None], None, args
    )[0][0]


def gptqmodel(layer: Layer, bits: int, group: int) -> torch.Tensor:
    """Its GPTQ class with activation order and its search for the range (mse)."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    x, w = layer
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    config = QuantizeConfig(
        bits=bits, group_size=group, desc_act=True, sym=False, mse=2.4
    )
    task = GPTQ(module, config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(x[None], None)
    return task.quantize()[0].float()


def hqq(layer: Layer, bits: int, group: int) -> torch.Tensor:
    """Without data."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        layer[1].clone(),
        nbits=bits,
        group_size=group,
        axis=1,
        device="cpu",
        compute_dtype=torch.float32,
    )
    return Quantizer.dequantize(packed, meta).float()


PEERS: dict[str, Callable[[Layer, int, int], torch.Tensor]] = {
    "llmcompressor": llmcompressor,
    "gptqmodel": gptqmodel,
    "hqq": hqq,
}


def measure(
    peer: Callable[..., torch.Tensor], layer: Layer, bits: int, group: int
) -> dict[str, Any]:
    x, w = layer
    try:
        seconds, values = [], torch.zeros_like(w)
        for _ in range(2):
            wall, cpu = time.perf_counter(), time.process_time()
            values = peer(layer, bits, group)
            seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    error = (x @ (w - values).T).norm() / (x @ w.T).norm()
    wall, cpu = min(seconds)
    return {"error": float(error), "seconds": wall, "cpu_seconds": cpu}


def main(layers: str, results: str) -> None:
    torch.manual_seed(0)
    data = np.load(layers)
    cases = json.loads(str(data["cases"]))
    out: dict[str, Any] = {
        "versions": {n: importlib.metadata.version(n) for n in ("torch", *PEERS)},
        "results": [],
    }
    for case in cases:
        x = torch.tensor(data[f"{case['layer']}/x"])
        w = torch.tensor(data[f"{case['layer']}/w"]).T.contiguous()
        for name, peer in PEERS.items():
            found = measure(peer, (x, w), case["bits"], case["group"])
            out["results"].append({**case, "by": name, **found})
            print(out["results"][-1], flush=True)
        with open(results, "w") as f:
            json.dump(out, f, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
