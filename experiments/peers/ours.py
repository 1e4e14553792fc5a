"""Ours on the same layers.

    python -m experiments.peers.ours layers.npz ours.json

GPTQ with one setting for all layers and formats: ``act_order=True``, else the defaults,
once for each damping that peers are run with; then with ``refine=0``, which is one pass
as peers do. "Permuted" groups hold inputs in order of
their second moment, as GPTQModel's ``desc_act`` has them: the same call on the permuted
weight and statistics, an index for each input being stored beside it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from experiments.peers import measure
from jaxcompress import quant
from jaxcompress.lift import statistics

LAYERS = ("query", "intermediate", "output", "512", "1024")
DAMPINGS = (0.01, 0.05)
Method = tuple[dict[str, Any], Callable[[], dict[str, float]]]


class Prepared:
    """A layer on the device, with the statistics of its calibration rows."""

    def __init__(self, layer: measure.Layer) -> None:
        x = jnp.asarray(layer["x"])
        self.layer, self.w = layer, jnp.asarray(layer["w"])
        self.stats = statistics(x, gram=True)
        self.order = jnp.argsort(-self.stats.total_square)
        self.permuted = statistics(x[:, self.order], gram=True)

    def errors(self, weight: Callable[[], jax.Array]) -> dict[str, float]:
        return measure.errors(self.layer, np.asarray(weight()))

    def outputs(self, leaf: Callable[[], Any]) -> dict[str, float]:
        apply = jax.jit(jc.lift(lambda w, x: x @ w))
        compressed = leaf()
        run = lambda x: np.asarray(apply(compressed, jnp.asarray(x)))
        return measure.output_errors(self.layer, run)


def gptq(
    layer: Prepared, fmt: Any, damping: float, permuted: bool, refine: int = 2
) -> jax.Array:
    """The weight that the leaf stands for."""
    if not permuted:
        leaf = quant.gptq_weight(
            layer.w, fmt, layer.stats, act_order=True, damping=damping, refine=refine
        )
        return leaf.materialize()
    w = layer.w[layer.order]
    leaf = quant.gptq_weight(w, fmt, layer.permuted, damping=damping)
    return leaf.materialize()[jnp.argsort(layer.order)]


def weights(layer: Prepared, bits: int, group: int) -> Iterator[Method]:
    """Rounding and GPTQ to integers with zero points."""
    fmt = quant.integer(bits, group_size=group, symmetric=False)
    searched = fmt.replace(search=quant.mse())
    for name, chosen in (("rounding", fmt), ("rounding, mse", searched)):
        row = {"by": f"ours: {name}", "groups": "consecutive", "settings": {}}
        run = lambda chosen=chosen: quant.quantize(layer.w, chosen).materialize()
        yield row, functools.partial(layer.errors, run)
    for permuted, refine in ((False, 2), (False, 0), (True, 2)):
        for damping in DAMPINGS:
            groups = "permuted" if permuted else "consecutive"
            settings: dict[str, Any] = {"refine": refine, "damping": damping}
            settings["act_order"] = not permuted
            row = {"by": "ours: gptq", "groups": groups, "settings": settings}
            run = functools.partial(gptq, layer, fmt, damping, permuted, refine)
            yield row, functools.partial(layer.errors, run)


def normal_float(layer: Prepared) -> Iterator[Method]:
    """NF4 of 64 inputs: rounded, and by GPTQ."""
    fmt = quant.nf4(group_size=64)
    rounded = lambda: quant.quantize(layer.w, fmt).materialize()
    moved = functools.partial(gptq, layer, fmt, 0.01, False)
    for name, run in (("rounding to nf4", rounded), ("gptq to nf4", moved)):
        row = {"by": f"ours: {name}", "groups": "consecutive", "settings": {}}
        yield row, functools.partial(layer.errors, run)


def awq(layer: Prepared, group: int) -> Iterator[Method]:
    """Symmetric, with all 16 codes as peers have them, and with a zero point."""
    for symmetric in (True, False):
        fmt = quant.int4(group_size=group, symmetric=symmetric, narrow=False)
        row = {"by": "ours", "method": "awq", "symmetric": symmetric}
        leaf = functools.partial(quant.awq_weight, layer.w, fmt, layer.stats)
        yield row | {"settings": "narrow=False"}, functools.partial(layer.outputs, leaf)


def smoothquant(layer: Prepared) -> Iterator[Method]:
    """int8 weights a channel, ranges of least output error; int8 activations."""
    int8 = quant.Integer(bits=8)
    for name, scheme in (
        ("token", quant.dynamic(int8)),
        ("static", quant.static(int8)),
    ):
        for alpha in (0.5, 0.65, 0.8, 1.0):
            fmt = quant.int8(activations=scheme, search=quant.mse())
            row = {"by": "ours", "method": "smoothquant", "activations": name}
            leaf = functools.partial(
                quant.smoothquant_weight, layer.w, fmt, layer.stats, alpha=alpha
            )
            run = functools.partial(layer.outputs, leaf)
            yield row | {"settings": f"alpha={alpha}"}, run


def methods(layer: Prepared, bits: int, group: int) -> Iterator[Method]:
    """All that this file measures for one layer and format."""
    yield from weights(layer, bits, group)
    if bits == 4:
        yield from awq(layer, group)


def main(layers: str, results: str) -> None:
    names = ("jax", "jaxlib", "jaxcompress")
    versions = {name: importlib.metadata.version(name) for name in names}
    found: list[dict[str, Any]] = []
    data = measure.load(layers)
    for name in LAYERS:
        layer = Prepared(data[name])
        cases = [(b, g, m) for b, g in measure.FORMATS for m in methods(layer, b, g)]
        cases += [(4, 64, m) for m in normal_float(layer)]
        cases += [(8, 0, m) for m in smoothquant(layer)]
        for bits, group, (row, run) in cases:
            row |= {"layer": name, "bits": bits, "group": group}
            found.append(row | measure.attempt(run))
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
