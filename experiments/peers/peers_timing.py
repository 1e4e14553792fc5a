"""Seconds of the peers' GPTQ, from a second moment that is there. Runs without jax.

python -m experiments.peers.peers_timing layers.npz found.json llmcompressor
python -m experiments.peers.peers_timing layers.npz found.json gptqmodel
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from experiments.peers import measure, peers

SIZES = ("512", "1024", "2048")
BITS, GROUP, REPEATS = 4, 128, 5
Timed = tuple[str, Callable[[], Any], Callable[[Any], Any]]


def of_llm_compressor(layer: measure.Layer) -> Iterator[Timed]:
    """With the scales there before, and with its first and best observers counted."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    make = functools.partial(peers.llm_compressor_arguments, layer, BITS, GROUP)
    given = make("memoryless_minmax")
    tensors = ("weights", "hessians")

    def prepare() -> dict[str, Any]:  # It works in place.
        return given | {name: given[name].clone() for name in tensors}

    def search(copies: dict[str, Any]) -> Any:
        found = peers.llm_compressor_scales(layer, copies["quant_args"])
        return quantize_weight(**copies | found)

    name = "llmcompressor: scales not counted"
    yield name, prepare, lambda copies: quantize_weight(**copies)
    for observer in ("memoryless_minmax", "imatrix_mse"):
        given = make(observer)
        yield f"llmcompressor: {observer}", prepare, search


def of_gptqmodel(layer: measure.Layer) -> Iterator[Timed]:
    """Without its search for the range, which takes several times as long."""
    x, w = peers.tensors(layer)

    def prepare() -> Any:
        task = peers.gptqmodel_task(w, BITS, GROUP, desc_act=True)
        task.add_batch(x[None], None)
        task.finalize_hessian()
        return task

    yield "gptqmodel: desc_act, mse=0", prepare, lambda task: task.quantize()


def main(layers: str, results: str, peer: str) -> None:
    """Measure with a thread for each core that the process may use, as ours has."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data, found = measure.load(layers), []
    methods = {"llmcompressor": of_llm_compressor, "gptqmodel": of_gptqmodel}[peer]
    for size in SIZES:
        for name, prepare, run in methods(data[size]):
            row = {"by": name, "layer": size, "bits": BITS, "group": GROUP}
            found.append(row | measure.seconds(run, prepare=prepare, repeats=REPEATS))
            print(found[-1], flush=True)
        measure.save(results, {"versions": peers.versions(), "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
