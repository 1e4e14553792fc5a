"""``python -m kernels_pallas.tune``: measure block sizes on the device in use.

For each shape, every candidate is checked against the default's result and timed in
turns with it; the best goes into the device kind's table if it gains at least 3 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import formats, packing, tables
from kernels_pallas.layouts import LAYOUTS, PORTABLE, Stored, Weight, repack
from kernels_pallas.quantized_matmul import _gpu_config as gpu_config
from kernels_pallas.quantized_matmul import _tpu_blocks as tpu_blocks
from kernels_pallas.quantized_matmul import gpu, tpu, xla
from kernels_pallas.target import Target, current_target

LEAST_GAIN = 1.03


def main() -> None:
    """Tune the shapes asked for and rewrite the device's table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 128])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--group", type=int, default=128, help="0: a scale an output")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    target = current_target()
    layout = LAYOUTS.get(target.platform, PORTABLE)
    file = tables.path(target.kind)
    entries = json.loads(file.read_text())["entries"] if file.exists() else {}
    for size in options.sizes:
        for bits in options.bits:
            groups = size // options.group if options.group else 1
            fmt = formats.Integer(bits)
            stored = Stored(fmt, size, size, groups, layout)
            weight = random_weight(stored)
            for rows in options.rows:
                name = tables.key(rows, stored)
                entries[name] = tune(rows, stored, weight, target, options.rounds)
                sys.stdout.write(f"{name}: {entries[name]}\n")
    report = {
        "device": target.kind,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "entries": {name: e for name, e in sorted(entries.items()) if e is not None},
    }
    file.write_text(json.dumps(report, indent=1) + "\n")


def random_weight(stored: Stored) -> Weight:
    """Random codes and scales, in the layout asked for."""
    fmt, n, k, groups, layout = stored
    rng = np.random.default_rng(0)
    bytes_ = packing.packed_length(k, bits=fmt.bits)
    words = jnp.asarray(rng.integers(0, 256, size=(n, bytes_)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, size=(n, groups)), jnp.float32)
    move = functools.partial(repack, fmt=fmt, n=n, k=k, to=layout)
    return jax.jit(move)(Weight(words, scale))


def tune(
    m: int, stored: Stored, weight: Weight, target: Target, rounds: int
) -> dict[str, Any] | None:
    """The best settings and what they gain over the default, or None."""
    floats = jnp.float32 if target.platform == "cpu" else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (m, stored.k), floats)
    default, *others = candidates(m, stored, target)
    wanted = jax.jit(_form(stored, target, default))(x, weight)
    runs = {}
    for settings in (default, *others):
        run = jax.jit(_form(stored, target, settings))
        try:
            y = jax.block_until_ready(run(x, weight))
        except Exception as error:  # A cut that the device refuses is no candidate.
            sys.stdout.write(f"  {settings}: {str(error).splitlines()[0][:100]}\n")
            continue
        tolerance = 1e-2 * float(jnp.abs(wanted).max())
        if bool((jnp.abs(y - wanted) <= tolerance).all()):
            runs[json.dumps(settings)] = lambda run=run: run(x, weight)
    seconds = in_turns(runs, rounds)
    best = min(seconds, key=seconds.__getitem__)
    gain = seconds[json.dumps(default)] / seconds[best]
    if gain < LEAST_GAIN:
        return None
    microseconds = round(1e6 * seconds[best], 1)
    return {
        "settings": json.loads(best),
        "microseconds": microseconds,
        "gain": round(gain, 3),
    }


def candidates(m: int, stored: Stored, target: Target) -> Iterator[dict[str, Any]]:
    """Settings of the form that runs on the device, the default's first."""
    fmt, n, k, groups, _ = stored
    match target.platform:
        case "tpu":
            default = tpu_blocks.blocks_for(m, n, k, fmt, groups)
            yield dataclasses.asdict(default)
            unit = tpu_blocks.k_unit(k, groups)
            for blocks in (
                dataclasses.replace(default, n=columns, k=inputs, scale_after=after)
                for columns in (256, 512, 1024, 2048)
                for inputs in (512, 1024, 2048, 4096)
                for after in {default.scale_after, groups == 1, True}
                if n % columns == 0 and k % inputs == 0 and inputs % unit == 0
            ):
                if tpu_blocks.vmem_bytes(blocks, k, fmt, groups) <= 14 * 2**20:
                    yield dataclasses.asdict(blocks)
        case "gpu":
            default = gpu_config.config_for(m, n, k, fmt, groups)
            yield dataclasses.asdict(default)
            group = None if groups == 1 else k // groups
            for config in (
                dataclasses.replace(default, tile_k=size, stages=stages, split_k=split)
                for size in (128, 256, 512)
                for stages in (2, 3, 4, 6)
                for split in (1, 2, 4)
                if k % (size * split) == 0
            ):
                used = gpu_config.shared_memory(config, fmt, group)
                if used <= gpu_config.SHARED_MEMORY:
                    yield dataclasses.asdict(config)
        case _:
            from kernels_pallas.quantized_matmul.api import chunk_of

            default = chunk_of(stored, target)
            yield {"chunk": default}
            yield from (
                {"chunk": 2**power}
                for power in range(16, 23)
                if default != 2**power <= n * k
            )


def _form(
    stored: Stored, target: Target, settings: dict[str, Any]
) -> Callable[[jax.Array, Weight], jax.Array]:
    fmt = stored.fmt
    match target.platform:
        case "tpu":
            blocks = tpu_blocks.Blocks(**settings)
            return lambda x, w: tpu.quantized_matmul(x, w, fmt, blocks=blocks)
        case "gpu":
            config = gpu_config.Config(**settings)
            return lambda x, w: gpu.quantized_matmul(x, w, fmt, config=config)
        case _:
            return lambda x, w: xla.quantized_matmul(x, w, fmt, **settings)


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, called in turns so that disturbances meet all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


if __name__ == "__main__":
    main()
