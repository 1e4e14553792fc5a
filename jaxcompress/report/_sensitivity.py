"""`sensitivity`: how much the output changes when one weight alone is compressed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress.layout import Axes
from jaxcompress.leaf import materialize, nbytes, traits
from jaxcompress.lift import lift, trace_axes
from jaxcompress.lift._explain import table
from jaxcompress.lift._tracked import is_array
from jaxcompress.transform import select

Metric = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """What compressing one weight alone does.

    Attributes:
      path: Key path of the weight.
      method: What was done to it.
      change: The metric of the outputs, mean over batches.
      dense_bytes: Bytes of the weight before.
      stored_bytes: Bytes of the leaf.
    """

    path: str
    method: str
    change: float
    dense_bytes: int
    stored_bytes: int


@dataclasses.dataclass(frozen=True)
class SensitivityReport:
    """Sensitivities, largest change first; prints as a table."""

    rows: tuple[SensitivityRow, ...]

    def of(self, path: str) -> tuple[SensitivityRow, ...]:
        """The rows of one weight, largest change first."""
        return tuple(r for r in self.rows if r.path == path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return {"rows": [dataclasses.asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        """One line a weight and method."""
        header = ("weight", "method", "change", "dense", "stored")
        rows = [
            (
                r.path,
                r.method,
                f"{r.change:.3e}",
                f"{r.dense_bytes:,}",
                f"{r.stored_bytes:,}",
            )
            for r in self.rows
        ]
        return table(header, rows)


def relative_change(outputs: Any, outputs_q: Any) -> jax.Array:
    r"""How far outputs moved, ``||y_q - y|| / ||y||`` over all floating arrays.

    Args:
      outputs: Pytree of the original model's outputs.
      outputs_q: Of the compressed model, of the same structure.

    Returns:
      ``float32``: zero where nothing moved, infinite if all outputs were zero.

    Raises:
      ValueError: If no output is floating.

    Examples:
      >>> float(relative_change(jnp.array([3.0, 4.0]), jnp.array([3.0, 3.0])))
      0.20000000298023224
    """
    pairs = [
        (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        for a, b in zip(
            jax.tree.leaves(outputs), jax.tree.leaves(outputs_q), strict=True
        )
        if jnp.issubdtype(jnp.result_type(a), jnp.floating)
    ]
    if not pairs:
        raise ValueError(
            "relative_change: no output is floating; pass a metric=... of your own."
        )
    moved = sum((jnp.square(b - a).sum() for a, b in pairs), jnp.float32(0))
    whole = sum((jnp.square(a).sum() for a, _ in pairs), jnp.float32(0))
    ratio = jnp.sqrt(moved / jnp.where(whole > 0, whole, 1.0))
    return jnp.where(whole > 0, ratio, jnp.where(moved > 0, jnp.inf, 0.0))


def sensitivity(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    rules: Mapping[Any, Any],
    *,
    metric: Metric = relative_change,
) -> SensitivityReport:
    """Compress each weight alone, and measure what that does to the outputs.

    Args:
      fn: As for `lift`; ``fn(params, *batch)`` is called.
      params: The original parameters.
      batches: Example inputs: tuples of arguments, or single arguments.
      rules: As for `compress`; a value may also be a list of formats or transforms,
        each of which is tried.
      metric: ``(outputs, outputs_q) -> scalar``, traced; `kl_divergence` for a
        function that returns logits.

    Returns:
      One row for each weight and format, largest change first. Weights that only
      round their own values share one compiled program.

    Raises:
      ValueError: If there are no batches, a rule matches nothing or two match one
        weight, or a weight cannot be compressed so.

    Examples:
      >>> import jaxcompress as jc
      >>> params = {"a": jnp.eye(4), "b": jnp.arange(16.0).reshape(4, 4)}
      >>> fn = lambda p, x: x @ p["a"] @ p["b"]
      >>> report = sensitivity(fn, params, [jnp.ones((1, 4))], {"*": jc.quant.int4()})
      >>> [(r.path, r.method) for r in report.rows]
      [('b', 'int4'), ('a', 'int4')]

    References:
      Dong et al., `HAWQ <https://arxiv.org/abs/1905.03696>`_, 2019, section 3.
      Differs: the change is measured, not estimated from second derivatives.
    """
    examples = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not examples:
        raise ValueError("sensitivity: batches is empty; pass at least one batch.")
    chosen = tree.choose(rules, params, who="sensitivity")
    axes = trace_axes(fn, params, *examples[0])
    run = _Compiled(fn, metric)
    before = [run.outputs(params, batch) for batch in examples]
    flat, structure = tree.flatten(params)
    rows = []
    for path, rule in chosen.items():
        for one in rule if isinstance(rule, list) else [rule]:
            leaf = _compress(path, flat[path], one, axes)
            changed = tree.unflatten(structure, {**flat, path: _cheapest(leaf)})
            changes = [
                float(run.change(changed, batch, outputs))
                for batch, outputs in zip(examples, before, strict=True)
            ]
            rows.append(
                SensitivityRow(
                    path=path,
                    method=getattr(leaf, "method", "dense"),
                    change=sum(changes) / len(changes),
                    dense_bytes=nbytes(flat[path]),
                    stored_bytes=sum(map(nbytes, jax.tree.leaves(leaf))),
                )
            )
    return SensitivityReport(tuple(sorted(rows, key=lambda r: -r.change)))


def _compress(path: str, w: Any, rule: Any, axes: dict[str, Axes]) -> Any:
    scheme = select({path: rule}, axes=axes)
    params, state = scheme.init({path: w})
    return jax.jit(scheme.compress)(params, state)[path]


_dense = jax.jit(materialize)


def _cheapest(leaf: Any) -> Any:
    """Dense values, with which all weights run one program, unless it matters."""
    own = traits(leaf).own_matmul
    return leaf if own else _dense(leaf)


class _Compiled:
    """A function and a metric, jitted; arguments that are not arrays are static."""

    def __init__(self, fn: Callable[..., Any], metric: Metric) -> None:
        self.lifted = lift(fn)
        self.metric = metric
        self.kept: dict[Any, tuple[Any, Any]] = {}

    def outputs(self, params: Any, batch: tuple[Any, ...]) -> Any:
        return self._parts(batch)[0](params, _arrays(batch))

    def change(self, params: Any, batch: tuple[Any, ...], outputs: Any) -> jax.Array:
        return self._parts(batch)[1](params, _arrays(batch), outputs)

    def _parts(self, batch: tuple[Any, ...]) -> tuple[Any, Any]:
        flat, structure = jax.tree.flatten(batch)
        settings = tuple(None if is_array(x) else x for x in flat)
        key = (structure, settings)
        if key not in self.kept:

            def run(params: Any, arrays: list[Any]) -> Any:
                values = iter(arrays)
                args = [next(values) if x is None else x for x in settings]
                return self.lifted(params, *jax.tree.unflatten(structure, args))

            def change(params: Any, arrays: list[Any], outputs: Any) -> jax.Array:
                return self.metric(outputs, run(params, arrays))

            self.kept[key] = jax.jit(run), jax.jit(change)
        return self.kept[key]


def _arrays(batch: tuple[Any, ...]) -> list[Any]:
    return [x for x in jax.tree.leaves(batch) if is_array(x)]
