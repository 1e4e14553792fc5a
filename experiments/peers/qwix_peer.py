"""Qwix, in JAX: its rounding, GPTQ and AWQ on the same layers.

    python -m experiments.peers.qwix_peer layers.npz qwix.json

Its GPTQ runs eagerly and compiles for each input of a block; so only one layer.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.peers import measure

LAYERS = ("query",)
Method = tuple[dict[str, Any], Callable[[], jax.Array]]


def how(bits: int, group: int, method: str) -> Any:
    """Integers with a scale for each output and group of inputs."""
    from qwix._src.core import qarray

    qtype = {4: jnp.int4, 2: jnp.int2}.get(bits, f"int{bits}")
    return qarray.HowToQuantize(
        qtype=qtype,
        channelwise_axes=(0,),
        tiled_axes={1: group},
        calibration_method=method,
    )


def gptq(layer: measure.Layer, bits: int, group: int, method: str) -> jax.Array:
    """Its `contrib.gptq_core`, which has no activation order."""
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    x, w = jnp.asarray(layer["x"]), jnp.asarray(layer["w"])
    found, _ = gptq_core.quantize_weight(w.T, x.T @ x, how(bits, group, method))
    return qarray.dequantize(found).T


def awq(layer: measure.Layer, group: int) -> jax.Array:
    """Its `contrib.awq_core`."""
    from qwix._src.core import qarray
    from qwix.contrib import awq_core

    x, w = jnp.asarray(layer["x"]), jnp.asarray(layer["w"])
    size = awq_core.compute_act_scale(x)
    found, scale = awq_core.quantize_weight(w.T, size, how(4, group, "absmax"))
    return (qarray.dequantize(found) / scale).T


def rounding(layer: measure.Layer, bits: int, group: int) -> jax.Array:
    """Its weight quantization after training."""
    from qwix._src.core import qarray

    w = jnp.asarray(layer["w"]).T
    return qarray.dequantize(qarray.quantize(w, how(bits, group, "absmax"))).T


def methods(layer: measure.Layer, bits: int, group: int) -> Iterator[Method]:
    """Symmetric (absmax), and with a zero point (minmax)."""
    row = {"by": "qwix: rounding", "groups": "consecutive", "settings": {}}
    yield row, functools.partial(rounding, layer, bits, group)
    for method in ("absmax", "minmax"):
        settings = {"calibration_method": method, "damping": 0.01}
        row = {"by": "qwix: gptq", "groups": "consecutive", "settings": settings}
        yield row, functools.partial(gptq, layer, bits, group, method)
    if bits == 4:
        row = {"by": "qwix", "method": "awq", "symmetric": True, "settings": "default"}
        yield row, functools.partial(awq, layer, group)


def main(layers: str, results: str) -> None:
    """Measure."""
    data, found = measure.load(layers), []
    versions = {"qwix": importlib.metadata.version("qwix")}
    for name in LAYERS:
        layer = data[name]
        cases = [(b, g, m) for b, g in measure.FORMATS for m in methods(layer, b, g)]
        for bits, group, (row, weight) in cases:
            row |= {"layer": name, "bits": bits, "group": group}
            run = lambda w=weight, layer=layer: measure.errors(layer, np.asarray(w()))
            found.append(row | measure.attempt(run))
            print(found[-1], flush=True)
        measure.save(results, {"versions": versions, "results": found})


if __name__ == "__main__":
    main(*sys.argv[1:])
