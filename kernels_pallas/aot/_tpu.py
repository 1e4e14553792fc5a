"""Compile a kernel for a TPU that is not there, and read its static cycles.

A cycle is one bundle of instructions that the compiler scheduled: issue slots, not
stalls on memory, so figures are lower bounds. They are set against the cycles in which
the memory delivers the weight; a ratio below one says that the memory is the limit.
Never a claim of speed.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.extend.core import Jaxpr
from jax.sharding import SingleDeviceSharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Rates of what JAX shows as one device.

    Attributes:
      hertz: Clock of its cores.
      bytes_per_second: Of its memory.
      cores: Cores that share the parallel axes of a grid.
    """

    hertz: float
    bytes_per_second: float
    cores: int = 1


# Memory: cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}; half a chip is a device on v7x.
# Clocks are not published there; they follow from the published bfloat16 peaks, 197,
# 459, 918 and 2307 TFLOP/s a chip, over the 2 * 128 * 128 operations a cycle of the
# four matrix units of a core (v5e, v5p with 2 cores) or 4 * 256 * 256 of the two
# (v6e, v7x with 2 cores).
CHIPS = {
    "v5e": Chip(hertz=1.50e9, bytes_per_second=819e9),
    "v5p": Chip(hertz=1.75e9, bytes_per_second=2765e9, cores=2),
    "v6e": Chip(hertz=1.75e9, bytes_per_second=1640e9),
    "tpu7x": Chip(hertz=2.20e9, bytes_per_second=3690e9),
}


def environment(topology: str, dump: pathlib.Path) -> dict[str, str]:
    """What a process that calls `compile_tpu` needs set before it starts.

    Args:
      topology: ``"v5e:2x2"``, ``"v5p:2x2x1"``, ``"v6e:2x2"`` or ``"tpu7x:2x2x1"``.
      dump: An empty directory for the compiler's schedules.

    Raises:
      ValueError: If the topology's chip is unknown.
    """
    _chip(topology)
    flags = {"xla_jf_dump_to": dump, "xla_jf_dump_llo_text": "true"}
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": " ".join(f"--{name}={at}" for name, at in flags.items()),
    }


def compile_tpu(
    fn: Callable[..., Any],
    args: tuple[jax.ShapeDtypeStruct, ...],
    topology: str,
    dump: pathlib.Path,
) -> dict[str, Any]:
    """Compile `fn`, which makes one `pallas_call`, and read what was scheduled.

    One process for each call, started with `environment`: the compiler may abort.

    Args:
      fn: From activations and the arrays of a weight to a result.
      args: Their shapes; all but the first are the weight.
      topology: What to compile for.
      dump: As in `environment`.

    Returns:
      ``grid`` and ``step_cycles``: an upper bound on the bundles of one step (it counts
      what runs once, too); ``cycles`` of all steps, on one core; ``weight_bytes`` and
      the ``hbm_cycles`` of their way; ``ratio`` of the two; ``slots``: instructions of
      a step by unit, with spills.

    Raises:
      ValueError: If the topology's chip is unknown, or no kernel was dumped.
    """
    chip = _chip(topology)
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    sharding = SingleDeviceSharding(device.devices[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in args]
    traced = jax.jit(fn).trace(*placed)
    name, grid = next(_kernels(traced.jaxpr.jaxpr))
    traced.lower().compile()
    slots = _slots(_schedule(dump, name))
    cycles = slots["bundles"] * math.prod(grid) / chip.cores
    weight_bytes = sum(a.size * a.dtype.itemsize for a in args[1:])
    hbm_cycles = weight_bytes / chip.bytes_per_second * chip.hertz
    return {
        "topology": topology,
        "kernel": name,
        "grid": grid,
        "step_cycles": slots.pop("bundles"),
        "cycles": cycles,
        "weight_bytes": weight_bytes,
        "hbm_cycles": hbm_cycles,
        "ratio": cycles / hbm_cycles,
        "slots": slots,
    }


def _chip(topology: str) -> Chip:
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(
            f"compile_tpu: topology must begin with one of {', '.join(CHIPS)}; got "
            f"{topology!r}."
        )
    return CHIPS[name]


def _kernels(jaxpr: Jaxpr) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and grid of each `pallas_call`, in nested jaxprs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield str(eqn.params["name"]), tuple(eqn.params["grid_mapping"].grid)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if eqn.primitive.name != "pallas_call" and hasattr(inner, "eqns"):
                yield from _kernels(inner)


def _schedule(dump: pathlib.Path, name: str) -> pathlib.Path:
    """The table of slots for each bundle of the kernel `name`."""
    pattern = f"*-{name}*-final_hlo-static-per-bundle-utilization.txt"
    found = sorted(dump.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"compile_tpu: dump must hold one {pattern}; got {len(found)} in {dump}. "
            "Start the process with `environment(topology, dump)` and an empty dump."
        )
    return found[0]


def _slots(path: pathlib.Path) -> dict[str, int]:
    """Bundles, and instructions by unit: one row a bundle, one column a unit."""
    lines = path.read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    rows = [[int(used) for used in line.split()] for line in lines[4:] if line.strip()]
    totals = {unit: sum(row[i] for row in rows) for i, unit in enumerate(units)}
    return {"bundles": len(rows), **totals}
