"""Values inside a model by name, for losses on features; the model is not changed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax

from jaxcompress import tree
from jaxcompress.lift import _explain
from jaxcompress.lift._observe import Observer, taps_of
from jaxcompress.lift._observe import Tap as Tap
from jaxcompress.lift._places import Kind, find_places
from jaxcompress.lift._trace import Signature, Trace, Tracer, has_leaf
from jaxcompress.lift._tracked import LiftError, Tracked, abstract, dense, track

P = ParamSpec("P")
R = TypeVar("R")

KINDS: tuple[Kind, ...] = ("weight", "scope", "name")


def features(
    fn: Callable[P, R],
    patterns: str | Iterable[str],
    *,
    kinds: Collection[Kind] = KINDS,
) -> Callable[P, tuple[R, dict[str, jax.Array]]]:
    """A function of the same signature that also returns values from inside `fn`.

    A value is chosen by the path of a weight in the first argument (the result of the
    matmul, convolution, ragged dot or look-up that uses it, before a bias), by a scope
    (what leaves it: the last floating result of `jax.named_scope`, or of a Flax module,
    that is used outside), or by a name of `jax.ad_checkpoint.checkpoint_name`.
    `tap_names` lists them. Inside a scan, values come stacked ``[length, ...]``.

    What the program has several times under one name (a weight used twice, a module
    called twice) is numbered in program order, ``name#0``, ``name#1``; a pattern
    matches with or without the number. Two calls in one scope with nothing between
    them count as one. In a conditional, the value is that of the branch that ran.

    Args:
      fn: Any traceable function, as for `lift`: traced once for each signature, and
        what is no array is static. For compressed leaves write
        ``lift(features(fn, patterns))``.
      patterns: Globs over the names of taps, as in `select`; each must match.
      kinds: Which taps they may match: ``"weight"``, ``"scope"``, ``"name"``.

    Returns:
      ``(outputs, values)`` with values by name. `fn`'s operations run as they are, so
      its outputs and their gradients are the same, up to how a compiler fuses them. The
      values are differentiable, through `jax.checkpoint` too; inside a `custom_jvp` or
      `custom_vjp` their gradient is that of its body.

    Raises:
      ValueError: If there are no patterns or `kinds` is wrong; when called, if a
        pattern matches nothing (the nearest names are listed) or one name is of two
        kinds.
      LiftError: When called, if a value cannot be brought out: of a while loop, of
        shard_map, of one branch of a conditional; or if an argument holds a compressed
        leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> def model(p, x):
      ...     with jax.named_scope("hidden"):
      ...         h = jnp.maximum(x @ p["up"], 0.0)
      ...     return h @ p["down"]
      >>> params = {"up": jnp.array([[1.0, -1.0]]), "down": jnp.ones((2, 1))}
      >>> y, values = features(model, ["up", "hidden"])(params, jnp.ones((1, 1)))
      >>> y.tolist(), values["up"].tolist(), values["hidden"].tolist()
      ([[1.0]], [[1.0, -1.0]], [[1.0, 0.0]])
    """
    patterns = _checked(patterns, kinds)
    tracer = Tracer(fn, who="distill.features")

    @functools.wraps(fn)
    def observed(*args: P.args, **kwargs: P.kwargs) -> tuple[R, dict[str, jax.Array]]:
        _refuse_leaves((args, kwargs))
        signature, operands = _signature(tracer, args, kwargs)

        def make(trace: Trace) -> tuple[Trace, Observer, list[str]]:
            chosen = _choose(patterns, kinds, _taps(trace, operands))
            return trace, Observer(wanted=chosen), [tap.name for tap in chosen]

        trace, observer, names = tracer(signature, make)
        outs, values = observer.run(trace.jaxpr, [dense(o) for o in operands])
        outputs = jax.tree.unflatten(trace.out_tree, outs)
        return outputs, {name: values[name] for name in names}

    return observed


@dataclasses.dataclass(frozen=True)
class Taps:
    """What `features` can bring out of a program, in its order; prints as a table."""

    taps: tuple[Tap, ...]

    def __iter__(self) -> Iterator[Tap]:
        """Iterate over the taps."""
        return iter(self.taps)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.taps)

    def __str__(self) -> str:
        """One line a tap."""
        rows = [
            (t.name, t.kind, f"{t.dtype}{list(t.shape)}", t.problem or "")
            for t in self.taps
        ]
        return _explain.table(("name", "kind", "value", "problem"), rows)


def tap_names(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Taps:
    """What `features` can bring out of `fn`; nothing runs.

    Args:
      fn: As for `features`.
      *args: Example arguments, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: Example keyword arguments.

    Returns:
      The taps with name, kind, shape and dtype; those that cannot be brought out have
      a `problem`.

    Examples:
      >>> import jax.numpy as jnp
      >>> def model(p, x):
      ...     with jax.named_scope("hidden"):
      ...         return jnp.tanh(x @ p["up"])
      >>> print(tap_names(model, {"up": jnp.eye(2)}, jnp.ones((1, 2))))
      name    kind    value          problem
      up      weight  float32[1, 2]
      hidden  scope   float32[1, 2]
    """
    tracer = Tracer(fn, who="distill.tap_names")
    signature, operands = _signature(tracer, args, kwargs)
    trace = tracer(signature, lambda trace: trace)
    return Taps(tuple(_taps(trace, operands)))


def _signature(
    tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Signature, list[Any]]:
    """The call with the weights of its first argument tracked."""
    first = tuple(track(a, arrays=True) for a in args[:1])
    return tracer.signature((*first, *args[1:]), kwargs)


def _taps(trace: Trace, operands: list[Any]) -> list[Tap]:
    shapes = [
        dataclasses.replace(o, value=abstract(o.value)) if isinstance(o, Tracked) else o
        for o in operands
    ]
    return taps_of(find_places(trace.jaxpr, shapes))


def _checked(patterns: Any, kinds: Collection[str]) -> tuple[str, ...]:
    given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not given or not all(isinstance(p, str) for p in given):
        raise ValueError(
            "distill.features: patterns must be one glob or several, such as "
            f"'**/kernel'; got {patterns!r}."
        )
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"distill.features: kinds must be some of {KINDS}; got {kinds!r}."
        )
    return given


def _choose(
    patterns: tuple[str, ...], kinds: Collection[str], taps: list[Tap]
) -> list[Tap]:
    """The taps that the patterns match; all problems are reported at once."""
    taps = [tap for tap in taps if tap.kind in kinds]
    hits = {p: [tap for tap in taps if _matches(p, tap.name)] for p in patterns}
    missed = [
        f"pattern {pattern!r} matches nothing; {_near(pattern, taps)}"
        for pattern, found in hits.items()
        if not found
    ]
    if missed:
        raise ValueError(f"distill.features: {'; '.join(missed)}.")
    chosen = [tap for tap in taps if any(tap in found for found in hits.values())]
    _refuse_ambiguous(chosen)
    for tap in chosen:
        if tap.problem:
            raise LiftError(
                f"distill.features: {tap.name!r} cannot be brought out: it stands "
                f"{tap.problem}, or narrow the pattern."
            )
    return chosen


def _matches(pattern: str, name: str) -> bool:
    return tree.matches(pattern, name) or tree.matches(
        pattern, re.sub(r"#\d+$", "", name)
    )


def _near(pattern: str, taps: list[Tap]) -> str:
    names = list(dict.fromkeys(tap.name for tap in taps))
    if not names:
        return "the function has no taps of these kinds"
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=5, cutoff=0.3)
    return f"the nearest names are {near}" if near else f"the names begin {names[:5]}"


def _refuse_ambiguous(taps: list[Tap]) -> None:
    kinds: dict[str, str] = {}
    for tap in taps:
        if kinds.setdefault(tap.name, tap.kind) != tap.kind:
            raise ValueError(
                f"distill.features: {tap.name!r} is a {kinds[tap.name]} and a "
                f"{tap.kind}; choose one with kinds=({tap.kind!r},)."
            )


def _refuse_leaves(arguments: Any) -> None:
    if has_leaf(arguments):
        raise LiftError(
            "distill.features: an argument holds compressed leaves, which the function "
            "takes only when lifted; write jaxcompress.lift(distill.features(fn, "
            "patterns)), in this order."
        )
