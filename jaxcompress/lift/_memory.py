"""How much memory a sweep will take, told from its program before it runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxcompress.layout import Axes
from jaxcompress.leaf import nbytes
from jaxcompress.lift import _compat
from jaxcompress.lift._explain import UseSite

# Second moments, factors and feedback; the weight, its target, error and codes.
_SQUARES, _COPIES = 6, 6


def sweep_bytes(
    jaxpr: Any,
    weights: Sequence[bool],
    *,
    streams: int,
    params: Mapping[str, Any],
    sites: Sequence[UseSite],
    axes: Mapping[str, Axes],
) -> int:
    """Bytes that a sweep needs at most, about.

    Args:
      jaxpr: The program, of one batch.
      weights: Which of its inputs are weights.
      streams: Batches that run beside each other.
      params: The weights that are compressed, by path.
      sites: Where they are used.
      axes: Their axes.

    Returns:
      The weights before and after, every batch with the activations that are alive at
      once, and what the most expensive weight takes to compress.
    """
    body = _compat.program(jaxpr)
    moving = [not w for w in weights]
    inputs = sum(nbytes(v.aval) for v, m in zip(body.invars, moving, strict=True) if m)
    fixed = sum(
        nbytes(v.aval) for v, m in zip(body.invars, moving, strict=True) if not m
    )
    times: dict[str, int] = {}
    for site in sites:
        times[site.path] = max(times.get(site.path, 1), site.times)
    work = max(
        _work_bytes(w.shape, axes[path], times.get(path, 1))
        for path, w in params.items()
    )
    return 2 * fixed + streams * (inputs + live_bytes(jaxpr, moving)) + work


def live_bytes(jaxpr: Any, moving: Sequence[bool]) -> int:
    """Most bytes alive at once of what follows from the marked inputs, without them."""
    body = _compat.program(jaxpr)
    last = {v: i for i, eqn in enumerate(body.eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(body.outvars), len(body.eqns))
    follows = {v for v, m in zip(body.invars, moving, strict=True) if m}
    alive: dict[Any, int] = {}
    most = 0
    for i, eqn in enumerate(body.eqns):
        marks = [not isinstance(v, jex.Literal) and v in follows for v in eqn.invars]
        if any(marks):
            follows.update(eqn.outvars)
            alive |= {v: nbytes(v.aval) for v in eqn.outvars}
            most = max(most, sum(alive.values()) + _inside(eqn, marks))
        alive = {v: n for v, n in alive.items() if last.get(v, -1) > i}
    return most


def _inside(eqn: Any, marks: list[bool]) -> int:
    """Bytes that programs within an equation need beside its operands."""
    most = 0
    for inner in _compat.sub_jaxprs(eqn):
        n = len(_compat.program(inner).invars)
        # The operands of a conditional follow its index; of others all may move.
        fitting = {len(marks): marks, len(marks) - 1: marks[1:]}
        most = max(most, live_bytes(inner, fitting.get(n, [True] * n)))
    return most


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def _work_bytes(shape: tuple[int, ...], axes: Axes, times: int) -> int:
    """Float32 bytes to compress a weight, the entries that are used at once."""
    k = math.prod(shape[a] for a in axes.contract)
    at_once = max(1, math.prod(shape[: axes.stack]) // times)
    outputs = math.prod(shape) // (k * math.prod(shape[: axes.stack]))
    return 4 * at_once * k * (_SQUARES * k + _COPIES * outputs)


def available_bytes() -> int | None:
    """Memory of the default device, or of the host if that is the device."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        if not all(name in os.sysconf_names for name in names):
            return None
        return math.prod(os.sysconf(name) for name in names)
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(needed: int, limit: int | None, *, who: str) -> None:
    """Refuse what cannot fit.

    Raises:
      MemoryError: If `needed` is above `limit`, or above what the device has.
    """
    given = limit is not None
    limit = limit if given else available_bytes()
    if limit is not None and needed > limit:
        raise MemoryError(
            f"{who}: about {needed:,} bytes are needed, and "
            + (f"memory_limit is {limit:,}" if given else f"there are {limit:,}")
            + "; pass fewer or smaller batches, or leave the largest weights out."
        )
