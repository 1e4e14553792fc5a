"""Control flow around a weight, re-emitted through public JAX functions.

Each rule takes ``(walker, eqn, operands)`` and returns results and taps. Weights
cross the boundaries as pytrees, so a scanned weight is sliced component by
component, and a jitted function takes it as an argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxcompress.leaf import Leaf
from jaxcompress.lift import _compat
from jaxcompress.lift._tracked import EITHER, LiftError, Tracked, dense, is_tracked

if TYPE_CHECKING:
    from jaxcompress.lift._walk import Walker

Result = tuple[list[Any], dict[str, Any]]


def _emit(walker: Walker, eqn: Any, f: Callable[..., Any], operands: list[Any]) -> Any:
    """Call `f`; outside any trace, through one jitted copy kept for this equation.

    JAX keys the compilation of loops on the identity of their bodies, which are new
    at every call; without this an eager lifted loop would compile each time.
    """
    if walker.inline or not _compat.is_concrete(operands):
        return f(*operands)
    key = walker.key(eqn)
    if key not in walker.memo:
        walker.memo[key] = jax.jit(f)
    return walker.memo[key](*operands)


def _jit(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    params = eqn.params

    def call(*values: Any) -> Any:
        with walker.inside(eqn):
            return walker.run(params["jaxpr"], values)

    ins = [_compat.given(s) for s in params["in_shardings"]]
    outs = [_compat.given(s) for s in params["out_shardings"]]
    if walker.inline or str(params["inline"]) in (
        "True",
        "Inline.ALWAYS",
        "Inline.JIT",
    ):
        return call(*operands)
    key = walker.key(eqn)
    if key not in walker.memo:
        call.__name__ = params["name"]
        options: dict[str, Any] = {}
        if any(s is not None for s in ins):
            options["in_shardings"] = tuple(map(_component_shardings, ins, operands))
        if any(s is not None for s in outs):
            options["out_shardings"] = (outs, None)
        walker.memo[key] = jax.jit(call, **options)
    return walker.memo[key](*operands)


def _component_shardings(sharding: Any, operand: Any) -> Any:
    """The sharding of every component of a weight, from that of the array."""
    if not (isinstance(operand, Tracked) and isinstance(operand.value, Leaf)):
        return sharding
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    specs = _specs(sharding.spec, operand, dict(mesh.shape))
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


def _specs(spec: Any, operand: Any, sizes: dict[Any, int]) -> Any:
    """A partition spec, or for a weight one of every component."""
    if not (isinstance(operand, Tracked) and isinstance(operand.value, Leaf)):
        return spec
    leaf = operand.value
    full = (*spec, *[None] * (leaf.ndim - len(spec)))
    return dataclasses.replace(operand, value=leaf.component_specs(full, sizes))


def _call(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    """A plain call: enter it."""
    (jaxpr,) = _compat.sub_jaxprs(eqn)
    with walker.inside(eqn):
        return walker.run(jaxpr, operands)


def _remat(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    def call(*values: Any) -> Any:
        with walker.inside(eqn):
            return walker.run(eqn.params["jaxpr"], values)

    checkpointed = jax.checkpoint(
        call, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    return _emit(walker, eqn, checkpointed, operands)


def _scan(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    params = eqn.params
    n_consts, n_carry = _compat.scan_counts(params)
    consts, carry, xs = _split(operands, n_consts, n_carry)
    xs = [_stacked(walker, eqn, x) for x in xs]
    sliced = {x.path for x in xs if isinstance(x, Tracked)}

    def step(consts: Any, carry: Any, xs: Any) -> Any:
        with walker.inside(eqn, params["length"]):
            xs = [
                dataclasses.replace(x, dims=x.dims[1:]) if is_tracked(x) else x
                for x in xs
            ]
            outs, taps = walker.run(params["jaxpr"], [*consts, *carry, *xs])
        ys = [y if _is_compressed(y) else dense(y) for y in outs[n_carry:]]
        return outs[:n_carry], (ys, taps)

    first = [_first(x) for x in xs]
    carry = _steady(walker, eqn, lambda c, x: step(consts, c, x)[0], carry, first)

    def scan(consts: Any, carry: Any, xs: Any) -> Any:
        return jax.lax.scan(
            lambda c, x: step(consts, c, x), carry, xs, **_compat.scan_options(params)
        )

    # dims are static: a scanned weight's lose their first entry inside the body.
    carry, (ys, taps) = _emit(walker, eqn, scan, [consts, carry, xs])
    if taps:
        assert walker.fold is not None
        taps = {k: t if k in sliced else walker.fold(t) for k, t in taps.items()}
    leads = {x.path: x.dims[:1] for x in xs if isinstance(x, Tracked)}
    return [*carry, *(_restacked(y, leads) for y in ys)], taps


def _is_compressed(x: Any) -> bool:
    return isinstance(x, Tracked) and x.compressed


def _restacked(y: Any, leads: dict[str, Any]) -> Any:
    """A scanned result with its first axis; that of the operand it was sliced from."""
    if not isinstance(y, Tracked):
        return y
    return dataclasses.replace(y, dims=(*leads.get(y.path, ((),)), *y.dims))


def _first(x: Any) -> Any:
    """The abstract slice of a scanned operand."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), x)


