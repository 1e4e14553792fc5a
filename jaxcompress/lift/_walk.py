"""The walker: evaluates a traced program in which some values are tracked weights.

Equations without a weight run as they are. Layout operations move a weight and keep
it compressed; the four operations that *use* a weight (`TARGETS`) go to the leaf's
own rule; control flow is re-emitted through public JAX functions; whatever is left
materializes, and the walker's `on_dense` hears of it. What must look inside a model
(calibration, sweeps, plans) is a `visit` function called at every use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxcompress.layout import Axes
from jaxcompress.leaf import Leaf, dequantize
from jaxcompress.lift import _compat, _control
from jaxcompress.lift._layout_ops import LAYOUT_OPS, rows, take_rows
from jaxcompress.lift._pointwise import pointwise_dot
from jaxcompress.lift._tracked import LiftError, Tracked, dense

Taps = dict[str, Any]
"""What `visit` returns beside the weight: arrays by name, for the caller."""


class Use(NamedTuple):
    """One place where a program uses a weight.

    Attributes:
      eqn: The equation.
      weight: The weight.
      position: Which operand it is.
      operands: All operands, dense but for the weight.
      contracted: Contracted axes of the weight as it stands here.
      batch: Its batch axes.
      scope: Equations that enclose this one, outermost first.
      times: How often the site runs in one call, counting enclosing scans.
    """

    eqn: Any
    weight: Tracked
    position: int
    operands: tuple[Any, ...]
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    scope: tuple[Any, ...]
    times: int

    @property
    def op(self) -> str:
        """Name of the operation."""
        return self.eqn.primitive.name

    @property
    def axes(self) -> Axes | None:
        """Roles of the parameter's axes at this site."""
        return self.weight.axes(self.contracted, self.batch)


class Dense(NamedTuple):
    """One place where a compressed weight turns dense, and why."""

    weight: Tracked
    eqn: Any
    scope: tuple[Any, ...]
    times: int


def _visit_nothing(use: Use) -> tuple[Tracked, Taps]:
    return use.weight, {}


def _ignore(*_: Any) -> None:
    pass


