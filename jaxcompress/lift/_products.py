"""Which matmuls of a program multiply two activations: attention's own products.

A pass over the program that follows two facts about every value: whether it depends
on the data, and whether it is provably nonnegative (probabilities are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxcompress.lift import _compat
from jaxcompress.lift._tracked import LiftError

_POSITIVE = frozenset({"exp", "exp2", "logistic", "abs", "square", "iota", "erfc"})
_ARITHMETIC = (
    "add",
    "add_any",
    "mul",
    "div",
    "min",
    "sqrt",
    "rsqrt",
    "dot_general",
    "cumsum",
)
_REDUCTIONS = (
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "psum",
    "all_gather",
)
_MOVES = (
    "concatenate",
    "pad",
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "slice",
    "rev",
    "convert_element_type",
    "reduce_precision",
    "copy",
    "copy_p",
    "stop_gradient",
    "sharding_constraint",
    "pvary",
    "dynamic_update_slice",
)
_IF_ALL = frozenset((*_ARITHMETIC, *_REDUCTIONS, *_MOVES))
_IF_FIRST = frozenset({"dynamic_slice", "gather", "pow"})


class Fact(NamedTuple):
    """What is known of a value.

    Attributes:
      data: It depends on more than parameters and constants.
      nonnegative: No entry is below zero.
    """

    data: bool
    nonnegative: bool

    def join(self, other: Fact) -> Fact:
        """What is known if it may be either."""
        return Fact(self.data or other.data, self.nonnegative and other.nonnegative)


class Product(NamedTuple):
    """A batched matmul of two values that both depend on the data.

    Attributes:
      where: The named scopes it was traced in.
      nonnegative: Whether the left, and the right, operand is.
    """

    where: str
    nonnegative: tuple[bool, bool]


Key = tuple[int, ...]
"""An equation with those that enclose it, outermost first, by identity."""


class Finder:
    """Collects the products of one program; see `find_products`."""

    def __init__(self, custom_vjp: str) -> None:
        """Nothing found yet."""
        self.custom_vjp = custom_vjp
        self.found: dict[Key, Product] = {}

    def run(
        self, jaxpr: Any, facts: Sequence[Fact], key: Key, scope: tuple[str, ...]
    ) -> list[Fact]:
        """Facts about the results, from those about the operands."""
        program = _compat.program(jaxpr)
        env: dict[Any, Fact] = dict.fromkeys(program.constvars, Fact(False, False))
        env.update(zip(program.invars, facts, strict=True))

        def read(atom: Any) -> Fact:
            if isinstance(atom, jex.Literal):
                return Fact(False, bool(np.all(np.asarray(atom.val) >= 0)))
            fact = env[atom]
            return fact._replace(nonnegative=fact.nonnegative or _unsigned(atom.aval))

        for eqn in program.eqns:
            ins = [read(v) for v in eqn.invars]
            inner = (*key, id(eqn)), (*scope, _compat.name_stack(eqn))
            rule = _RULES.get(eqn.primitive.name)
            if rule is not None:
                outs = rule(self, eqn, ins, *inner)
            else:
                if eqn.primitive.name == "dot_general":
                    self.note(eqn, ins, *inner)
                outs = [_result(eqn, ins)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in program.outvars]

    def note(self, eqn: Any, ins: list[Fact], key: Key, scope: tuple[str, ...]) -> None:
        """Remember a batched matmul of two values that depend on the data."""
        _, (batch, _) = eqn.params["dimension_numbers"]
        if batch and all(fact.data for fact in ins):
            where = "/".join(filter(None, scope))
            left, right = (fact.nonnegative for fact in ins)
            self.found[key] = Product(where, (left, right))

    def settle(self, step: Callable[[list[Fact]], list[Fact]], carry: Any) -> Any:
        """Facts that hold in every round of a loop."""
        while True:
            after = [c.join(a) for c, a in zip(carry, step(carry), strict=True)]
            if after == carry:
                return carry
            carry = after


def find_products(
    jaxpr: Any, data: Sequence[bool], *, custom_vjp: str
) -> dict[Key, Product]:
    """The batched matmuls of a program in which no weight takes part.

    Args:
      jaxpr: The program.
      data: For each operand, whether it is data rather than a parameter. What is
        computed from parameters and constants alone counts as a weight.
      custom_vjp: As for `Walker`: whether to look inside.

    Returns:
      The products by key, in program order.

    Raises:
      LiftError: For a product inside a custom_vjp, under ``"error"``.
    """
    finder = Finder(custom_vjp)
    finder.run(jaxpr, [Fact(d, False) for d in data], (), ())
    return finder.found


def _unsigned(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and (
        dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.unsignedinteger)
    )


def _result(eqn: Any, ins: list[Fact]) -> Fact:
    """The fact about every result of a plain operation."""
    name = eqn.primitive.name
    known = [fact.nonnegative for fact in ins]
    nonnegative = (
        name in _POSITIVE
        or (name in _IF_ALL and all(known))
        or (name in _IF_FIRST and known[0])
        or (name == "max" and any(known))
        or (name == "select_n" and all(known[1:]))
        or (name == "integer_pow" and (eqn.params["y"] % 2 == 0 or known[0]))
        or (name == "clamp" and known[0])
    )
    return Fact(any(fact.data for fact in ins), nonnegative)


def _enter(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    (jaxpr,) = _compat.sub_jaxprs(eqn)
    return finder.run(jaxpr, ins, *inner)


def _enter_call(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    return finder.run(eqn.params["call_jaxpr"], ins, *inner)


def _custom_vjp(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    if finder.custom_vjp == "inline":
        return _enter_call(finder, eqn, ins, *inner)
    inside = Finder("inline")
    outs = _enter_call(inside, eqn, ins, *inner)
    if inside.found and finder.custom_vjp == "error":
        where = next(iter(inside.found.values())).where
        raise LiftError(
            f"attention_products: a product in {where!r} stands inside a custom_vjp, "
            "whose backward pass was written for it as it is. Pass "
            "custom_vjp='inline' to quantize it and differentiate through the body, "
            "or custom_vjp='opaque' to leave it alone."
        )
    return outs


def _scan(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    n_consts, n_carry = _compat.scan_counts(eqn.params)
    consts, xs = ins[:n_consts], ins[n_consts + n_carry :]
    outs: list[Fact] = []

    def step(carry: list[Fact]) -> list[Fact]:
        outs[:] = finder.run(eqn.params["jaxpr"], [*consts, *carry, *xs], *inner)
        return outs[:n_carry]

    carry = finder.settle(step, ins[n_consts : n_consts + n_carry])
    return [*carry, *outs[n_carry:]]


def _while(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    bodies = ins[n_cond : n_cond + n_body]
    carry = finder.settle(
        lambda carry: finder.run(eqn.params["body_jaxpr"], [*bodies, *carry], *inner),
        ins[n_cond + n_body :],
    )
    finder.run(eqn.params["cond_jaxpr"], [*ins[:n_cond], *carry], *inner)
    return carry


def _cond(finder: Finder, eqn: Any, ins: list[Fact], *inner: Any) -> list[Fact]:
    branches = [finder.run(b, ins[1:], *inner) for b in eqn.params["branches"]]
    joined = branches[0]
    for outs in branches[1:]:
        joined = [a.join(b) for a, b in zip(joined, outs, strict=True)]
    return joined


_RULES: dict[str, Callable[..., list[Fact]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _enter),
    **dict.fromkeys(("remat2", "checkpoint", "shard_map"), _enter),
    "custom_jvp_call": _enter_call,
    "custom_vjp_call": _custom_vjp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
