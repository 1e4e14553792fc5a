"""Weight-only and 8-bit matmuls on a Hopper GPU, to a bfloat16 matmul.

K = N = 8192 and K = 8192, N = 28672; medians of loops within one program over eight
sets of weights, so that the 50 MB of L2 hold none of them; every result is checked
against float32. In the same run: bfloat16 by XLA, XLA's own int4 formulation and, where
PyTorch is installed, its int4 tinygemm. Fractions are of the bandwidth and of the
bfloat16 rate measured first. Targets: shared KERNELS.md, repeated in the README here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import record
from kernels_pallas import formats, packing
from kernels_pallas.layouts import GPU, PORTABLE, Stored, Weight, repack
from kernels_pallas.quantized_matmul import quantized_matmul, reference
from kernels_pallas.scaled_matmul import fp8_matmul, int8_matmul

K, OUTPUTS, ROWS, SETS = 8192, (8192, 28672), (1, 16, 64, 256, 1024, 4096), 8
LARGEST_ERROR = 1e-2
FORMATS = {
    "W4A16 g128": (formats.INT4, K // 128),
    "W8A16": (formats.INT8, 1),
    "NF4A16 g64": (formats.NF4, K // 64),
    "FP8A16": (formats.FP8_E4M3, 1),
}


def main() -> None:
    """Check and time every configuration."""
    if jax.default_backend() != "gpu":
        raise SystemExit("bench_gpu_matmul: needs a GPU and jax with CUDA.")
    ceilings = measure_ceilings()
    results = {}
    for n in OUTPUTS:
        for m in ROWS:
            results[f"N={n} M={m}"] = measure(m, n, ceilings)
    record(
        "gpu_matmul", __doc__, {"ceilings": ceilings, "k": K, "microseconds": results}
    )


def measure_ceilings() -> dict[str, float]:
    """Bytes a second of a copy, operations a second of a bfloat16 matmul."""
    a = jnp.ones((2**28,), jnp.float32)
    copy = seconds(lambda a, w: a * w, a, [jnp.float32(1.5)] * 2)
    x, w = (random((8192, 8192), i) for i in range(2))
    dot = seconds(lambda x, w: x @ w, x, [w] * 2)
    return {"bytes_per_second": 2 * a.nbytes / copy, "flops": 2 * 8192**3 / dot}


def measure(m: int, n: int, ceilings: dict[str, float]) -> dict[str, Any]:
    """Microseconds of every form for one shape, with errors and fractions."""
    x = random((m, K), 0)
    dense = [random((K, n), i + 1) for i in range(SETS)]
    base = 1e6 * seconds(lambda x, w: x @ w, x, dense)
    del dense
    found: dict[str, Any] = {"bfloat16": {"us": round(base, 2)}}
    floor = lambda nbytes: max(
        nbytes / ceilings["bytes_per_second"], 2 * m * n * K / ceilings["flops"]
    )
    for name, (run, weights, nbytes, error) in forms(x, n).items():
        us = 1e6 * seconds(run, x, weights)
        ideal = 1e6 * floor(nbytes + x.nbytes + 2 * m * n)
        found[name] = {
            "us": round(us, 2),
            "of_the_roofline": round(ideal / us, 3),
            "to_bfloat16": round(base / us, 3),
            "relative_error": error,
        }
    if m <= 64 and (tinygemm := torch_int4(m, n)) is not None:
        found["torch int4 g128"] = {"us": round(tinygemm, 2)}
    return found


def forms(x: jax.Array, n: int) -> dict[str, tuple[Any, list[Any], int, float]]:
    """What to time: the program, its weights, the bytes it reads, its error."""
    every = {}
    for name, (fmt, groups) in FORMATS.items():
        portable = [random_weight(fmt, n, groups, i) for i in range(SETS)]
        move = jax.jit(functools.partial(repack, fmt=fmt, n=n, k=K, to=GPU))
        ours = functools.partial(
            quantized_matmul, fmt=fmt, n=n, groups=groups, layout=GPU
        )
        candidates: dict[str, tuple[Callable[..., Any], list[Any]]] = {
            name: (ours, [move(w) for w in portable]),
        }
        if name.startswith("W4"):
            candidates["XLA int4 g128"] = (xla_int4, [as_int4(w) for w in portable])
        if name == "W8A16":
            int8 = functools.partial(int8_matmul, fmt=fmt, layout=PORTABLE)
            candidates["W8A8"] = (int8, portable)
        if name == "FP8A16":
            fp8 = functools.partial(fp8_matmul, fmt=fmt, layout=PORTABLE)
            candidates["FP8"] = (fp8, portable)
        stored = Stored(fmt, n, K, groups)
        for label, (run, weights) in candidates.items():
            error = relative_error(run(x, weights[0]), x, portable[0], stored)
            eight = label in ("W8A8", "FP8")
            if not error <= (0.05 if eight else LARGEST_ERROR):
                raise SystemExit(f"{label}, N={n}, M={len(x)}: error {error}.")
            nbytes = sum(a.nbytes for a in jax.tree.leaves(portable[0]))
            every[label] = (run, weights, nbytes, error)
    return every


def relative_error(y: jax.Array, x: jax.Array, weight: Weight, stored: Stored) -> float:
    """Of the Frobenius norm, against float32 products."""
    w = reference.dequantize(weight, stored.fmt, k=stored.k)
    wanted = jnp.matmul(x.astype(jnp.float32), w.T, precision="highest")
    off = jnp.linalg.norm(y.astype(jnp.float32) - wanted)
    return float(off / jnp.linalg.norm(wanted))


def random(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Normal bfloat16."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def random_weight(fmt: formats.Format, n: int, groups: int, seed: int) -> Weight:
    """Random codes (of fp8, finite ones) and positive scales, portable."""
    size = (n, packing.packed_length(K, bits=fmt.bits))
    words = jax.random.bits(jax.random.key(seed), size, jnp.uint8)
    if isinstance(fmt, formats.Float8):
        words &= jnp.uint8(0xBF)
    key = jax.random.key(seed + 1000)
    return Weight(words, jax.random.uniform(key, (n, groups), minval=0.5, maxval=2.0))


def as_int4(weight: Weight) -> tuple[jax.Array, jax.Array]:
    """XLA's own int4 and the scales."""
    codes = formats.INT4.integers(packing.unpack(weight.words, bits=4, count=K))
    return codes.astype(jnp.int4), weight.scale.astype(jnp.bfloat16)


