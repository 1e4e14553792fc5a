"""Everything about jaxprs that differs between JAX 0.10.2 and 0.12."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.core import Tracer

CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
    }
)
"""Operations that run a program once, on their operands as they are."""

# Their sub-jaxprs combine scalars and cannot hold a weight.
_SCALAR_BODIES = frozenset(
    {"reduce", "reduce_window", "sort", "select_and_scatter", "argmin", "argmax"}
)


class Program(NamedTuple):
    """A jaxpr with its constants, in the form both versions share."""

    constvars: tuple[Any, ...]
    consts: tuple[Any, ...]
    invars: tuple[Any, ...]
    eqns: tuple[Any, ...]
    outvars: tuple[Any, ...]


def program(jaxpr: Any) -> Program:
    """Take a jaxpr apart; 0.12 has no `ClosedJaxpr` and one list of inputs."""
    if hasattr(jaxpr, "all_invars"):
        constvars = tuple(jaxpr.all_invars[: jaxpr.num_consts])
        consts, body = tuple(jaxpr.consts), jaxpr
    elif isinstance(jaxpr, jex.ClosedJaxpr):
        constvars, consts = tuple(jaxpr.jaxpr.constvars), tuple(jaxpr.consts)
        body = jaxpr.jaxpr
    else:
        constvars, consts, body = tuple(jaxpr.constvars), (), jaxpr
    return Program(
        constvars, consts, tuple(body.invars), tuple(body.eqns), tuple(body.outvars)
    )


def sub_jaxprs(eqn: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.Jaxpr | jex.ClosedJaxpr):
                yield item


def is_opaque(eqn: Any) -> bool:
    """Whether an equation holds a program that no rule here can enter."""
    name = eqn.primitive.name
    if name == "pallas_call" or name.startswith(("scatter", *_SCALAR_BODIES)):
        return False
    return any(True for _ in sub_jaxprs(eqn))


def bind(eqn: Any, operands: list[Any]) -> list[Any]:
    """Evaluate one equation as it stands; a list of results."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    if isinstance(bound, tuple):  # (subfuns, params), before 0.9.2
        out = eqn.primitive.bind(*bound[0], *operands, **bound[1])
    else:
        out = eqn.primitive.bind(*operands, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


def likeness(eqn: Any) -> tuple[Any, ...]:
    """What two equations share that compute the same from the same operands."""
    avals = tuple(str(v.aval) for v in eqn.invars)
    return eqn.primitive.name, str(eqn.params), avals


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Numbers of constants and carries of a scan: flat trees since 0.11."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def scan_options(params: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `jax.lax.scan` that rebuild the equation."""
    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    if params.get("_split_transpose"):
        options["_split_transpose"] = True
    return options


def name_stack(eqn: Any) -> str:
    """The named scopes an equation was traced in, relative to its program."""
    return str(eqn.source_info.name_stack)


def given(sharding: Any) -> Any:
    """A sharding of a jit equation, or None where it was left to the compiler."""
    return None if type(sharding).__name__ == "UnspecifiedValue" else sharding


def is_concrete(tree: Any) -> bool:
    """Whether no array of a pytree is being traced."""
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def varying_axes(x: Any) -> frozenset[str]:
    """Manual mesh axes over which an array varies, inside `jax.shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def struct(shape: tuple[int, ...], dtype: Any, components: list[Any]) -> Any:
    """The abstract array that stands for a leaf: it varies where a component does."""
    arrays = [a for a in components if not isinstance(a, jax.ShapeDtypeStruct)]
    manual = [jax.typeof(a).manual_axis_type for a in arrays if varying_axes(a)]
    most = max(manual, key=lambda m: len(m.varying), default=None)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=most)
