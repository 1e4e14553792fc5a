"""`errors`: what compression did to each weight, and to the outputs of its matmul."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import tree
from jaxcompress.layout import Axes, Layout
from jaxcompress.leaf import Leaf, materialize
from jaxcompress.lift import calibrate, trace_axes
from jaxcompress.lift._explain import table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """Error of one weight, or of one layer or expert of a stack.

    Attributes:
      path: Key path of the weight.
      index: Its place in the stack; empty if it is not stacked.
      method: What was done to it.
      weight_error: ``||W - Q|| / ||W||``.
      output_error: ``||X (W - Q)|| / ||X W||``, or None where no matmul uses it.
    """

    path: str
    index: tuple[int, ...]
    method: str
    weight_error: float
    output_error: float | None

    @property
    def weight_sqnr_db(self) -> float:
        """Signal to quantization noise of the weight, in decibels."""
        return _decibels(self.weight_error)

    @property
    def output_sqnr_db(self) -> float | None:
        """Signal to quantization noise of its outputs, in decibels."""
        return None if self.output_error is None else _decibels(self.output_error)


@dataclasses.dataclass(frozen=True)
class ErrorReport:
    """Errors of a compressed tree, in its order; prints as a table."""

    rows: tuple[ErrorRow, ...]

    def of(self, path: str) -> tuple[ErrorRow, ...]:
        """The rows of one weight, in stack order."""
        return tuple(r for r in self.rows if r.path == path)

    def worst(self, count: int = 10) -> ErrorReport:
        """The rows of the largest output errors, largest first."""
        known = [r for r in self.rows if r.output_error is not None]
        known.sort(key=lambda r: -(r.output_error or 0.0))
        return ErrorReport(tuple(known[:count]))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON; what is infinite is None."""
        return {
            "rows": [
                {
                    **dataclasses.asdict(r),
                    "index": list(r.index),
                    "weight_error": _finite(r.weight_error),
                    "output_error": _finite(r.output_error),
                    "weight_sqnr_db": _finite(r.weight_sqnr_db),
                    "output_sqnr_db": _finite(r.output_sqnr_db),
                }
                for r in self.rows
            ]
        }

    def __str__(self) -> str:
        """One line a weight and stack entry."""
        header = ("weight", "method", "weight error", "SQNR", "output error", "SQNR")
        rows = [
            (
                r.path + "".join(f"[{i}]" for i in r.index),
                r.method,
                f"{r.weight_error:.2e}",
                f"{r.weight_sqnr_db:.1f} dB",
                "-" if r.output_error is None else f"{r.output_error:.2e}",
                "-" if r.output_sqnr_db is None else f"{r.output_sqnr_db:.1f} dB",
            )
            for r in self.rows
        ]
        return table(header, rows)


def errors(
    fn: Callable[..., Any], params: Any, packed: Any, batches: Iterable[Any]
) -> ErrorReport:
    r"""Error of every compressed weight, and of what its matmul gives.

    .. math::
        \frac{\|X (W - Q)\|_F}{\|X W\|_F}
        = \sqrt{\frac{\mathrm{tr}\,(W - Q)^T X^T X (W - Q)}{\mathrm{tr}\,W^T X^T X W}}

    with the inputs `X` that the weight has in the original model. Rounding of
    activations is not in it.

    Args:
      fn: As for `lift`.
      params: The original parameters.
      packed: The compressed ones, with leaves at the same paths.
      batches: Example inputs: tuples of arguments, or single arguments.

    Returns:
      One row for each leaf of `packed`, for each layer or expert of a stack, in the
      tree's order. Errors are relative: zero for zero of zero, infinite for anything
      of zero.

    Raises:
      ValueError: If `packed` has no leaves, or one where `params` has none or another
        shape; if there are no batches.

    Examples:
      >>> import jaxcompress as jc
      >>> params = {"w": jnp.array([[1.0, 0.5], [0.25, 1.0]])}
      >>> packed = jc.compress(params, {"w": jc.quant.int2()})
      >>> report = errors(lambda p, x: x @ p["w"], params, packed, [jnp.eye(2)])
      >>> round(report.rows[0].output_error, 4) == round(report.rows[0].weight_error, 4)
      True
    """
    batches = list(batches)
    if not batches:
        raise ValueError("errors: batches is empty; pass at least one batch.")
    leaves = _leaves(params, packed)
    dense = materialize(params)
    flat = tree.flatten(dense)[0]
    first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
    axes = trace_axes(fn, dense, *first)
    used = {path for path in leaves if path in axes}
    stats = {}
    if used:
        chosen = lambda path, leaf: path in used
        stats = calibrate(fn, dense, batches, gram=True, where=chosen)
    rows: list[ErrorRow] = []
    for path, leaf in leaves.items():
        gram = stats[path].gram if path in stats else None
        roles = axes.get(path, Axes(contract=(-1,), stack=0))
        weight, output = _relative(flat[path], leaf, gram, roles)
        rows += _rows(path, leaf.method, np.asarray(weight), output)
    return ErrorReport(tuple(rows))


