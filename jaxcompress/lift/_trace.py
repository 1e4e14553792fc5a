"""Tracing the user's function on dense abstract values, once for each signature."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from jaxcompress.leaf import Leaf, is_leaf
from jaxcompress.lift import _compat
from jaxcompress.lift._tracked import (
    LiftError,
    Tracked,
    abstract,
    dense,
    is_array,
    is_tracked,
)
from jaxcompress.lift._walk import Walker

_KEPT_TRACES = 64


class Trace(NamedTuple):
    """A function as a program.

    Attributes:
      jaxpr: The closed jaxpr.
      out_tree: Structure of the results.
    """

    jaxpr: Any
    out_tree: Any


class Signature(NamedTuple):
    """The arguments of a call, flattened, and what a trace of it depends on."""

    flat: list[Any]
    structure: Any
    dynamic: tuple[bool, ...]
    key: Any


class Tracer:
    """Traces `fn` and remembers the programs by structure, types and static arguments.

    Programs that refer to values of an enclosing trace are not kept.
    """

    def __init__(self, fn: Callable[..., Any], *, who: str) -> None:
        """Remember the function; nothing is traced yet."""
        self.fn = fn
        self.who = who
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()

    def signature(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Signature, list[Any]]:
        """The signature of a call, and its dynamic operands in order.

        Args:
          args: Positional arguments; tracked weights stand for arrays.
          kwargs: Keyword arguments.

        Raises:
          LiftError: If a static argument cannot be hashed.
        """
        flat, structure = jax.tree.flatten((args, kwargs), is_leaf=is_tracked)
        dynamic = tuple(is_array(x) or is_tracked(x) for x in flat)
        pairs = list(zip(flat, dynamic, strict=True))
        for x, d in pairs:
            if not d and not _hashable(x):
                raise LiftError(
                    f"{self.who}: arguments that are not arrays are static and must be "
                    f"hashable; got {type(x).__name__}. Close over it instead."
                )
        types = tuple(_type_of(x) if d else (type(x), x) for x, d in pairs)
        key = (structure, types, jax.sharding.get_abstract_mesh())
        return Signature(flat, structure, dynamic, key), [x for x, d in pairs if d]

    def __call__(self, signature: Signature, make: Callable[[Trace], Any]) -> Any:
        """`make(trace)` for this signature, as it was made the first time."""
        if signature.key in self._kept:
            self._kept.move_to_end(signature.key)
            return self._kept[signature.key]
        trace = _trace(self.fn, signature)
        made = make(trace)
        if _compat.is_concrete(_compat.program(trace.jaxpr).consts):
            self._kept[signature.key] = made
            if len(self._kept) > _KEPT_TRACES:
                self._kept.popitem(last=False)
        return made


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _type_of(x: Any) -> Any:
    """What the trace depends on: for a weight also where it came from and its form."""
    if not isinstance(x, Tracked):
        return jax.typeof(x) if not isinstance(x, jax.ShapeDtypeStruct) else _struct(x)
    types = tuple(_type_of(a) for a in jax.tree.leaves(x))
    return (jax.tree.structure(x), types)


def _struct(x: jax.ShapeDtypeStruct) -> Any:
    return (x.shape, x.dtype, x.weak_type)


def _trace(fn: Callable[..., Any], signature: Signature) -> Trace:
    pairs = list(zip(signature.flat, signature.dynamic, strict=True))

    def call(*operands: Any) -> Any:
        values = iter(operands)
        filled = [next(values) if d else x for x, d in pairs]
        args, kwargs = jax.tree.unflatten(signature.structure, filled)
        return fn(*args, **kwargs)

    example = [
        abstract(x.value) if isinstance(x, Tracked) else x for x, d in pairs if d
    ]
    jaxpr, shape = jax.make_jaxpr(call, return_shape=True)(*example)
    return Trace(jaxpr, jax.tree.structure(shape))


def refuse_closures(trace: Trace, operands: list[Any], *, who: str) -> None:
    """Refuse a program that uses a constant where a weight was passed and is not used.

    Raises:
      LiftError: Naming the weight that the function closed over.
    """
    consts = constants(trace.jaxpr)
    suspects = [
        w
        for w in operands
        if isinstance(w, Tracked) and any(_stands_for(c, w) for c in consts)
    ]
    if not suspects:
        return
    used = used_paths(trace.jaxpr, operands)
    for w in suspects:
        if w.path not in used:
            raise LiftError(
                f"{who}: the function never uses the argument {w.path!r} but closes "
                f"over a constant of its shape {w.shape}; pass the weight as an "
                "argument: lift(model.apply)(params, x), not lift(lambda x: "
                "model.apply(params, x))."
            )


def used_paths(jaxpr: Any, operands: list[Any]) -> set[str]:
    """Paths of the tracked weights that any operation of the program reads."""
    used: set[str] = set()
    walker = Walker(
        on_ran=lambda use, how: used.update(use.weight.paths),
        on_dense=lambda event: used.update(event.weight.paths),
        inline=True,
        custom_vjp="inline",
    )
    jax.eval_shape(lambda v: [dense(o) for o in walker.run(jaxpr, v)[0]], operands)
    return used


def _stands_for(const: Any, w: Tracked) -> bool:
    if isinstance(w.value, Leaf):
        return (
            np.shape(const) == w.shape and const.dtype == w.dtype and len(w.shape) > 1
        )
    return const is w.value


def constants(jaxpr: Any) -> list[Any]:
    """The array constants of a program and of every program inside it."""
    program = _compat.program(jaxpr)
    found = [c for c in program.consts if is_array(c) and np.ndim(c) > 0]
    for eqn in program.eqns:
        literals = [v.val for v in eqn.invars if isinstance(v, jex.Literal)]
        found += [v for v in literals if np.ndim(v) > 0]
        for sub in _compat.sub_jaxprs(eqn):
            found += constants(sub)
    return found


def has_leaf(tree: Any) -> bool:
    """Whether a pytree holds a compressed leaf."""
    return any(isinstance(x, Leaf) for x in jax.tree.leaves(tree, is_leaf=is_leaf))
