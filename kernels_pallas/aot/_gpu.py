"""Compile a kernel for an H200 that is not there, and read its registers and code.

Needs ``jax[cuda13]``'s plugin and, for the listings, the ``nvidia-cuda-nvcc`` and
``nvidia-cuda-nvdisasm`` packages; no driver. What is counted is what the threads of one
loop iteration issue. Never a claim of speed.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""
"""What XLA wants to know of the chip: NVIDIA H200 data sheet; CUDA programming guide,
compute capability 9.0."""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(\.L\w+):")


def environment(dump: pathlib.Path) -> dict[str, str]:
    """What a process that calls `compile_gpu` needs set before it starts.

    Args:
      dump: An empty directory for the compiler's listings.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": str(dump),
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
    }


def compile_gpu(
    fn: Callable[..., Any], args: tuple[jax.ShapeDtypeStruct, ...], dump: pathlib.Path
) -> dict[str, Any]:
    """Compile `fn`, which makes one Mosaic GPU kernel, and read its listings.

    Args:
      fn: A function of arrays.
      args: Their shapes and dtypes.
      dump: The directory of `environment`.

    Returns:
      ``registers`` of a thread, ``stack`` bytes, ``spill_stores`` and ``spill_loads``
      in bytes, ``shared`` bytes of a block of threads, ``code``: every instruction's
      count, and ``loop``: those of one pass of the innermost loop of tensor-core
      instructions.

    Raises:
      FileNotFoundError: If a listing, so the environment or a package, is missing.
    """
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    device = AbstractDevice("NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        jax.jit(fn).lower(*placed).compile()
    return _resources(
        _listing(dump, ".ptxas"), _listing(dump, ".resources.txt")
    ) | _code(_listing(dump, ".sass*"))


def _listing(dump: pathlib.Path, suffix: str) -> str:
    found = sorted(dump.glob(f"*{suffix}"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"compile_gpu: dump must hold one listing *{suffix} after compiling; got "
            f"{[f.name for f in found]}. Start the process with environment(dump), an "
            "empty directory, and install nvidia-cuda-nvcc and nvidia-cuda-nvdisasm."
        )
    return found[0].read_text()


def _resources(ptxas: str, mosaic: str) -> dict[str, int]:
    """Of the assembler's report and Mosaic's own."""
    number = lambda pattern, text: int(re.findall(pattern, text)[0])
    return {
        "registers": number(r"Used (\d+) registers", ptxas),
        "stack": number(r"(\d+) bytes stack frame", ptxas),
        "spill_stores": number(r"(\d+) bytes spill stores", ptxas),
        "spill_loads": number(r"(\d+) bytes spill loads", ptxas),
        "shared": number(r"smem_scratch_bytes=(\d+)", mosaic),
    }


def _code(sass: str) -> dict[str, dict[str, int]]:
    """Instructions by name, of everything and of the innermost tensor-core loop."""
    labels, code = {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        if found := _INSTRUCTION.search(line):
            code.append((found[1].split(".")[0], found[2]))
    names = [name for name, _ in code]
    loops = []
    for end, (name, rest) in enumerate(code):
        target = re.search(r"\.L\w+", rest)
        if name == "BRA" and target and labels.get(target[0], end) < end:
            body = names[labels[target[0]] : end + 1]
            loops += [body] * ("HGMMA" in body)
    inner = min(loops, key=len, default=[])
    return {"code": _count(names), "loop": _count(inner)}


def _count(names: list[str]) -> dict[str, int]:
    return dict(collections.Counter(names).most_common())