def _leaves(params: Any, packed: Any) -> dict[str, Leaf]:
    """The leaves of `packed`, each checked against the original."""
    original = tree.flatten(params)[0]
    leaves = {p: x for p, x in tree.flatten(packed)[0].items() if isinstance(x, Leaf)}
    if not leaves:
        raise ValueError("errors: packed has no compressed leaves to report on.")
    for path, leaf in leaves.items():
        shape = getattr(original.get(path), "shape", None)
        if shape != leaf.shape:
            raise ValueError(
                f"errors: packed has {path!r} of shape {leaf.shape}, params "
                f"{'none' if shape is None else f'one of {shape}'}; pass the "
                "parameters that were compressed."
            )
    return leaves


def _relative(
    w: jax.Array, leaf: Leaf, gram: jax.Array | None, axes: Axes
) -> tuple[jax.Array, jax.Array | None]:
    """Relative errors ``[*stack]`` of a weight and, if its gram fits, its outputs."""
    fits = gram is not None and (
        gram.ndim - 2 <= axes.stack
        and gram.shape[-1] == math.prod(w.shape[a] for a in axes.contract)
    )
    return _errors(w, leaf, gram if fits else None, axes)


@jax.jit(static_argnums=3)
def _errors(
    w: jax.Array, leaf: Leaf, gram: jax.Array | None, axes: Axes
) -> tuple[jax.Array, jax.Array | None]:
    layout = Layout.of(w.shape, axes)
    w = layout.to_storage(w.astype(jnp.float32))
    gap = w - layout.to_storage(leaf.materialize().astype(jnp.float32))
    stack = w.shape[: axes.stack]
    w, gap = (a.reshape(*stack, -1, a.shape[-1]) for a in (w, gap))
    weight = _ratio(*(jnp.square(a).sum((-2, -1)) for a in (gap, w)))
    if gram is None:
        return weight, None
    gram = jnp.broadcast_to(gram, (*stack, *gram.shape[-2:]))
    return weight, _ratio(*(_energy(a, gram) for a in (gap, w)))


def _energy(a: jax.Array, gram: jax.Array) -> jax.Array:
    """``tr(A G A^T)`` of ``[*stack, out, K]``; never negative."""
    product = jnp.matmul(
        a, gram, precision="highest", preferred_element_type=jnp.float32
    )
    return jnp.maximum((product * a).sum((-2, -1)), 0.0)


def _ratio(error: jax.Array, whole: jax.Array) -> jax.Array:
    """Square root of a quotient; zero of zero is zero, all else of zero infinite."""
    quotient = jnp.sqrt(error / jnp.where(whole > 0, whole, 1.0))
    return jnp.where(whole > 0, quotient, jnp.where(error > 0, jnp.inf, 0.0))


def _rows(path: str, method: str, weight: np.ndarray, output: Any) -> list[ErrorRow]:
    outputs = None if output is None else np.asarray(output)
    return [
        ErrorRow(
            path=path,
            index=index,
            method=method,
            weight_error=float(weight[index]),
            output_error=None if outputs is None else float(outputs[index]),
        )
        for index in np.ndindex(weight.shape)
    ]


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -20.0 * math.log10(error)


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
