"""Every method of the library, in one table: the laws hold for each of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

import jaxcompress as jc


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A public function and the options that make it a rule."""

    fn: Callable[..., Any]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keeps_zeros: bool = True
    adapts: bool = False
    """Trains beside a frozen weight: zeros hold at the start, a mask cannot precede."""
    once: bool = False
    """Cannot follow itself."""
    sealed: bool = False
    """Nothing but the identity may follow it."""
    structure: bool = False
    """Puts other values in place of a weight: the identity alone may precede it."""
    shares: bool = False
    """Weights share its values, on which number formats alone may follow."""
    masked: bool = False
    """A structure with a mask in it, beside which no adapters train."""
    tolerance: float = 0.0
    """Of the largest weight: between decompositions of what is one but for rounding."""
    refit: float = 0.0
    """Squared error, of all squares, that a second fit of the result may have."""

    def __str__(self) -> str:
        named = {k: getattr(v, "name", v) for k, v in self.options.items()}
        options = ",".join(f"{k}={v}" for k, v in named.items() if k != "key")
        return f"{self.fn.__name__}({options})"

    @property
    def is_slow(self) -> bool:
        """Its laws run in `make slow`: a variant of another row, or long to compile."""
        return self.fn.__name__ in VARIANTS + COSTLY

    def rule(self) -> Any:
        """A number format or transform."""
        return self.fn(**self.options)


def preset(name: str) -> Callable[[], Any]:
    """A preset as a function; static activations with a scale."""

    def make() -> Any:
        fmt = getattr(jc.presets, name)
        static = fmt.activations is not None and fmt.activations.static
        return jc.quant.weights(fmt, activation_scale=0.02) if static else fmt

    make.__name__ = name
    return make


def calibrated() -> jc.Transform:
    """Static activations with the ranges of some rows, for the weights of the laws."""
    from jaxcompress.lift import statistics

    x = jax.random.normal(jax.random.key(3), (8, 128))
    stats = {path: statistics(x) for path in ("matrix", "stack")}
    return jc.quant.calibrated(jc.presets.FP8, stats)


def iterative() -> jc.Transform:
    """After its only round: before it nothing is pruned."""
    scheme = jc.prune.iterative(rate=0.5, rounds=1, every=1)
    return scheme._replace(init=lambda params: scheme.update(*scheme.init(params)))


def by_scores() -> jc.Transform:
    """Random scores of the weights of the laws."""
    draw = lambda *shape: jax.random.normal(jax.random.key(7), shape)
    given = {"matrix": draw(128, 128), "stack": draw(3, 128, 128)}
    return jc.prune.by_scores(given, sparsity=0.4)


def taylor() -> jc.Transform:
    """At its end from the start."""
    return jc.prune.taylor(sparsity=jc.schedules.constant(0.5))


VARIANTS = (
    *("int5", "int6", "int7", "fp6_e2m3", "normal", "lloyd", "mxfp6"),
    *("W8A16", "W4A8", "MXFP4", "NVFP4"),
)

COSTLY = (
    *("residual", "additive", "lattice", "soft_assignment", "ema"),
    *("gated", "sparse_plus", "corrected", "tucker", "cp", "tensor_train", "shared"),
)
"""Their own tests hold them to what matters most; each takes half a minute of laws."""

PRESETS = tuple(
    name
    for name, value in vars(jc.presets).items()
    if isinstance(value, jc.quant.NumberFormat)
)

