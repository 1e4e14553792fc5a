"""What a sweep is told of an algorithm, and what it reports of a layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxcompress.leaf import Leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How a sweep compresses one weight.

    Attributes:
      run: ``(w, stats, *, axes, path) -> leaf``, pure and jittable: of the weight
        ``float[*stack, *core]`` and the `Statistics` of what enters its matmul, or
        None where nothing does (an embedding look-up).
      baseline: The same without the statistics, whose error a layer's is compared to.
      name: What the log and the fingerprint of a resumed sweep call it.
    """

    run: Callable[..., Leaf]
    baseline: Callable[..., Leaf]
    name: str


def core_name(core: Any) -> str:
    """A name of a function that says its options, the same in every run."""
    if not isinstance(core, functools.partial):
        return core.__name__
    options = [_option(v) for v in core.args]
    options += [f"{k}={_option(v)}" for k, v in sorted(core.keywords.items())]
    return f"{core_name(core.func)}({', '.join(options)})"


def _option(value: Any) -> str:
    return core_name(value) if callable(value) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What a sweep reports of one weight it compressed.

    Attributes:
      path: Key path.
      entry: Which entry of the stack, or None of a weight that is whole.
      method: What was done.
      rows: Rows that entered its matmul.
      error_before: Relative output error ``|X (W - Q)|^2 / |X W|^2`` of the baseline;
        None without statistics.
      error: Of the algorithm.
      seconds: Time it took.
      resumed: Whether it was read back from an earlier run.
    """

    path: str
    entry: int | None
    method: str
    rows: float
    error_before: float | None
    error: float | None
    seconds: float
    resumed: bool = False

    def __str__(self) -> str:
        """One line, for people who watch."""
        name = self.path if self.entry is None else f"{self.path}[{self.entry}]"
        if self.error is None or self.error_before is None:
            return f"{name}: {self.method}, without data"
        return (
            f"{name}: {self.method}, relative output error {self.error_before:.3g} -> "
            f"{self.error:.3g}, {self.seconds:.1f} s" + " (resumed)" * self.resumed
        )
