"""`lift`: run any function on compressed leaves, unchanged."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import jax

from jaxcompress.lift import _compat
from jaxcompress.lift._trace import Trace, Tracer, has_leaf, refuse_closures
from jaxcompress.lift._tracked import LiftError, Tracked, dense, track
from jaxcompress.lift._walk import Dense, Walker
from jaxcompress.transform import Transform

P = ParamSpec("P")
R = TypeVar("R")

OnDense = Literal["allow", "warn", "error"]
CustomVjp = Literal["error", "inline", "opaque"]


def lift(
    fn: Callable[P, R],
    *,
    on_dense: OnDense = "allow",
    custom_vjp: CustomVjp = "error",
) -> Callable[P, R]:
    """A function of the same signature that accepts compressed leaves anywhere.

    `fn` is traced on dense abstract values; its matmuls, convolutions, ragged dots
    and embedding look-ups on a leaf go to the leaf's own rule, everything else runs
    as it was traced. Value and gradient are those of `fn` on `materialize(params)`, to
    accumulation error. Like `jax.jit`, it traces once for each signature, so values
    `fn` closes over are fixed at the first call. Results are dense, but a leaf that
    `fn` hands back whole, as it came or with parts overwritten (a quantized key-value
    cache), is a leaf of the same form.

    Args:
      fn: Any traceable function. Arguments that are not arrays (flags, strings,
        Python numbers, None) are static and must be hashable.
      on_dense: What to do where an operation other than those makes a leaf dense:
        ``"allow"``, ``"warn"`` or ``"error"``. `explain` lists them.
      custom_vjp: What to do with a `jax.custom_vjp` that uses a leaf inside: raise,
        differentiate through its body (``"inline"``), or call it on dense weights
        (``"opaque"``).

    Raises:
      ValueError: If `on_dense` or `custom_vjp` is none of these.
      LiftError: When called: a leaf in a while carry, inside a custom_vjp, or in a
        primitive without a rule; a weight closed over instead of passed; a leaf made
        dense under ``on_dense="error"``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> w = jc.quant.quantize(jnp.eye(4), jc.quant.int8())
      >>> lift(lambda w, x: x @ w)(w, jnp.ones((1, 4))).round(4).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    _one_of("on_dense", on_dense, ("allow", "warn", "error"))
    _one_of("custom_vjp", custom_vjp, ("error", "inline", "opaque"))
    tracer = Tracer(fn, who="lift")

    @functools.wraps(fn)
    def lifted(*args: P.args, **kwargs: P.kwargs) -> R:
        if not has_leaf((args, kwargs)):
            return fn(*args, **kwargs)

        def make(trace: Trace) -> tuple[Trace, Walker]:
            refuse_closures(trace, operands, who="lift")
            return trace, Walker(
                on_dense=functools.partial(_hear, on_dense), custom_vjp=custom_vjp
            )

        tracked = (
            tuple(track(a, arrays=False) for a in args),
            track(kwargs, arrays=False),
        )
        signature, operands = tracer.signature(*tracked)
        trace, walker = tracer(signature, make)
        outs, _ = walker.run(trace.jaxpr, operands)
        return jax.tree.unflatten(trace.out_tree, results(outs, operands))

    return lifted


def results(outs: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Dense results, but leaves where an argument comes back in its own form."""
    forms = {_form(w) for w in operands if isinstance(w, Tracked)}
    return [
        o.value if isinstance(o, Tracked) and _form(o) in forms else dense(o)
        for o in outs
    ]


def _form(w: Tracked) -> Any:
    return jax.tree.structure(w), w.shape


def wrap(fn: Callable[..., R], scheme: Transform, **options: Any) -> Callable[..., R]:
    """`fn` on the view of its parameters: ``(params, state, *args) -> fn's result``.

    Args:
      fn: A function whose first argument is the parameter pytree.
      scheme: The transform whose view the forward pass should see.
      **options: As for `lift`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import jaxcompress as jc
      >>> scheme = jc.quant.weights(jc.quant.int8())
      >>> params, state = scheme.init({"w": jnp.eye(4)})
      >>> apply = wrap(lambda p, x: x @ p["w"], scheme)
      >>> apply(params, state, jnp.ones((1, 4))).round(4).tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """
    lifted = lift(fn, **options)

    @functools.wraps(fn)
    def wrapped(params: Any, state: Any, *args: Any, **kwargs: Any) -> R:
        return lifted(scheme.view(params, state), *args, **kwargs)

    return wrapped


def _hear(on_dense: OnDense, event: Dense) -> None:
    if on_dense == "allow":
        return
    message = (
        f"lift: {event.weight.path!r}, {event.weight.shape}, is made dense by "
        f"{event.eqn.primitive.name!r}"
        + (f" in {stack}" if (stack := _compat.name_stack(event.eqn)) else "")
    )
    if on_dense == "error":
        raise LiftError(
            f"{message}; leave the weight out of the rules, or pass on_dense='allow'."
        )
    warnings.warn(message + ".", stacklevel=2)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"lift: {name} must be one of {allowed}; got {value!r}.")