def _stacked(walker: Walker, eqn: Any, x: Any) -> Any:
    """A scanned weight in a form whose components all lead with the scanned axis."""
    if not isinstance(x, Tracked):
        return x
    moved = x.stacked(1)
    return walker.densify(eqn, [x])[0] if moved is NotImplemented else moved


def _steady(
    walker: Walker,
    eqn: Any,
    step: Callable[..., list[Any]],
    carry: list[Any],
    *operands: Any,
) -> list[Any]:
    """Make dense the carried weights that one step does not hand on as they came."""
    while any(isinstance(c, Tracked) for c in carry):
        after = jax.eval_shape(step, carry, *operands)
        changed = [_changed(c, a) for c, a in zip(carry, after, strict=True)]
        if not any(changed):
            break
        carry = [
            walker.densify(eqn, [c])[0] if ch else c
            for c, ch in zip(carry, changed, strict=True)
        ]
    return carry


def _changed(before: Any, after: Any) -> bool:
    """Whether a carried weight comes back in another form."""
    return isinstance(before, Tracked) and (
        jax.tree.structure(before) != jax.tree.structure(after)
    )


def _while(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    params = eqn.params
    conditions, bodies, carry = _split(
        operands, params["cond_nconsts"], params["body_nconsts"]
    )
    carry = [c if _is_compressed(c) else dense(c) for c in carry]

    def step(bodies: Any, state: Any) -> Any:
        with walker.inside(eqn):
            outs, taps = walker.run(params["body_jaxpr"], [*bodies, *state])
        _no_taps(taps)
        return [
            o if is_tracked(c) else dense(o) for c, o in zip(carry, outs, strict=True)
        ]

    if any(is_tracked(c) for c in carry):
        after = jax.eval_shape(step, bodies, carry)
        for c, a in zip(carry, after, strict=True):
            if _changed(c, a):
                raise LiftError(
                    f"lift: {c.path!r} is carried through a while loop, which may "
                    "update it but must keep its form; let the body refer to it "
                    "instead of carrying it, or call jaxcompress.materialize on it "
                    "first."
                )

    def loop(conditions: Any, bodies: Any, carry: Any) -> Any:
        def test(state: Any) -> Any:
            with walker.inside(eqn):
                outs, taps = walker.run(params["cond_jaxpr"], [*conditions, *state])
            _no_taps(taps)
            return dense(outs[0])

        return jax.lax.while_loop(test, lambda state: step(bodies, state), carry)

    return list(_emit(walker, eqn, loop, [conditions, bodies, carry])), {}


def _no_taps(taps: dict[str, Any]) -> None:
    if taps:
        raise LiftError(
            f"calibrate: {next(iter(taps))!r} is used inside a while loop, out of "
            "which no statistics can come; use lax.scan, or fori_loop with static "
            "bounds."
        )


def _cond(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    index, *values = operands

    def branch(jaxpr: Any) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            with walker.inside(eqn):
                return walker.run(jaxpr, values)

        return run

    branches = [branch(j) for j in eqn.params["branches"]]
    shapes = [jax.eval_shape(b, *values) for b in branches]
    results = [
        _common(list(outs)) for outs in zip(*(s[0] for s in shapes), strict=True)
    ]
    every = {k: t for _, taps in shapes for k, t in taps.items()}

    def uniform(run: Callable[..., Any]) -> Callable[..., Any]:
        """The branch with the results and taps that all branches share."""

        def call(*values: Any) -> Any:
            outs, taps = run(*values)
            outs = [
                walker.densify(eqn, [o])[0] if like is None else o.value
                for o, like in zip(outs, results, strict=True)
            ]
            blank = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), every)
            return outs, {**blank, **taps}

        return call

    def switch(index: Any, *values: Any) -> Any:
        return jax.lax.switch(index, [uniform(b) for b in branches], *values)

    outs, taps = _emit(walker, eqn, switch, [dense(index), *values])
    return [
        o if like is None else dataclasses.replace(like, value=o)
        for o, like in zip(outs, results, strict=True)
    ], taps