q = jc.quant
FACTORS: Any = {"keeps_zeros": False, "structure": True, "tolerance": 1e-5}
ENTRIES: Any = {"keeps_zeros": False, "structure": True}
CLUSTERS: Any = {
    "bits": 3,
    "init": "kmeans++",
    "iterations": 8,
    "key": jax.random.key(10),
}
# A second fit finds other sums; the first one's error is 0.035.
SUMS: Any = {**ENTRIES, "shares": True, "refit": 0.03}
VECTORS: Any = {"dims": 4, "bits": 6, "iterations": 4, "key": jax.random.key(9)}
CASES = (
    Case(jc.identity),
    *(Case(f) for f in (q.int2, q.int3, q.int4, q.int5, q.int6, q.int7, q.int8)),
    Case(q.int4, {"group_size": 16}),
    Case(q.int4, {"granularity": q.PerTensor()}),
    Case(q.int4, {"granularity": q.Block2D(out=8, contract=8)}),
    Case(q.int4, {"symmetric": False, "group_size": 16}),
    Case(q.integer, {"bits": 3, "symmetric": False}),
    Case(q.integer, {"bits": 8, "narrow": False}),
    Case(q.ternary),
    Case(q.binary, keeps_zeros=False),
    *(Case(f) for f in (q.fp8_e4m3, q.fp8_e5m2, q.fp6_e3m2, q.fp6_e2m3, q.fp4_e2m1)),
    Case(q.nf4),
    *(Case(f, {"bits": 4}) for f in (q.log, q.normal, q.lloyd)),
    Case(q.table, {"values": (-1.0, -0.25, 0.0, 0.5, 1.0)}),
    *(Case(f) for f in (q.mxfp8, q.mxfp6, q.mxfp4, q.mxint8, q.nvfp4)),
    Case(q.mxfp8, {"element": q.E5M2}),
    Case(q.int3, {"group_size": 16, "search": q.mse(steps=9)}),
    Case(q.int4, {"symmetric": False, "group_size": 16, "search": q.hqq(steps=9)}),
    Case(calibrated),
    Case(
        q.weights,
        {"fmt": q.int4(rounding="stochastic"), "key": jax.random.key(1)},
    ),
    *(Case(preset(name)) for name in PRESETS),
    Case(
        q.lora,
        {"fmt": q.nf4(group_size=16), "rank": 4, "key": jax.random.key(4)},
        keeps_zeros=False,
        adapts=True,
    ),
    Case(q.lsq, {"fmt": q.int4(group_size=16), "initial": "range"}),
    Case(
        q.lsq,
        {
            "fmt": q.int3(activations=q.static(q.Integer(bits=8, symmetric=False))),
            "initial": "range",
            "activation_step": 0.05,
        },
    ),
    Case(q.pact, {"rule": q.int4()}),
    Case(q.dorefa, {"bits": 3, "activation_bits": 4}, keeps_zeros=False),
    Case(q.soft_rounding, {"fmt": q.int4(), "sharpness": 5.0, "end": 0}),
    Case(q.delayed, {"rule": q.int4(), "begin": 0}),
    Case(q.frozen_ranges, {"fmt": q.int4(symmetric=False), "after": 0}),
    Case(jc.prune.magnitude, {"sparsity": 0.5}),
    Case(jc.prune.magnitude, {"sparsity": 0.7, "scope": "global"}),
    Case(jc.prune.random, {"sparsity": 0.3, "key": jax.random.key(2)}),
    Case(jc.prune.magnitude, {"sparsity": jc.prune.nm(2, 4)}),
    Case(jc.prune.magnitude, {"sparsity": jc.prune.blocks(sparsity=0.75)}),
    Case(jc.prune.lamp, {"sparsity": 0.6}),
    Case(by_scores),
    Case(jc.prune.movement, {"sparsity": 0.6}),
    Case(taylor),
    Case(jc.prune.l0, {"key": jax.random.key(8), "end": 0}, once=True),
    Case(jc.prune.set, {"sparsity": 0.6, "key": jax.random.key(5)}),
    Case(jc.prune.rigl, {"sparsity": 0.6, "key": jax.random.key(6)}),
    Case(jc.prune.top_kast, {"sparsity": 0.6, "backward_sparsity": 0.4}),
    Case(jc.prune.straight_through, {"sparsity": 0.6}),
    Case(jc.prune.sr_ste),
    Case(iterative),
    Case(
        jc.codebook.kmeans, {"bits": 5, "iterations": 8}, keeps_zeros=False, shares=True
    ),
    Case(jc.codebook.kmeans, CLUSTERS | {"zero": True}, shares=True),
    Case(jc.codebook.ema, {"bits": 4, "key": jax.random.key(12)}, keeps_zeros=False),
    Case(jc.codebook.product, VECTORS, **ENTRIES, shares=True),
    Case(jc.codebook.residual, VECTORS | {"stages": 2}, **SUMS),
    Case(
        jc.codebook.additive,
        VECTORS | {"books": 2, "rounds": 1, "width": 1},
        **SUMS,
    ),
    Case(jc.codebook.lattice, **ENTRIES, sealed=True, tolerance=1e-6),
    Case(
        jc.codebook.soft_assignment,
        VECTORS | {"sharpness": 5.0, "end": 0},
        **ENTRIES,
        sealed=True,
    ),
    Case(jc.lowrank.svd, {"rank": 32}, **FACTORS),
    Case(jc.lowrank.gated, {"rank": 32}, **FACTORS),
    Case(
        jc.lowrank.sparse_plus,
        {"rank": 16, "sparsity": 0.9},
        masked=True,
        **FACTORS | {"tolerance": 1e-3},
    ),
    Case(
        jc.lowrank.corrected,
        {"rule": q.int8(), "rank": 8},
        sealed=True,
        **FACTORS | {"tolerance": 1e-2},
    ),
    Case(jc.lowrank.tucker, {"ranks": (32, 32)}, **FACTORS),
    Case(jc.lowrank.cp, {"rank": 32, "steps": 5, "key": jax.random.key(10)}, **FACTORS),
    Case(
        jc.lowrank.tensor_train,
        {"rows": (8, 16), "columns": (16, 8), "rank": 16},
        **FACTORS,
    ),
    Case(jc.hashing.hashed, {"ratio": 8.0}, **ENTRIES),
    Case(jc.hashing.hashed, {"ratio": 8.0, "block": (8, 16), "seed": 3}, **ENTRIES),
    Case(jc.hashing.shared, {"ratio": 8.0}, sealed=True, **ENTRIES),
)


def methods(module: ModuleType) -> set[str]:
    """Public functions of a family that return a number format or a transform."""
    return {
        name
        for name, f in vars(module).items()
        if inspect.isfunction(f)
        and not name.startswith("_")
        and f.__annotations__.get("return") in ("NumberFormat", "Transform")
    }