def xla_int4(x: jax.Array, weight: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Dequantize by groups, then multiply: left to XLA."""
    codes, scale = weight
    n, groups = scale.shape
    w = codes.reshape(n, groups, -1).astype(jnp.bfloat16) * scale[..., None]
    return jax.lax.dot_general(x, w.reshape(n, -1), (((1,), (1,)), ((), ())))


def seconds(run: Callable[[Any, Any], Any], x: Any, weights: list[Any]) -> float:
    """Median seconds of one call, in a loop on the device over all weights."""
    like = jax.eval_shape(run, x, weights[0])

    @jax.jit
    def loop(x: Any, weights: list[Any], times: jax.Array) -> Any:
        def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            x, y = carry
            for w in weights:
                x, y = jax.lax.optimization_barrier((x, run(x, w)))
            return x, y

        start = (x, jnp.zeros(like.shape, like.dtype))
        return jax.lax.fori_loop(0, times, body, start)

    def once(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(x, weights, jnp.int32(times)))
        return time.perf_counter() - start

    once(1)
    times = max(1, int(0.02 / max(once(1), 1e-5)))
    # The difference of two lengths leaves out what a launch costs.
    spans = [once(2 * times) - once(times) for _ in range(9)]
    return statistics.median(spans) / (times * len(weights))


def torch_int4(m: int, n: int) -> float | None:
    """Microseconds of PyTorch's int4 tinygemm, or None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    x = torch.randn(m, K, dtype=torch.bfloat16, device="cuda")
    rng = np.random.default_rng(0)
    weights = []
    for _ in range(SETS):
        codes = torch.from_numpy(rng.integers(0, 256, (n, K // 2)).astype(np.uint8))
        packed = torch.ops.aten._convert_weight_to_int4pack(codes.cuda(), 8)
        sides = torch.rand(K // 128, n, 2, dtype=torch.bfloat16, device="cuda")
        weights.append((packed, sides))
    run = lambda: [
        torch.ops.aten._weight_int4pack_mm(x, w, 128, sides) for w, sides in weights
    ]
    run()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / (10 * SETS))
    return statistics.median(times)


if __name__ == "__main__":
    main()