def _common(outs: list[Any]) -> Tracked | None:
    """The weight that a result is, whichever branch ran, or None if it is no weight."""
    if not all(isinstance(o, Tracked) for o in outs):
        return None
    forms = {(jax.tree.structure(o.value), o.dims, o.rank) for o in outs}
    if len(forms) > 1:
        return None
    paths = dict.fromkeys(path for o in outs for path in o.paths)
    return dataclasses.replace(outs[0], path=EITHER.join(paths))


def _custom_jvp(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    """Keep the function's own derivative; inside it the weight is dense."""
    jaxpr = eqn.params["call_jaxpr"]
    if walker.inline:
        return _call_body(walker, eqn, jaxpr, operands)

    @jax.custom_jvp
    def call(*values: Any) -> Any:
        outs, taps = _call_body(walker, eqn, jaxpr, list(values))
        return [dense(o) for o in outs], taps

    @call.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        def original(*values: Any) -> list[Any]:
            return _compat.bind(eqn, [dense(v) for v in values])

        out, taps = call(*primals)
        _, tangent = jax.jvp(original, primals, tangents)
        still = jax.tree.map(jnp.zeros_like, taps)
        return (out, taps), (tangent, still)

    return _emit(walker, eqn, call, operands)


def _call_body(walker: Walker, eqn: Any, jaxpr: Any, operands: list[Any]) -> Result:
    with walker.inside(eqn):
        return walker.run(jaxpr, operands)


def _custom_vjp(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    jaxpr = eqn.params["call_jaxpr"]
    compressed = any(is_tracked(v) and v.compressed for v in operands)
    if not compressed or walker.custom_vjp == "inline":
        return _call_body(walker, eqn, jaxpr, operands)
    if walker.custom_vjp == "error" and walker.meets_use(jaxpr, operands):
        path = next(v.path for v in operands if is_tracked(v))
        raise LiftError(
            f"lift: {path!r} is used inside a custom_vjp, whose backward pass was "
            "written for the dense array. Pass custom_vjp='inline' to lift to run the "
            "body on the compressed weight and differentiate through it, or "
            "custom_vjp='opaque' to call the function on the dense weight and keep "
            "its own backward pass."
        )
    return _compat.bind(eqn, walker.densify(eqn, operands)), {}


def _shard_map(walker: Walker, eqn: Any, operands: list[Any]) -> Result:
    params = eqn.params
    sizes = dict(params["mesh"].shape)
    in_specs = [
        _specs(spec, operand, sizes)
        for spec, operand in zip(params["in_specs"], operands, strict=True)
    ]

    def call(*values: Any) -> Any:
        with walker.inside(eqn):
            outs, taps = walker.run(params["jaxpr"], values)
        if taps:
            raise LiftError(
                f"calibrate: {next(iter(taps))!r} is used inside shard_map, where its "
                "statistics are local; calibrate the function without shard_map, on "
                "sharded inputs."
            )
        return tuple(dense(o) for o in outs)

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=tuple(in_specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=set(params.get("newly_manual_axes", params.get("manual_axes"))),
    )
    return list(_emit(walker, eqn, mapped, operands)), {}


def _split(values: list[Any], *counts: int) -> list[list[Any]]:
    """Cut a list after each count; the rest comes last."""
    parts = []
    for n in counts:
        parts.append(values[:n])
        values = values[n:]
    return [*parts, values]


CONTROL: dict[str, Callable[[Any, Any, list[Any]], Result]] = {
    "jit": _jit,
    "pjit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "shard_map": _shard_map,
}
"""Rules by primitive."""
