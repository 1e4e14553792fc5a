"""The methods of the comparison, each a transform from one set of settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

import jaxcompress as jc

SR_STE = "SR-STE 2:4"
METHODS = (
    "dense",
    "static random",
    "SET",
    "RigL",
    "Top-KAST",
    "straight-through",
    "gradual magnitude",
    SR_STE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that was chosen, on the validation part.

    Attributes:
      every: Steps between two changes of the masks of SET, RigL and gradual magnitude.
      drop: Fraction dropped at first; it falls to zero on a cosine.
      until: Fraction of training after which masks are fixed.
      explored: Fraction of the pruned weights that Top-KAST trains.
      strength: Of Top-KAST's penalty.
      pull: SR-STE's decay of masked weights.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = METHODS
    sparsities: tuple[float, ...] = (0.5, 0.9)
    width: int = 64
    steps: int = 1200
    checkpoints: int = 6
    batch: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    jitter: float = 0.2
    every: int = 25
    drop: float = 0.3
    until: float = 0.75
    explored: float = 0.5
    strength: float = 1e-4
    pull: float = 2e-3


def runs(settings: Settings) -> list[tuple[str, float]]:
    """What is trained: each method at each sparsity that it is for."""
    pairs = [
        (name, sparsity)
        for sparsity in settings.sparsities
        for name in settings.methods
        if name != "dense" and (name != SR_STE or sparsity == 0.5)
    ]
    return ([("dense", 0.0)] if "dense" in settings.methods else []) + pairs


def scheme(
    name: str, sparsity: float, settings: Settings, key: jax.Array
) -> jc.Transform:
    """The method on every kernel."""
    return jc.select({"**/kernel": rule(name, sparsity, settings, key)})


def rule(name: str, sparsity: float, settings: Settings, key: jax.Array) -> Any:
    """The method on one leaf."""
    last = int(settings.until * settings.steps)
    moving: dict[str, Any] = {
        "sparsity": sparsity,
        "key": key,
        "fraction": jc.schedules.cosine(settings.drop, 0.0, begin=0, end=last),
        "every": settings.every,
        "until": last,
    }
    match name:
        case "dense":
            return jc.identity()
        case "static random":
            return jc.prune.random(sparsity=sparsity, key=key)
        case "SET":
            return jc.prune.set(**moving)
        case "RigL":
            return jc.prune.rigl(**moving)
        case "Top-KAST":
            trained = sparsity * (1.0 - settings.explored)
            return jc.prune.top_kast(sparsity=sparsity, backward_sparsity=trained)
        case "straight-through":
            return jc.prune.straight_through(sparsity=sparsity)
        case "gradual magnitude":
            ramp = jc.schedules.cubic(
                0.0, sparsity, begin=settings.steps // 10, end=last
            )
            return jc.prune.magnitude(sparsity=ramp, every=settings.every)
        case "SR-STE 2:4":
            return jc.prune.sr_ste(n=2, m=4, decay=settings.pull)
    raise ValueError(f"scheme: expected one of {METHODS}; got {name!r}.")