@dataclasses.dataclass(kw_only=True)
class Walker:
    """Evaluates programs; one per traced function.

    Attributes:
      visit: Called at every use; returns the weight to go on with, and taps.
      on_ran: Hears how each use ran.
      on_dense: Hears of each compressed weight that an operation made dense.
      merge: Combines two taps of one name.
      fold: Reduces a tap stacked by a scan over which its weight did not vary.
      inline: Enter nested jits instead of emitting them: each site is then seen.
      custom_vjp: ``"error"``, ``"inline"`` or ``"opaque"``, where one has a use.
      rewrites: What to run instead of an equation without a weight, by the identities
        of the equations around it, outermost first, and its own.
    """

    visit: Callable[[Use], tuple[Tracked, Taps]] = _visit_nothing
    on_ran: Callable[[Use, str], None] = _ignore
    on_dense: Callable[[Dense], None] = _ignore
    merge: Callable[[Any, Any], Any] | None = None
    fold: Callable[[Any], Any] | None = None
    inline: bool = False
    custom_vjp: str = "error"
    rewrites: Mapping[tuple[int, ...], Callable[[Any, list[Any]], list[Any]]] = (
        dataclasses.field(default_factory=dict)
    )
    scope: tuple[Any, ...] = ()
    times: int = 1
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def run(self, jaxpr: Any, operands: Sequence[Any]) -> tuple[list[Any], Taps]:
        """Evaluate a jaxpr on arrays and tracked weights.

        Returns:
          Its results, some of which may be tracked weights, and the taps inside.
        """
        program = _compat.program(jaxpr)
        env: dict[Any, Any] = dict(zip(program.constvars, program.consts, strict=True))
        env.update(zip(program.invars, operands, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        taps: Taps = {}
        for scope, eqns in itertools.groupby(program.eqns, _compat.name_stack):
            with jax.named_scope(scope) if scope else contextlib.nullcontext():
                for eqn in eqns:
                    values = [read(v) for v in eqn.invars]
                    with eqn.ctx.manager:
                        weighted = any(isinstance(v, Tracked) for v in values)
                        evaluate = self.step if weighted else self.plain
                        results, new = evaluate(eqn, values)
                    taps = self.join(taps, new)
                    env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in program.outvars], taps

    def step(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Taps]:
        """Evaluate one equation, at least one of whose operands is a weight."""
        name = eqn.primitive.name
        if name in _control.CONTROL:
            return _control.CONTROL[name](self, eqn, values)
        if name in LAYOUT_OPS and isinstance(values[0], Tracked):
            values = [values[0], *self.densify(eqn, values[1:])]
            moved = LAYOUT_OPS[name](eqn, *values)
            if moved is not NotImplemented:
                return [moved], {}
        if name in TARGETS:
            return self.use(eqn, values)
        if _compat.is_opaque(eqn):
            path = next(v.path for v in values if isinstance(v, Tracked))
            raise LiftError(
                f"lift: {path!r} enters the operation {name!r}, which holds a program "
                "that lift has no rule for; call jaxcompress.materialize on that "
                "weight first."
            )
        return _compat.bind(eqn, self.densify(eqn, values)), {}

    def plain(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Taps]:
        """Evaluate an equation without a weight, entering it if need be."""
        if not self.rewrites:
            return _compat.bind(eqn, values), {}
        key = self.key(eqn)
        if key in self.rewrites:
            return self.rewrites[key](eqn, values), {}
        if any(k[: len(key)] == key for k in self.rewrites):
            return _control.CONTROL[eqn.primitive.name](self, eqn, values)
        return _compat.bind(eqn, values), {}

    def key(self, eqn: Any) -> tuple[int, ...]:
        """An equation with those that enclose it now, outermost first, by identity."""
        return (*map(id, self.scope), id(eqn))

    def use(self, eqn: Any, values: list[Any]) -> tuple[list[Any], Taps]:
        """Run a target operation by the rule of the weight among its operands."""
        target = TARGETS[eqn.primitive.name]
        found = target.find(eqn, values)
        if found is None:
            return _compat.bind(eqn, self.densify(eqn, values)), {}
        index, contracted, batch = found
        others = self.densify(eqn, [v for i, v in enumerate(values) if i != index])
        operands = (*others[:index], values[index], *others[index:])
        use = Use(
            eqn,
            values[index],
            index,
            operands,
            contracted,
            batch,
            self.scope,
            self.times,
        )
        weight, taps = self.visit(use)
        if not weight.compressed:
            bound = [*others[:index], weight.value, *others[index:]]
            self.on_ran(use, "dense")
            return _compat.bind(eqn, bound), taps
        out, how = target.run(eqn, weight, index, list(operands))
        self.on_ran(use, how)
        return [out], taps

    def densify(self, eqn: Any, values: list[Any]) -> list[Any]:
        """Dense operands for `eqn`; compressed ones are reported."""
        for v in values:
            if isinstance(v, Tracked) and v.compressed:
                self.on_dense(Dense(v, eqn, self.scope, self.times))
        return [dense(v) for v in values]

    @contextlib.contextmanager
    def inside(self, eqn: Any, times: int = 1) -> Iterator[None]:
        """Note that what runs now stands inside `eqn`, repeated `times`."""
        before = self.scope, self.times
        self.scope, self.times = (*self.scope, eqn), self.times * times
        try:
            yield
        finally:
            self.scope, self.times = before

    def join(self, a: Taps, b: Taps) -> Taps:
        """Taps of two parts of a program; shared names are merged."""
        if not (a and b):
            return a or b
        assert self.merge is not None
        shared = {k: self.merge(a[k], b[k]) for k in a.keys() & b.keys()}
        return {**a, **b, **shared}

    def meets_use(self, jaxpr: Any, operands: Sequence[Any]) -> bool:
        """Whether a weight among `operands` reaches a target inside `jaxpr`."""
        seen: list[Use] = []
        probe = Walker(
            on_ran=lambda use, how: seen.append(use), inline=True, custom_vjp="inline"
        )
        jax.eval_shape(
            lambda v: [dense(o) for o in probe.run(jaxpr, v)[0]], list(operands)
        )
        return bool(seen)


class Target(NamedTuple):
    """An operation that uses a weight.

    Attributes:
      find: ``(eqn, values) -> (operand index, contracted axes, batch axes)`` or None.
      run: ``(eqn, weight, index, operands) -> (result, how it ran)``.
    """

    find: Callable[
        [Any, list[Any]], tuple[int, tuple[int, ...], tuple[int, ...]] | None
    ]
    run: Callable[[Any, Tracked, int, list[Any]], tuple[jax.Array, str]]


def _which(values: list[Any]) -> int:
    """The operand that is a weight; of two the right, or the only packed one."""
    first, second = values[0], values[1]
    if not isinstance(second, Tracked):
        return 0
    if isinstance(first, Tracked) and first.compressed and not second.compressed:
        return 0
    return 1


def _find_dot(
    eqn: Any, values: list[Any]
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    contract, batch = eqn.params["dimension_numbers"]
    index = _which(values)
    return index, tuple(contract[index]), tuple(batch[index])


def _run_dot(eqn: Any, w: Tracked, index: int, operands: list[Any]) -> tuple[Any, str]:
    names = ("precision", "preferred_element_type", "out_sharding")
    ran = w.value.dot_general(
        operands[1 - index],
        eqn.params["dimension_numbers"],
        leaf_is_lhs=index == 0,
        **{name: eqn.params[name] for name in names if name in eqn.params},
    )
    return ran.out, ran.how


def _find_conv(
    eqn: Any, values: list[Any]
) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    if not isinstance(values[1], Tracked):
        return None
    out, inp, *spatial = eqn.params["dimension_numbers"].rhs_spec
    del out
    return 1, (*spatial, inp), ()


def _find_ragged(
    eqn: Any, values: list[Any]
) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    if not isinstance(values[1], Tracked) or len(values) > 3:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    return 1, tuple(contract), (*batch, *numbers.rhs_group_dimensions)


def _run_ragged(
    eqn: Any, w: Tracked, index: int, operands: list[Any]
) -> tuple[jax.Array, str]:
    del index
    x, _, group_sizes = operands
    names = ("precision", "preferred_element_type", "out_sharding")
    return w.value.ragged_dot_general(
        x,
        group_sizes,
        eqn.params["ragged_dot_dimension_numbers"],
        **{name: eqn.params[name] for name in names if name in eqn.params},
    )


def _run_conv(
    eqn: Any, w: Tracked, index: int, operands: list[Any]
) -> tuple[jax.Array, str]:
    """As a matmul, where the window is one; by the leaf's rule; else dequantized."""
    assert isinstance(w.value, Leaf)
    ran = pointwise_dot(eqn, w.value, operands[0])
    if ran is None:
        ran = w.value.conv_general_dilated(operands[0], **eqn.params)
    if ran is NotImplemented:
        token = eqn.params["dimension_numbers"].lhs_spec[1]
        operands[0] = w.value.prepare_activations(operands[0], (token,))
        operands[index] = dequantize(w.value)
        return _compat.bind(eqn, operands)[0], "dequantized"
    return ran


def _find_gather(
    eqn: Any, values: list[Any]
) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    if not isinstance(values[0], Tracked) or not rows(eqn, values[0]):
        return None
    return 0, tuple(range(1, len(values[0].shape))), ()


def _run_gather(
    eqn: Any, w: Tracked, index: int, operands: list[Any]
) -> tuple[jax.Array, str]:
    """Dequantize only the rows that are read; out of range as the mode says."""
    del index
    indices = operands[1]
    assert isinstance(w.value, Leaf)
    taken = take_rows(w, indices)
    if taken is not NotImplemented:
        out = taken.dense()
    else:
        out = w.value.take(jnp.clip(indices[..., 0], 0, w.shape[0] - 1))
    if out is NotImplemented:
        return _compat.bind(eqn, [w.dense(), indices])[0], "dequantized table"
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        inside = (indices[..., 0] >= 0) & (indices[..., 0] < w.shape[0])
        inside = inside.reshape(inside.shape + (1,) * (out.ndim - inside.ndim))
        value = jnp.asarray(jnp.nan if fill is None else fill, out.dtype)
        out = jnp.where(inside, out, jnp.broadcast_to(value, out.shape))
    return out, "dequantized rows"


TARGETS: dict[str, Target] = {
    "dot_general": Target(_find_dot, _run_dot),
    "conv_general_dilated": Target(_find_conv, _run_conv),
    "ragged_dot": Target(_find_ragged, _run_ragged),
    "ragged_dot_general": Target(_find_ragged, _run_ragged),
    "gather": Target(_find_gather, _run_gather),
}
"""Operations that go to a leaf's own rule, by primitive."""
