"""A lifted matmul with a weight of few bits, to XLA's float32 matmul, on a CPU.

W8A16 a channel, W4A16 in groups of 128, and W8A8; K = N = 1024, 2048, 4096; 1, 8 and
128 rows. Targets at 4096: W8A16 0.6x and W4A16 0.8x with one row, 0.4x with 128; and
the W4 program takes less memory than half the bytes of a bfloat16 weight.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxcompress as jc
from experiments.benchmarks.timing import compare, record

SIZES, ROWS = (1024, 2048, 4096), (1, 8, 128)
FORMATS = {
    "W8A16": jc.quant.int8(),
    "W4A16 g128": jc.quant.int4(group_size=128),
    "W3A16 g128": jc.quant.int3(group_size=128),
    "NF4 g64": jc.quant.nf4(),
    "FP8": jc.quant.fp8_e4m3(),
    "W8A8": jc.presets.W8A8,
}


def main() -> None:
    """Time each size and number of rows in turns, and weigh the programs."""
    times, memory = {}, {}
    dense, lifted = jax.jit(jnp.matmul), jax.jit(jc.lift(jnp.matmul))
    for size in SIZES:
        w = jax.random.normal(jax.random.key(0), (size, size))
        leaves = {
            name: jax.jit(lambda w, fmt=fmt: jc.compress({"w": w}, {"w": fmt}))(w)["w"]
            for name, fmt in FORMATS.items()
        }
        for rows in ROWS:
            x = jax.random.normal(jax.random.key(1), (rows, size))
            programs: dict[str, Any] = {"float32": lambda x=x, w=w: lambda: dense(x, w)}
            for name, leaf in leaves.items():
                programs[name] = lambda x=x, leaf=leaf: lambda: lifted(x, leaf)
            key = f"{size}, {rows} rows"
            times[key] = compare(programs, to="float32", rounds=15, calls=4)
        memory[str(size)] = _memory(lifted, size, leaves["W4A16 g128"])
    record(
        "cpu_matmul",
        __doc__,
        {
            "target_ratio": {"W8A16": 0.6, "W4A16 g128": 0.8, "128 rows": 0.4},
            "w4_bytes_over_bfloat16_bytes": memory,
            "target_bytes": 0.5,
            "times": times,
        },
    )


def _memory(lifted: Any, size: int, leaf: Any) -> float:
    """Arguments, result and temporaries of the program with one row."""
    x = jax.ShapeDtypeStruct((1, size), jnp.float32)
    found = lifted.lower(x, leaf).compile().memory_analysis()
    used = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
    )
    return round(used / (2 * size * size), 3)


if __name__ == "__main__":
    main()
